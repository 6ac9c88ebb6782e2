"""No configuration, override or file that a person gives ends in a traceback: one line, and exit code 2."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.training.terms import build_terms

VLM = {
    "student": {"path": "student", "lora": {"rank": 4, "parts": ["projector"]}, "train": ["decoder"]},
    "teacher": {"path": "teacher"},
    "loss": [{"name": "taid", "t_start": 0.2}, {"name": "cross_entropy", "weight": 0.5}, {"name": "dkd"}],
    "data": {"train": [{"path": "train.jsonl", "weight": 2}], "eval": [{"path": "e.jsonl"}], "roots": ["a"]},
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99], "schedule": "cosine"},
    "training": {"steps": 10, "batch_size": 64, "micro_batch_size": 8, "seed": 1},
    "deepspeed": {"stage": 2, "zero_optimization": {"overlap_comm": True}},
    "evaluation": {"every": 5, "measures": ["exact"], "benchmarks": ["mmstar"]},
    "output": "runs/x",
}
VISION = {
    "student": {"name": "resnet18", "config": {"a": 1}, "classes": ["a", "b"]},
    "teacher": {"name": "resnet34", "pretrained": True, "mean": [0.5, 0.5, 0.5]},
    "loss": [{"name": "dist"}, {"name": "kd", "temperature": 4, "weight": 0.9, "warmup_epochs": 2}],
    "data": {
        "train": [{"path": "train", "split": "train"}],
        "views": [{"crop": "random_resized", "scale": [0.1, 1]}],
        "mixing": {"mixup": 0.2},
        "erasing": {"probability": 0.1},
    },
    "optimizer": {"name": "sgd", "lr": 0.1, "schedule": "multistep", "milestones": [30, 60]},
    "training": {"epochs": 1.5, "batch_size": 64, "ema": 0.99},
    "evaluation": {"every_epochs": 1},
    "output": "runs/x",
}
BOTH = st.sampled_from([(VLM, RunConfig), (VISION, ClassifierConfig)])
# What stands in the place of a value, as YAML text.
ODD = st.sampled_from(
    """null|true|[]|{}|''|' '|~|0|-1|-0.0|.nan|.inf|-.inf|1e400|1.0e+400|1e-400|0x7fffffffffffffff
123456789012345678901|2024-01-01|2024-13-45
2024-01-01 25:61:00|12:30:45|1_000|0b11|0o17|!!python/object:os.system {}|!!python/name:os.system
!!binary aGk=|!!binary "*"|!!set {a, b}|!!omap [a: 1]|!!timestamp x|!!float x|!!int x|!custom x|"\\ud800"|"\\0"|"a\\nb"
'${oc.env:NOT_THERE_AT_ALL}'|'${oc.env:HF_TOKEN}'|'${output}'|'${a.b.c}'|'${'|'${}'
'${oc.decode:"[["}'|'${nope:1}'|'${.}'
'${..}'|'${oc.create:${data}}'|'${data}'|'???'|[[[[[[]]]]]]|{1: 2}|{null: 1}|{true: x}|{1.5: 1}|{? [a] : b}
{name: {name: {}}}
'../../../etc/passwd'|'/dev/zero'|'http://user:pass@host/x'|'%s%n{}{0}'
'<script>'|"\\e[31m"|all|taid|cross_entropy|a b""".replace("\n", "|").split("|")
)
VALUES = ODD | st.text(max_size=8).map(repr) | st.integers().map(str) | st.floats().map(str) | st.just("9" * 400)
KEYS = st.sampled_from(
    ["weight", "name", "path", "base", "steps", "<<", "1", "null", "stage", "lr", "'a b'", "''", "a.b"]
)


def places(tree, prefix=()):
    yield prefix
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*prefix, key))


class Raw(str):
    """YAML that is written as it is."""


def flow(tree):
    """A tree as YAML in flow style, with raw pieces in it."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {flow(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(flow, tree)) + "]"
    return json.dumps(tree)


