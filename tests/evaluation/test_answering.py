"""Evaluation asks every question once, whatever the number of ranks, and loses or hides none."""

import json
import math
import threading
from types import SimpleNamespace

import pytest
from asking import evaluate
from PIL import Image

from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.evaluation.predictions import Prediction, read_predictions
from vlm_distill.evaluation.question_only import question_only_baseline
from vlm_distill.evaluation.question_source import evenly_spaced
from vlm_distill.evaluation.source_scores import in_words, summarise, wilson_interval
from vlm_distill.models.answers import Answer

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "teal": (0, 128, 128)}


def colour_row(colour, line, *, question="Which colour is it?", kind="colour", answers=None, size=(2, 2)):
    return Conversation(
        messages=(
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": colour}]},
        ),
        images=(Image.new("RGB", size, COLOURS[colour]),),
        source="colours",
        line=line,
        metadata={"question_type": kind, **({"answers": answers} if answers else {})},
    )


class Rows:
    """A source in memory; a row that is an exception is raised."""

    name = "colours"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        return self.rows[index]

    def size(self, index):
        row = self.rows[index]
        return len(row.question) if isinstance(row, Conversation) else 0


class ColourModel:
    """Reads the colour off the image; refuses questions that hold "unfit", as a processor does."""

    def __init__(self, barrier=None):
        self.calls = []
        self.barrier = barrier
        self.processor = SimpleNamespace(encode=self.encode)

    @staticmethod
    def encode(conversation, images, *, generation):
        assert generation
        assert conversation.messages[-1]["role"] == "user"
        if "unfit" in conversation.question:
            raise BadSample("too long", "9 tokens, limit 8")

    def generate(self, prompts, *, max_new_tokens):
        for conversation, images in prompts:
            self.encode(conversation.prompt(), images, generation=True)
        assert prompts, "an empty batch reached the model"
        if self.barrier:
            self.barrier.wait(timeout=10)
        self.calls.append([c.line for c, _ in prompts])
        names = {colour: name for name, colour in COLOURS.items()}
        return [Answer(names[images[0].getpixel((0, 0))], [1, 2], [-0.5, -0.25]) for _, images in prompts]


def load(image):
    """Stands for ``data.images.load_image``; a 1×1 picture is one that cannot be read."""
    if image.size == (1, 1):
        raise BadSample("image not found", "nowhere.png")
    return image


def ask_on_ranks(source, world, **options):
    """Runs ``world`` ranks in threads; every ``generate`` waits for all of them, as under ZeRO-3."""
    barrier, boxes = threading.Barrier(world), {}
    models = [ColourModel(barrier) for _ in range(world)]
    results = [None] * world

    def run(rank):
        calls = iter(range(100))

        def all_gather(mine):
            key = next(calls)
            boxes.setdefault(key, [None] * world)[rank] = mine
            barrier.wait(timeout=10)
            return boxes[key]

        skipped = []
        predictions = evaluate(
            models[rank], source, rank=rank, world=world, all_gather=all_gather, skipped=skipped, load=load, **options
        )
        results[rank] = (predictions, skipped)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return results, models


@pytest.fixture
def source():
    names = list(COLOURS)
    rows = [colour_row(names[i % 3], i + 1, question="Which colour?" + "?" * (i * 7 % 5)) for i in range(11)]
    return Rows(rows)


def test_answers_come_back_in_source_order_with_scores(source, tmp_path):
    done = []
    predictions = evaluate(
        ColourModel(), source, batch_size=4, load=load, out=tmp_path / "student", progress=lambda *x: done.append(x)
    )
    assert [p.index for p in predictions] == list(range(11))
    assert all(p.answer == p.references[0] and p.exact == p.soft == 1.0 for p in predictions)
    assert predictions[3].probability == pytest.approx(math.exp(-0.75))
    assert done == [(4, 11), (8, 11), (11, 11)]
    assert read_predictions(tmp_path / "student" / "predictions.jsonl") == predictions
    assert json.loads((tmp_path / "student" / "scores.json").read_text())["exact"] == 1.0


