"""``vlm-distill inspect --json`` writes what training would learn, and nothing else."""

import json

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from data.collate import Collator
from data.loader import StepDataset, StepSplit
from vlm_distill.cli import app
from vlm_distill.config.sections import RunConfig
from vlm_distill.inspection import Inspection


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    tiny.write_data(folder / "data", text_only=(0, 1), broken=(4,))
    talk = [
        *({"from": "human", "value": "say red"}, {"from": "gpt", "value": "red"}),
        *({"from": "human", "value": "say no"}, {"from": "gpt", "value": "no red"}),
    ]
    (folder / "talk.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    (folder / "text.jsonl").write_text('{"text": "it is red"}\n{"text": "what color is it say no yes red"}\n')
    return folder, tiny.write_teacher(folder / "teacher"), tiny.write_language_model(folder / "language")


@pytest.fixture
def inspected(material):
    """The entries of a run on some of the sources."""
    folder, teacher, language = material

    def entries(*sources, count=None, **changes):
        own = language if "text" in sources else teacher
        plain = tiny.config(folder / "out", folder / "data" / "data.jsonl", own, **changes)
        if "text" in sources:
            plain["student"] = {"decoder": tiny.settings()["decoder"]}
        paths = {"data": folder / "data" / "data.jsonl", "talk": folder / "talk.jsonl", "text": folder / "text.jsonl"}
        kinds = {"text": {"format": "text"}}
        plain["data"]["train"] = [{"path": str(paths[name]), **kinds.get(name, {})} for name in sources]
        return list(Inspection(RunConfig.model_validate(plain)).lines(count))

    return entries


def test_every_sample_of_every_source_in_order(inspected):
    entries = inspected("data", "talk")
    assert [(entry["source"], entry["line"]) for entry in entries] == [
        *(("data", i) for i in range(1, 25)),
        ("talk", 1),
    ]
    assert entries[4].keys() == {"source", "line", "problem"}
    assert entries[4]["problem"].startswith("not an image: ")
    said = {"text": "<user> say red <assistant> red <eos>", "supervised": ["red <eos>"], "ends": ["<eos>"], "images": 0}
    assert entries[0]["student"] == entries[0]["teacher"] == said
    assert entries[2]["student"]["images"] == 1
    assert entries[2]["student"]["text"].count("<pad>") == 4  # the image's tokens, as they are


@pytest.mark.parametrize(
    ("settings", "supervised"), [({}, ["red <eos>", "no red <eos>"]), ({"data__answers": "last"}, ["no red <eos>"])]
)
def test_what_is_learnt_of_several_answers(inspected, settings, supervised):
    (entry,) = inspected("talk", **settings)
    assert entry["student"]["supervised"] == entry["teacher"]["supervised"] == supervised


def test_each_turn_of_a_split_conversation_has_a_line(inspected):
    entries = inspected("talk", data__turns="split")
    assert [entry["line"] for entry in entries] == [1, 1]
    assert [entry["student"]["supervised"] for entry in entries] == [["red <eos>"], ["no red <eos>"]]
    assert [entry["student"]["text"].count("<assistant>") for entry in entries] == [1, 2]


def test_what_is_too_long_is_a_problem(inspected):
    problems = {entry.get("problem") for entry in inspected("talk", data__max_length=9)}
    assert problems == {"too long: 13 tokens for the student, limit 9"}


def test_a_long_document_has_a_line_for_each_piece(inspected):
    entries = inspected("text", data__max_length=5)
    assert [entry["line"] for entry in entries] == [1, 1, 2, 2, 2]
    assert entries[0]["student"]["text"].startswith("it is")
    assert [len(entry["teacher"]["supervised"]) for entry in entries] == [1] * 5


def test_only_the_samples_that_are_shown(inspected):
    assert len(inspected("data", count=3)) == 3


def test_a_cached_teacher_shows_what_it_receives_without_its_cache(material, inspected):
    (entry,) = inspected("talk", teacher__cache={"folder": str(material[0] / "no cache")})
    assert entry["teacher"] == entry["student"]


def test_it_is_what_training_learns(material):
    """Token for token what a run's own steps hold."""
    folder, teacher, _ = material
    plain = tiny.config(folder / "out", folder / "data" / "data.jsonl", teacher)
    inspection = Inspection(RunConfig.model_validate(plain))
    entries = {entry["line"]: entry for entry in inspection.lines()}
    from data.mixture import Mixture

    processors = inspection.processors["student"], inspection.processors["teacher"]
    mixture = Mixture(inspection.sources, batch_size=1)
    decode = processors[0].tokenizer.decode
    for row in range(24):
        step = StepDataset(mixture, Collator(*processors, 64), StepSplit(1))[row]
        line = mixture.samples_of(row)[0][1] + 1
        learnt = [decode(step.batches[0].targets)] if len(step.batches[0].targets) else []
        assert learnt == entries[line].get("student", {"supervised": []})["supervised"]


def test_the_command(material, tmp_path):
    folder, teacher, _ = material
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.config(tmp_path / "out", folder / "data" / "data.jsonl", teacher)))
    done = CliRunner().invoke(app, ["inspect", str(config), "--json", str(tmp_path / "new" / "rows.jsonl")])
    assert done.exit_code == 0
    assert done.stdout == "23 of 24 samples can be used; 1 sample left out: data: not an image (1)\n"
    assert len((tmp_path / "new" / "rows.jsonl").read_text().splitlines()) == 24
    done = CliRunner().invoke(app, ["inspect", str(config), "--json", "-", "--samples", "2"])
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [
        {"source", "line", "student", "teacher"}
    ] * 2
    assert "2 of 2 samples can be used" in done.stderr


def test_the_summary_names_keys_that_nothing_reads(material, tmp_path):
    folder, teacher, _ = material
    (tmp_path / "rated.jsonl").write_text(json.dumps({"question": "say red", "answer": "red", "rating": 5}))
    inspection = Inspection(RunConfig.model_validate(tiny.config(folder / "out", tmp_path / "rated.jsonl", teacher)))
    list(inspection.lines(None))
    assert inspection.summary().splitlines()[1] == "rated: keys rating of its records are ignored"