def replaced(tree, place, act, key, value):
    """A copy with something done at one place in it."""
    if not place:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    at, *rest = place
    if rest or act == "replace":
        tree[at] = replaced(tree[at], rest, act, key, value)
    elif act == "remove":
        del tree[at]
    elif isinstance(tree, dict):
        tree[key] = value  # one more, or in the place of another
    else:
        tree += [tree[at], value]
    return tree


@st.composite
def documents(draw):
    """A configuration that would do, one to three things in it changed, as text, and its kind."""
    tree, kind = draw(BOTH)
    for _ in range(draw(st.integers(1, 3))):
        if isinstance(tree, Raw):
            break
        place = draw(st.sampled_from(list(places(tree))))
        act = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        tree = replaced(tree, place, act, draw(KEYS), Raw(draw(VALUES)))
    lines = [f"{key}: {flow(value)}" for key, value in tree.items()] if isinstance(tree, dict) else [flow(tree)]
    if draw(st.integers(0, 9)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(SPOILT)))
    return "\n".join(lines), kind


SPOILT = [
    *(
        "\tstudent: {}",
        "student: {}",
        "---",
        "...",
        "%YAML 9.9",
        "? a",
        "- a",
        "&a",
        "*a",
        "a: *a",
        "a: &a [*a]",
        "{",
        "]",
    ),
    *(
        "<<: {training: {steps: 1}}",
        "<<: 5",
        "base: [1, {}]",
        "base: '${x}'",
        "base: ???",
        "base: .",
        "base: [[a]]",
        "@",
    ),
    *(
        "\x00",
        "\x07",
        "\ufeff",
        "a: " + "[" * 400,
        "a: " + "{b: " * 400 + "1" + "}" * 400,
        "x" * 100_000 + ": 1",
        "\x85",
    ),
]
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
LAUGHS += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))


def prepared(path, overrides, kind):
    """As far as the commands go before a model is loaded; whether nothing was wrong."""
    try:
        config = load_config(path, overrides, kind)
        split_batch(config, 1)
        if kind is RunConfig:
            build_terms(config)
    except UserError as mistake:
        told = str(mistake)
    else:
        return True
    assert told
    assert len(told.splitlines()) == 1
    assert len(told) < 2000
    told.encode()
    return False


def fuzzed(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def documents_are_told_apart(document, path):
    text, kind = document
    path.write_bytes(text.encode(errors="surrogatepass"))
    prepared(path, [], kind)


@fuzzed(150)
@given(document=documents())
@example(document=(LAUGHS, RunConfig))
def test_any_document(document, tmp_path_factory):
    documents_are_told_apart(document, tmp_path_factory.getbasetemp() / "fuzz.yaml")


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=documents())
def test_any_document_at_length(document, tmp_path_factory):
    documents_are_told_apart(document, tmp_path_factory.getbasetemp() / "fuzz_slow.yaml")


@pytest.mark.parametrize("text", SPOILT)
def test_each_spoilt_line(tmp_path, text):
    path = tmp_path / "run.yaml"
    for content in (text, f"{yaml.safe_dump(VLM)}\n{text}\n", f"{text}\n{yaml.safe_dump(VLM)}"):
        path.write_text(content)
        prepared(path, [], RunConfig)


@fuzzed(60)
@given(data=st.data())
def test_any_override(data, tmp_path_factory):
    tree, kind = data.draw(BOTH)
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text(yaml.safe_dump(tree))
    keys = st.sampled_from([".".join(map(str, place)) for place in places(tree) if place])
    odd = st.sampled_from(
        ["", ".", "a.", ".a", "loss[0]", "loss[9].x", "loss.x.y", "training.steps.x", "a b", "=", "[", "a\0", "${x}"]
    )
    words = data.draw(
        st.lists(st.tuples(keys | odd, VALUES).map("=".join) | st.text(max_size=10), min_size=1, max_size=3)
    )
    prepared(path, words, kind)


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer.lr=.nan", "optimizer.lr=.inf", "training.steps=1e400", f"training.steps={10**30}"),
        *("loss.1.weight=-1", "loss.1.weight=.nan", "optimizer.betas=[1,1]", "training.seed=-1"),
        *("optimizer.lr=${optimizer.lr}", "data.train.0.weight=.nan", "loss.0.t_start=.nan", "deepspeed.x=.nan"),
    ],
)
def test_numbers_that_are_none(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VLM))
    assert prepared(path, [], RunConfig)
    assert not prepared(path, [override], RunConfig)