def test_batches_hold_questions_of_like_length(source):
    model = ColourModel()
    evaluate(model, source, batch_size=4, load=load)
    lengths = [[source.size(line - 1) for line in call] for call in model.calls]
    assert [x for call in lengths for x in call] == sorted(source.size(i) for i in range(11))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_and_calls_generate_equally_often(source, world):
    source.rows[2] = BadSample("invalid JSON")
    source.rows[5] = colour_row("red", 6, question="unfit")
    alone = evaluate(ColourModel(), source, batch_size=3, load=load)
    results, models = ask_on_ranks(source, world, batch_size=3)
    assert all(predictions == alone for predictions, _ in results)
    assert len({len(model.calls) for model in models}) == 1
    assert [(p.line, p.reason) for p in results[-1][1]] == [(3, "invalid JSON"), (6, "too long")]


def test_bad_samples_are_left_out_and_reported(source, tmp_path):
    source.rows[0] = BadSample("invalid JSON", "at 7")
    source.rows[4] = colour_row("red", 5, size=(1, 1))
    source.rows[6] = colour_row("red", 7, question="unfit")
    skipped = []
    predictions = evaluate(ColourModel(), source, batch_size=2, load=load, skipped=skipped, out=tmp_path)
    assert [p.index for p in predictions] == [1, 2, 3, 5, 7, 8, 9, 10]
    assert [(s.line, s.reason) for s in skipped] == [(1, "invalid JSON"), (5, "image not found"), (7, "too long")]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n"] == 8
    assert scores["skipped"] == {"invalid JSON": 1, "image not found": 1, "too long": 1}


def test_a_source_without_one_good_sample_ends_with_nothing():
    skipped = []
    source = Rows([BadSample("empty answer"), BadSample("empty answer")])
    assert evaluate(ColourModel(), source, load=load, skipped=skipped) == []
    assert len(skipped) == 2
    assert summarise([], skipped)["exact"] is None


def test_questions_of_which_none_fits_the_model_are_counted():
    skipped = []
    source = Rows([colour_row("red", line, question="unfit") for line in (1, 2)] + [BadSample("empty answer")])
    assert evaluate(ColourModel(), source, load=load, skipped=skipped) == []
    assert [(s.line, s.reason) for s in skipped] == [(1, "too long"), (2, "too long"), (3, "empty answer")]


def test_limit_takes_an_even_share(source):
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 9) == [0, 1, 2]
    predictions = evaluate(ColourModel(), source, limit=4, load=load)
    assert [p.index for p in predictions] == [0, 2, 5, 8]


class Killed(Exception):
    pass


