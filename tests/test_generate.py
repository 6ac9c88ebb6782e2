"""A teacher's answers as data: in the questions' order, nothing twice, nothing lost by a kill, and good to learn."""

import io
import json
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image

from data.sources import open_source
from vlm_distill import generate, train
from vlm_distill.config_file import load_config
from vlm_distill.evaluation import runner
from vlm_distill.launch import launch
from vlm_distill.models import load_vlm

DRAWN = ["--temperature", "1", "--samples", "2", "--max-new-tokens", "24", "--batch-size", "3"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    data = tiny.write_data(folder / "data", rows=12, text_only=(3,), broken=(5,))
    more = folder / "more.jsonl"
    asked = {"messages": [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "no"}] * 2}
    more.write_text(json.dumps(asked) + "\n")
    teacher = tiny.write_teacher(folder / "teacher")
    plain = tiny.config(folder / "run", data, teacher, data__train=[{"path": str(data)}, {"path": str(more)}])
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    return folder / "run.yaml"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_interrupted_and_resumed_equals_straight(config, monkeypatch, capsys):
    straight, resumed = config.with_name("straight.jsonl"), config.with_name("resumed.jsonl")
    assert generate.main([str(config), "--out", str(straight), *DRAWN]) == 0
    told = capsys.readouterr().out
    written = lines(straight)
    assert f"{len(written)} answers" in told
    assert "not an image" in told

    count, add = [0], runner._Journal.add

    def killed(self, *entry):
        add(self, *entry)
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner._Journal, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(config), "--out", str(resumed), *DRAWN])
    monkeypatch.setattr(runner._Journal, "add", add)
    assert not resumed.exists()
    asked = []
    counted = generate._draw
    monkeypatch.setattr(generate, "_draw", lambda *given: asked.append(given[-1]) or counted(*given))
    assert generate.main([str(config), "--out", str(resumed), *DRAWN]) == 0
    assert resumed.read_bytes() == straight.read_bytes()
    assert len(asked) == 10 - 6  # of two samples: four batches of the first source, one of the second
    assert not list(config.parent.glob("*.unfinished"))

    origins = [(line["metadata"]["origin"]["source"], line["metadata"]["origin"]["line"]) for line in written]
    assert origins == sorted(origins)
    assert all(origins.count(origin) <= 2 for origin in origins)
    # What is missing is told, each question once.
    problems = lines(config.with_name("straight.problems.jsonl"))
    assert {problem["reason"] for problem in problems} <= {"not an image", "answer is cut", "empty answer"}
    assert {(p["source"], p["line"]) for p in problems} | set(origins) == {
        *(("data", line) for line in range(1, 13)),
        ("more", 1),
    }
    assert generate.main([str(config), "--out", str(straight), *DRAWN]) == 2
    assert "there already" in capsys.readouterr().err


def test_answers_are_the_models(config):
    out = config.with_name("elsewhere") / "greedy.jsonl"
    teacher = load_config(config).teacher.path
    words = [str(config), "training.device=cpu", "--out", str(out), "--max-new-tokens", "40", "--batch-size", "1"]
    assert generate.main([*words, "--model", teacher]) == 0
    source, model, count = open_source(out), load_vlm(teacher), 0
    for i in range(len(source)):
        conversation = source[i]
        (answer,) = model.generate([(conversation, [Image.open(p) for p in conversation.images])], max_new_tokens=40)
        assert conversation.references == [answer.text]
        assert answer.complete
        count += 1
    assert count


def test_images_that_are_no_files_become_some(config, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "png")
    options = type("Options", (), {"out": tmp_path / "a.jsonl", "samples": 1, "max_new_tokens": 1, "temperature": 0})
    writer = generate._Writer(options, [], "")
    names = {writer._image(buffer.getvalue()), writer._image(Image.new("RGB", (3, 2), (9, 8, 7)))}
    assert len(names) == 1  # one picture, one file
    assert Image.open(tmp_path / names.pop()).getpixel((0, 0)) == (9, 8, 7)


def test_a_student_learns_from_them(config):
    out = config.with_name("sequence.jsonl")
    assert generate.main([str(config), "--out", str(out), *DRAWN]) == 0
    changes = [
        f"data.train=[{{path: {out}}}]",
        "data.answers=last",
        "loss=[{name: cross_entropy}]",
        "training.steps=30",
    ]
    assert train.main([str(config), *changes, f"output={config.with_name('sequence')}"]) == 0
    told = [line for line in lines(config.with_name("sequence") / "metrics.jsonl") if line["kind"] == "train"]
    assert told[-1]["loss"] < 0.9 * told[0]["loss"]
    assert not Path(config.with_name("sequence"), "problems.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--samples", "2"], "set a --temperature"),
        (["teacher=null", "loss=[{name: cross_entropy}]"], "name a model (--model)"),
    ],
)
def test_mistakes_are_told(config, capsys, words, says):
    assert generate.main([str(config), *words, "--out", str(config.with_name("x.jsonl"))]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(config):
    one, two = config.with_name("one.jsonl"), config.with_name("two.jsonl")
    for nproc, out in ((1, one), (2, two)):
        assert launch("vlm_distill.generate", [str(config), "--out", str(out), *DRAWN], nproc) == 0
    assert two.read_bytes() == one.read_bytes()
    shard = ["teacher.placement=shard", "--out", str(config.with_name("shard.jsonl"))]
    assert launch("vlm_distill.generate", [str(config), *shard, *DRAWN], 2) == 0
    assert config.with_name("shard.jsonl").read_bytes() == one.read_bytes()
