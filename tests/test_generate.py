"""A teacher's answers as data: in the questions' order, nothing twice, nothing lost by a kill, and good to learn."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image
from scoring_server import serving

from data.opening import open_source
from vlm_distill import generate, train
from vlm_distill.config.file import load_config
from vlm_distill.evaluation.kept_answers import AnswerStore
from vlm_distill.models import load_vlm
from vlm_distill.runtime.launch import launch

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


def interrupt(monkeypatch, batches, *words):
    """Starts the command, and interrupts it when so many batches are on the disk."""
    count, add = [0], AnswerStore.add

    def counted(self, *entry):
        add(self, *entry)
        count[0] += 1
        if count[0] == batches:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "add", counted)
        with pytest.raises(KeyboardInterrupt):
            generate.main(list(words))


def test_interrupted_and_resumed_equals_straight(config, monkeypatch, capsys):
    straight, resumed = config.with_name("straight.jsonl"), config.with_name("resumed.jsonl")
    assert generate.main([str(config), "--out", str(straight), *DRAWN]) == 0
    told = capsys.readouterr().out
    written = lines(straight)
    assert f"{len(written)} answers" in told
    assert "not an image" in told

    interrupt(monkeypatch, 6, str(config), "--out", str(resumed), *DRAWN)
    assert not resumed.exists()
    asked = []
    counted = generate._Drawing.generate
    monkeypatch.setattr(
        generate._Drawing, "generate", lambda *given, **options: asked.append(given) or counted(*given, **options)
    )
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
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["data", "template"])
def test_answers_to_other_questions_are_not_gone_on_with(tmp_path, monkeypatch, changed):
    data, teacher = tiny.write_data(tmp_path / "data", rows=9), tiny.write_teacher(tmp_path / "teacher")
    config, name = tmp_path / "run.yaml", "out.jsonl"
    config.write_text(yaml.safe_dump(tiny.config(tmp_path / "run", data, teacher)))
    words = [str(config), *DRAWN, "--out"]
    interrupt(monkeypatch, 4, *words, str(tmp_path / name))  # nine answers are whole, three of the second sample
    if changed == "data":
        rows = data.read_text().splitlines()[1:]
        rows[0] = rows[0].replace("what color is it?", "what is it? color")
        data.write_text("\n".join(rows) + "\n")
    else:
        said = load_vlm(teacher).processor.tokenizer.chat_template
        (tmp_path / "other.jinja").write_text("no " + said)
        words[1:1] = [f"teacher.chat_template={tmp_path / 'other.jinja'}"]
    for out in (name, "straight.jsonl"):
        assert generate.main([*words, str(tmp_path / out)]) == 0
    assert (tmp_path / name).read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


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


def test_no_two_write_the_same_file(config, capsys):
    out = config.with_name("taken.jsonl")
    folder = out.with_name("taken.jsonl.unfinished")
    folder.mkdir()
    lock = f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen([sys.executable, "-c", lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert generate.main([str(config), "--out", str(out), *DRAWN]) == 2
        other.stdin.close()
    assert "another run is writing there" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(config):
    one, two = config.with_name("one.jsonl"), config.with_name("two.jsonl")
    for nproc, out in ((1, one), (2, two)):
        assert launch("vlm_distill.generate", [str(config), "--out", str(out), *DRAWN], nproc) == 0
    assert two.read_bytes() == one.read_bytes()
    shard = ["teacher.placement=shard", "--out", str(config.with_name("shard.jsonl"))]
    assert launch("vlm_distill.generate", [str(config), *shard, *DRAWN], 2) == 0
    assert config.with_name("shard.jsonl").read_bytes() == one.read_bytes()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run whose teacher Transformers has a class for, as servers do; some rows have a picture, one a broken one."""
    folder = tmp_path_factory.mktemp("served")
    data = tiny.write_data(folder / "data", rows=12, text_only=(0, 1, 2, 3), broken=(5,))
    teacher = tiny.write_llava(folder / "teacher", 2)
    plain = tiny.config(folder / "run", data, teacher, loss=[{"name": "cross_entropy"}], student={"path": str(teacher)})
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    return folder / "run.yaml"


@pytest.fixture
def server(seen, monkeypatch):
    monkeypatch.setattr("vlm_distill.endpoint._LONGEST_WAIT", 0.01)
    with serving(load_vlm(load_config(seen).teacher.path, dtype="float32").eval()) as server:
        yield server