@pytest.mark.parametrize("world", [1, 3])
def test_an_evaluation_cut_short_goes_on_to_the_same_file(source, tmp_path, world):
    source.rows[2] = BadSample("invalid JSON")
    source.rows[5] = colour_row("red", 6, question="unfit")
    options = {"batch_size": 2, "load": load, "resume": {"model": 1}}
    evaluate(ColourModel(), source, out=tmp_path / "straight", **options)
    asked = []

    class Mortal(ColourModel):
        def generate(self, prompts, **settings):
            if len(asked) == 3:
                raise Killed
            asked.append(len(prompts))
            return super().generate(prompts, **settings)

    out = tmp_path / "interrupted"
    with pytest.raises(Killed):
        evaluate(Mortal(), source, out=out, **options)
    (journal,) = (out / "unfinished").iterdir()
    left = 6 - len(journal.read_text().strip().splitlines())
    with journal.open("a") as file:
        file.write('\n{"batch": 3, "predic')  # the kill came while it wrote
    _, models = ask_on_ranks(source, world, out=out, **{k: v for k, v in options.items() if k != "load"})
    assert left < 6
    assert [len(model.calls) for model in models] == [math.ceil(left / world)] * world
    for name in ("predictions.jsonl", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert {p.name for p in out.iterdir()} == {"predictions.jsonl", "scores.json"}


class Mortal(ColourModel):
    """Dies after the first batch."""

    def generate(self, prompts, **settings):
        if self.calls:
            raise Killed
        return super().generate(prompts, **settings)


def interrupted(source, out, **options):
    """An evaluation that was killed after its first batch of four."""
    with pytest.raises(Killed):
        evaluate(Mortal(), source, **({"batch_size": 4, "load": load, "out": out, "resume": {"model": 1}} | options))


@pytest.mark.parametrize("changed", [{"resume": {"model": 2}}, {"max_new_tokens": 9}])
def test_answers_of_another_model_or_setting_are_not_taken(source, tmp_path, changed):
    interrupted(source, tmp_path)
    model = ColourModel()
    settings = {"batch_size": 4, "load": load, "out": tmp_path, "resume": {"model": 1}}
    evaluate(model, source, **(settings | changed))
    assert len(model.calls) == 3


def test_questions_that_changed_are_asked_again_and_right_answers_count_as_they_are_now(source, tmp_path):
    settings = {"batch_size": 2, "load": load, "out": tmp_path, "resume": {"model": 1}}
    evaluate(ColourModel(), source, about={}, **settings)
    source.rows[3] = colour_row("blue", 4, question=source.rows[3].question)  # another image
    source.rows[4] = colour_row("blue", 5, question="Which one?")
    source.rows[6] = colour_row("red", 7, question=source.rows[6].question, answers=["crimson"])
    model, told = ColourModel(), []
    predictions = evaluate(model, source, about={}, tell=told.append, **settings)
    assert sorted(line for call in model.calls for line in call) == [4, 5]
    assert [p.answer for p in predictions[3:5]] == ["blue", "blue"]
    assert [p.index for p in predictions if not p.exact] == [6]
    assert told == [f"colours: 9 of 11 answers kept from before in {tmp_path}"]
    # Rows that moved keep their answers: only the new one is asked.
    source.rows.insert(0, colour_row("teal", 1, question="And this?"))
    model = ColourModel()
    assert len(evaluate(model, source, about={}, **settings)) == 12
    assert model.calls == [[1]]


def test_an_image_file_counts_by_its_content_and_a_mended_one_is_asked(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths[1:]:
        Image.new("RGB", (2, 2), COLOURS["red"]).save(path)
    rows = [colour_row("red", i + 1) for i in range(3)]
    source = Rows([row.__class__(row.messages, (str(path),)) for row, path in zip(rows, paths, strict=True)])
    settings = {"out": tmp_path / "out", "resume": {"model": 1}, "about": {}}
    assert len(evaluate(ColourModel(), source, **settings)) == 2
    Image.new("RGB", (2, 2), COLOURS["teal"]).save(paths[0])  # was missing
    Image.new("RGB", (2, 2), COLOURS["blue"]).save(paths[1])
    model = ColourModel()
    assert [p.answer for p in evaluate(model, source, **settings)] == ["teal", "blue", "red"]
    assert [len(call) for call in model.calls] == [2]


class Thinker(ColourModel):
    """Thinks before each answer; about row 3 for too long."""

    def generate(self, prompts, **settings):
        texts = ["<think>hm" if c.line == 3 else "<think>hm, not teal</think>\n\nred" for c, _ in prompts]
        return [Answer(text, [1], [-0.5], complete=c.line != 2) for text, (c, _) in zip(texts, prompts, strict=True)]


def test_thoughts_are_kept_and_not_scored_and_one_without_an_end_is_a_cut_answer(source, tmp_path):
    first, second, third, *_ = evaluate(Thinker(), source, load=load, out=tmp_path, limit=None)
    assert (first.answer, first.exact, first.generated) == ("red", 1.0, "<think>hm, not teal</think>\n\nred")
    assert (second.answer, second.complete) == ("red", False)
    assert (third.answer, third.exact, third.complete, third.generated) == ("", 0.0, False, "<think>hm")
    assert json.loads((tmp_path / "scores.json").read_text())["cut"] == 2
    assert read_predictions(tmp_path / "predictions.jsonl")[2] == third


def test_a_limit_marks_scores(source, tmp_path):
    evaluate(ColourModel(), source, limit=4, load=load, out=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["limited_from"] == 11
    assert in_words(scores).endswith("on 4 questions, limited: of 11 questions")
    evaluate(ColourModel(), source, limit=40, load=load, out=tmp_path)
    assert "limited_from" not in json.loads((tmp_path / "scores.json").read_text())


def test_a_smaller_limit_loses_no_answer(source, tmp_path):
    settings = {"load": load, "out": tmp_path, "resume": {"model": 1}}
    whole = evaluate(ColourModel(), source, **settings)
    assert len(evaluate(ColourModel(), source, limit=2, **settings)) == 2
    assert len(evaluate(ColourModel(), source, limit=4, **settings)) == 4
    silent = ColourModel()
    assert evaluate(silent, source, **settings) == whole
    assert not silent.calls
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: line.replace(b'"answer": "', b'"answer": 7, "a": "'),
        lambda line: line.replace(b'"index": 3', b'"index": "3"'),
        lambda line: line.replace(b'"index": 3', b'"index": -8'),
        lambda line: line.replace(b'"probability"', b'"p"'),
        lambda line: line.replace(b"colour", b"\xff"),
        lambda line: b"[7]",
    ],
)
def test_only_a_damaged_answer_is_asked_again(source, tmp_path, damage):
    settings = {"load": load, "out": tmp_path, "resume": {"model": 1}}
    before = evaluate(ColourModel(), source, **settings)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_bytes().splitlines()
    lines[3] = damage(lines[3])
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match="line 4: damaged, not a prediction"):
        read_predictions(path)
    model = ColourModel()
    assert evaluate(model, source, **settings) == before
    assert [len(call) for call in model.calls] == [1]


