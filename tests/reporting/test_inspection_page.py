"""Inspection shows each token once, as what it is to the loss."""

import io

import pytest
from PIL import Image
from rich.console import Console

from vlm_distill.reporting.inspection_page import (
    InspectedModel,
    InspectedSample,
    counts,
    render_html,
    render_terminal,
    token_runs,
)


@pytest.fixture
def model():
    return InspectedModel(
        pieces=["<user>", *["<img>"] * 16, "What", "?\n", "te", "al", "<eos>"],
        supervised=[False] * 19 + [True] * 3,
        ends=[False] * 21 + [True],
        image=[False] + [True] * 16 + [False] * 5,
    )


def printed(samples, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    render_terminal(samples, console)
    return console.file.getvalue()


def test_runs_of_tokens(model):
    runs = token_runs(model)
    assert [(run.kind, len(run.pieces)) for run in runs] == [
        ("prompt", 1),
        ("image", 16),
        ("prompt", 2),
        ("answer", 2),
        ("end", 1),
    ]
    assert runs[1].label == "⟨image · 16 tokens⟩"
    assert counts(model) == "22 tokens, 16 of images, 3 supervised, 1 of them end tokens"


def test_a_second_image_is_a_run_of_its_own():
    model = InspectedModel(["<img>", "and", "<img>"], [False] * 3, [False] * 3, [True, False, True])
    assert [run.label for run in token_runs(model) if run.kind == "image"] == ["⟨image · 1 token⟩"] * 2


def test_lists_of_unequal_length_are_refused(model):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        token_runs(InspectedModel(model.pieces, model.supervised[1:], model.ends, model.image))


def test_terminal_without_colours_shows_text_and_size(model):
    text = printed([InspectedSample("train, line 3", [Image.new("RGB", (64, 48))], {"student": model}, None)])
    assert "train, line 3" in text
    assert "⟨image · 16 tokens⟩What?↵" in text
    assert "teal<eos>" in text
    assert "64×48" in text


def test_terminal_highlights_supervised_tokens_and_draws_the_picture(model):
    sample = InspectedSample("t", [Image.new("L", (64, 47))], {"student": model, "teacher": model})
    text = printed([sample], force_terminal=True, color_system="truecolor")
    assert "\x1b[30;103mteal\x1b[0m" in text
    assert "\x1b[1;37;41m<eos>\x1b[0m" in text
    assert "▀" in text
    assert text.count("22 tokens") == 2


def test_terminal_takes_markup_as_text():
    model = InspectedModel(["[bold]x[/bold]", "[/]"], [False] * 2, [False] * 2, [False] * 2)
    text = printed([InspectedSample("[red]title", [], {"student": model}, "too long [/]: 9 tokens")])
    assert "[bold]x[/bold][/]" in text
    assert "[red]title" in text
    assert "too long [/]: 9 tokens" in text


def test_page_is_escaped_and_complete(model, tmp_path):
    evil = InspectedModel(["<script>alert(1)</script>"], [True], [False], [False])
    samples = [
        InspectedSample("train, line 3", [Image.new("RGB", (64, 64))], {"student": model, "teacher": evil}),
        InspectedSample("<script>", [], {}, "misaligned: <script>"),
    ]
    text = render_html(samples, tmp_path / "new" / "inspect.html").read_text("utf-8")
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 1
    assert '<span class="answer">te</span><span class="answer">al</span><span class="end">&lt;eos&gt;</span>' in text
    assert '<span class="image">⟨image · 16 tokens⟩</span>' in text
    assert "misaligned: &lt;script&gt;" in text
    assert "http" not in text


def test_groups_of_different_tokenizers(model, tmp_path):
    groups = [("te·al", "teal"), ("<eos>", "<eos>")]
    models = {"student": model}
    samples = [InspectedSample("t", [], models, groups=groups), InspectedSample("u", [], models)]
    text = printed(samples)
    assert text.count("groups  2, student = teacher") == 1
    assert "te·al = teal  <eos>\n" in "\n".join(line.strip() for line in text.splitlines())
    page = render_html(samples, tmp_path / "x.html").read_text("utf-8")
    assert page.count("<h3>groups") == 1
    assert '<span class="answer">te·al = teal</span> <span class="answer">&lt;eos&gt;</span>' in page


def test_pictures_are_left_as_they_were(model, tmp_path):
    image = Image.new("RGB", (900, 300))
    render_html([InspectedSample("t", [image], {"student": model})], tmp_path / "x.html")
    printed([InspectedSample("t", [image], {"student": model})], force_terminal=True, color_system="truecolor")
    assert image.size == (900, 300)