@pytest.mark.parametrize(("name", "tree"), [("train", VLM), ("classify", VISION), ("inspect", VLM)])
@pytest.mark.parametrize("mistake", ["training.batch_size=9", "loss.0.name=nope", "traning.steps=3", "output=[", "x"])
def test_commands_tell_mistakes_before_processes_start(command, monkeypatch, tmp_path, name, tree, mistake):
    monkeypatch.setattr("vlm_distill.cli.training.launch", lambda *_: pytest.fail("started"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    words = [mistake, "training.micro_batch_size=8"] if "batch_size" in mistake and name != "inspect" else [mistake]
    code, _, told = command(name, path, *words)
    assert code == 2
    assert len(told.splitlines()) == 1


# Folders and files of other commands.

JUNK = {
    "empty": b"",
    "zeros": bytes(100),
    "text": b"hello\n",
    "latin1": "caf\xe9".encode("latin-1"),
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "object": b"{}",
    "strings": b'{"kind": 5, "step": "x", "problems": "many", "parameters": [1], "versions": 3, "student": 1}',
    "open": b'{"a": [',
    "nested": b"[" * 1_500,
    "nan": b'{"n": NaN, "exact": NaN, "seconds": 1e999}',
    "yaml_tag": b"!!python/object:os.system {}",
    "yaml_tab": b"\tstudent: 1",
    "student_text": b"student: hello\nloss: 5\ndata: x\n",
    "cut": b'\xff\xfe{"a": 1}',
}
FILES = ["config.yaml", "metrics.jsonl", "summary.json", "evaluation/d/student/scores.json"]
FILES += ["evaluation/d/student/predictions.jsonl"]


def one_line(code, _, told, *, may_work=True):
    if code == 0 and may_work:
        return
    assert code == 2, told[-2000:]
    assert len([line for line in told.splitlines() if line]) == 1, told


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("junk", JUNK)
def test_reports_exports_and_comparisons_of_junk(command, tmp_path, name, junk):
    run = tmp_path / "run"
    file = run / name
    file.parent.mkdir(parents=True)
    if name != "config.yaml":
        (run / "config.yaml").write_text(yaml.safe_dump(VLM))
    if "predictions" in name:
        file.with_name("scores.json").write_text('{"n": 1, "exact": 1.0, "by_type": {}}')
    file.write_bytes(JUNK[junk])
    one_line(*command("report", run))
    one_line(*command("export", run, tmp_path / "out"), may_work=False)
    if "predictions" in name:
        one_line(*command("compare", file, file))
        one_line(*command("compare", run, run))


@pytest.mark.parametrize(
    "kind", ["missing", "file", "folder", "empty_file", "pipe", "long", "loop", "nul_bytes", "yaml_folder"]
)
def test_paths_that_lead_nowhere(command, monkeypatch, tmp_path, kind):
    path = tmp_path / "there"
    if kind in ("file", "empty_file", "nul_bytes"):
        path.write_bytes({"file": b"hello", "empty_file": b"", "nul_bytes": bytes(50)}[kind])
    elif kind in ("folder", "yaml_folder"):
        (path / "config.yaml" if kind == "yaml_folder" else path).mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "long":
        path = Path("a" * 300)
    elif kind == "loop":
        path.symlink_to(path)
    monkeypatch.setattr("vlm_distill.cli.training.launch", lambda *_: pytest.fail("started"))
    for words in (
        ["train", path],
        ["classify", path],
        ["inspect", path],
        ["report", path],
        ["export", path, tmp_path / "out"],
        ["compare", path, path],
        ["ask", path, "-", "what?"],
        ["ask", path, path, "what?"],
    ):
        one_line(*command(*words), may_work=False)
    from vlm_distill.eval import main as evaluate

    assert evaluate(["--model", str(path), "--data", str(path), "--out", str(tmp_path / "e")]) == 2