def test_images_are_named_by_path_or_content(tmp_path):
    Image.new("RGB", (2, 2), COLOURS["teal"]).save(tmp_path / "teal.png")
    stored = (tmp_path / "teal.png").read_bytes()
    by_path = colour_row("teal", 1)
    rows = [by_path.__class__(by_path.messages, (image,)) for image in (str(tmp_path / "teal.png"), stored, stored)]
    teal = Image.new("RGB", (2, 2), COLOURS["teal"])
    first, second, third = evaluate(ColourModel(), Rows(rows), load=lambda image: teal)
    assert first.image == str(tmp_path / "teal.png")
    assert second.image == third.image
    assert second.image.startswith("sha256:")


def test_several_ranks_need_a_gather(source):
    with pytest.raises(ValueError, match="all_gather"):
        evaluate(ColourModel(), source, world=2)


def test_scores_by_question_type():
    def answered(kind, exact, soft):
        return Prediction(0, "s", 1, "q", ["a"], "a", 1.0, exact, soft, kind)

    scores = summarise([answered("colour", 1, 1), answered("colour", 0, 0.3), answered("shape", 1, 1)])
    assert scores["n"] == 3
    assert scores["exact"] == pytest.approx(2 / 3)
    assert scores["by_type"]["colour"]["soft"] == pytest.approx(0.65)
    assert list(scores["by_type"]) == ["colour", "shape"]


def test_wilson_interval_of_a_known_case():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_baseline_answers_from_the_question_alone():
    train = Rows(
        [
            colour_row("red", 1, question="Which?"),
            colour_row("red", 2, question="Which?"),
            colour_row("blue", 3, question="Which?"),
            BadSample("invalid JSON"),
            colour_row("blue", 5, question="What?", answers=["blue", "blue", "navy"]),
        ]
    )
    test = Rows([colour_row("red", 1, question="Which?"), colour_row("blue", 2, question="Never asked?")])
    first, second = question_only_baseline(train, test)
    assert (first.answer, first.exact) == ("red", 1.0)
    assert first.probability == pytest.approx(2 / 3)
    assert second.answer == "blue"  # the commonest of all: 3 of 6
    assert second.probability == pytest.approx(1 / 2)
    with pytest.raises(UserError, match="baseline"):
        question_only_baseline(Rows([]), test)