def there(server, seen, out, *words):
    where = f"teacher.server={{url: '{server.url}', model: teacher-1, workers: 4}}"
    return [str(seen), where, "--out", str(seen.with_name(out)), "--max-new-tokens", "24", *words]


def test_a_server_answers_as_the_model_does(seen, server):
    server.delay = 0.1
    assert generate.main(there(server, seen, "there.jsonl")) == 0
    assert generate.main([str(seen), "--out", str(seen.with_name("here.jsonl")), "--max-new-tokens", "24"]) == 0
    answers = lines(seen.with_name("there.jsonl"))
    assert answers == lines(seen.with_name("here.jsonl"))
    assert {bool(line["images"]) for line in answers} == {True, False}
    assert lines(seen.with_name("there.problems.jsonl")) == lines(seen.with_name("here.problems.jsonl"))
    assert server.most == 4
    asked = [body for body in server.bodies if "prompt_logprobs" not in body]
    assert sum("messages" in body for body in asked) == 7
    assert sum("prompt" in body for body in asked) == 4
    assert all((body["temperature"], body["top_p"], body["max_tokens"]) == (0, 1, 24) for body in asked)


def test_a_server_is_asked_again_only_for_what_is_missing(seen, server, monkeypatch):
    drawn = ["--temperature", "1", "--samples", "2"]
    assert generate.main(there(server, seen, "straight.jsonl", *drawn)) == 0
    before = len(server.bodies)
    interrupt(monkeypatch, 15, *there(server, seen, "resumed.jsonl", *drawn))
    assert generate.main(there(server, seen, "resumed.jsonl", *drawn)) == 0
    assert seen.with_name("resumed.jsonl").read_bytes() == seen.with_name("straight.jsonl").read_bytes()
    assert len({line["messages"][-1]["content"][0]["text"] for line in lines(seen.with_name("straight.jsonl"))}) > 2
    # 22 questions, two tries of the server's tokenizer, and at most four that were under way.
    assert 24 <= len(server.bodies) - before <= 28


@pytest.mark.slow
def test_two_ranks_ask_what_one_asks(seen, server):
    assert generate.main(there(server, seen, "one.jsonl")) == 0
    before = len(server.bodies)
    assert launch("vlm_distill.generate", there(server, seen, "two.jsonl"), 2) == 0
    assert seen.with_name("two.jsonl").read_bytes() == seen.with_name("one.jsonl").read_bytes()
    assert len(server.bodies) - before == 11 + 2


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(seen, server):
    server.delay = 0.3
    assert generate.main(there(server, seen, "whole.jsonl")) == 0
    before = len(server.bodies)
    words = there(server, seen, "killed.jsonl")
    process = subprocess.Popen([sys.executable, "-m", "vlm_distill.generate", *words])
    while len(server.bodies) < before + 9:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not seen.with_name("killed.jsonl").exists()
    assert generate.main(words) == 0
    assert seen.with_name("killed.jsonl").read_bytes() == seen.with_name("whole.jsonl").read_bytes()
    assert len(server.bodies) - before <= 11 + 4 + 2


def test_what_a_server_does_not_answer_is_counted(seen, server, capsys):
    data = seen.with_name("odd.jsonl")
    talks = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": "no"}] for asked in ("no", "say red")
    ]
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    ids = load_vlm(load_config(seen).teacher.path).processor.tokenizer("say red")["input_ids"]
    for status, reason in ((400, "server refuses the question"), (500, "server fails")):
        server.refused = {", ".join(map(str, ids)): status}
        assert generate.main(there(server, seen, f"odd{status}.jsonl", f"data.train=[{{path: {data}}}]")) == 0
        problems = lines(seen.with_name(f"odd{status}.problems.jsonl"))
        # The other one's answer is cut.
        assert [(p["line"], p["reason"]) for p in problems] == [(2, reason), (1, "answer is cut")]
        assert "as the test wants" in problems[0]["detail"]
        assert f"{reason} (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "held", "says"),
    [
        (401, "stop_token_ids", "teacher.server: http.* refuses: HTTP 401"),
        (503, "stop_token_ids", "did not answer in 6 tries, the last: HTTP 503 .*; start again when it does"),
        (500, "temperature", "HTTP 500"),  # whatever it is asked
    ],
)
def test_a_server_in_trouble_ends_the_command_in_one_line(seen, server, capsys, status, held, says):
    server.refused = {held: status}
    out = f"trouble{status}.jsonl"
    assert generate.main(there(server, seen, out)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlm-distill:")]
    assert re.search(says, line)
    server.refused = {}
    assert generate.main(there(server, seen, out)) == 0
