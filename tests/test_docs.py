"""What README.md and docs/ tell people to type and to write is what the commands and configurations take.

A comment before a block says what it is where it is no part of a run's configuration (CONTRIBUTING.md):
``<!-- test: in student -->``, ``<!-- test: benchmark -->``, ``<!-- test: sweep -->``, ``<!-- test: skip, REASON -->``.
"""

import argparse
import base64
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pandas
import pytest
import tiny
import typer
import yaml
from run_files import CLASSIFIER, GOOD, write

from vision.config import ClassifierConfig
from vision.evaluate import EvaluateOptions
from vision.train import check
from vlm_distill import cli
from vlm_distill.cli.evaluation import RankEvalOptions
from vlm_distill.cli.options import parse as parse_options
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_lookup import get_benchmark
from vlm_distill.sweeping.sections import SweepSection
from vlm_distill.training.terms import build_terms

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("vlm_distill.", "vision.")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks():
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"(?:<!-- test: (.*?) -->\n)?^```(\w*)\n(.*?)^```", text, re.S | re.M):
            line = text[: match.start(2)].count("\n") + 1
            found.append(Block(page.relative_to(ROOT).as_posix(), line, match[2], match[3], match[1] or ""))
    return [block for block in found if not block.mark.startswith("skip")]


BLOCKS = blocks()
YAML = [block for block in BLOCKS if block.language == "yaml"]


def fragments(text):
    """A block's configurations: one, or where a key stands several times each of its lines, as alternatives."""
    keys = re.findall(r"^(\w+):", text, re.M)
    if len(keys) == len(set(keys)):
        return [text]
    return re.findall(r"^\w+:.*\n", text, re.M)


def inside(section, text):
    """A fragment as a part of a section; one of an assembled model gets the decoder that it needs."""
    content = yaml.safe_load(text)
    if section == "student":
        content = content | {"decoder": {"name": "x"}}
    for key in reversed(section.split(".")):
        content = {key: content}
    return yaml.safe_dump(content)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as the docs' reader has it: the repository's files, and a file of DeepSpeed's."""
    for name in ("configs", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    monkeypatch.chdir(tmp_path)
    for name in ("IMAGENET", "CIFAR100", "CIFAR_TEACHERS"):
        monkeypatch.setenv(name, "/data")
    return tmp_path


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_of_the_docs_is_a_configuration(here, block):
    classifier = "vision" in block.page
    good, kind = (CLASSIFIER, ClassifierConfig) if classifier else (GOOD, RunConfig)
    for number, text in enumerate(fragments(block.text)):
        path = here / f"{number}.yaml"
        if block.mark == "benchmark":
            path.write_text(text)
            assert get_benchmark(str(path)).name
            continue
        if block.mark == "sweep":
            assert SweepSection.model_validate(yaml.safe_load(text)).axes
            continue
        if block.mark.startswith("in "):
            text = inside(block.mark.removeprefix("in "), text)
        changes = {"student": {"path": "x", "lora": {}}} if "from_student" in text else {}
        # What is measured in the docs' examples.
        changes["data"] = good["data"] | {"eval": [{"path": "test", "name": "val"}]}
        write(here, changes, good=good, name="good.yaml")
        path.write_text(text if "base:" in text else f"base: good.yaml\n{text}")
        config = load_config(path, (), kind)
        split_batch(config, 1)
        if not classifier:
            build_terms(config)
        else:
            check([str(path)], 1)


STARTS = re.compile(r"^(vlm-distill|python -m (?:vlm_distill|vision)\.|deepspeed .*--module|torchrun .*-m|srun .*-m)")
#: What stands for something of the reader's own in a line of the docs.
PLACES = {"CONFIG": "my.yaml", "N": "1", "FILE": "x.json"}
PLACES |= dict.fromkeys(("section.key=value", "key=value"), "training.seed=1")


def commands():
    for block in BLOCKS:
        if block.language in ("", "bash", "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if STARTS.match(line):
                    yield block, line


def words_of(line):
    """A line's words, without what is said beside it; what is optional in brackets is given."""
    line = re.split(r"\s+#\s|\s{2,}(?![-\[])", line)[0]
    words = shlex.split(re.sub(r"\[(\S[^\]=]*?(?:=\w+)?[^\]]*)\]", bare, line))
    return [PLACES.get(word, word) for word in words if word != "..."]


def bare(match):
    return match[0] if "{" in match[1] else match[1].replace(" ...", "")


class Parsed(BaseException):
    """A module's arguments were understood."""


@pytest.mark.parametrize(("block", "line"), list(commands()), ids=lambda item: str(item).partition("  ")[0][:90])
def test_commands_of_the_docs_parse(here, monkeypatch, block, line):
    words = words_of(line)
    if words[0] != "vlm-distill":
        at = words.index("--module" if "--module" in words else "-m")
        module, arguments = words[at + 1], words[at + 2 :]
        if module in ("vlm_distill.train", "vlm_distill.cache", "vision.train"):
            return configuration_loads(here, arguments, ClassifierConfig if module == "vision.train" else RunConfig)
        options = {"vlm_distill.eval": RankEvalOptions, "vision.evaluate": EvaluateOptions}
        if module in options:
            parse_options(options[module], arguments, module)
            return None
        parse = argparse.ArgumentParser.parse_args

        def only_parse(self, args=None, namespace=None):
            parse(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")
        return None
    group = typer.main.get_command(cli.app)
    command = group.commands[words[1]]
    context = command.make_context(words[1], words[2:])
    if "config" in context.params:
        overrides = context.params.get("overrides") or []
        kind = ClassifierConfig if words[1] == "classify" else RunConfig
        return configuration_loads(here, [str(context.params["config"]), *overrides], kind)
    return None


def configuration_loads(here, words, kind):
    path, *overrides = words
    if not path.startswith("configs/"):
        copied = "configs/imagenet/resnet34_resnet18/dkd.yaml" if kind is ClassifierConfig else README_COPIES
        Path(path).write_text(f"base: {copied}\n")
    load_config(path, overrides, kind)


@pytest.mark.slow
def test_python_of_the_page_on_python_runs(here):
    miniatures(here)
    tiny.write_llava(here / "models" / "small", layers=2)
    tiny.write_llava(here / "models" / "large", layers=3)
    (here / "data" / "data.jsonl").rename(here / "data" / "train.jsonl")
    namespace = {}
    for block in BLOCKS:
        if block.page == "docs/python.md" and block.language == "python":
            text = re.sub(r"(steps=)500", r"\g<1>2", block.text)
            exec(compile("\n" * block.line + text, block.page, "exec"), namespace)
    assert len(namespace["run"].metrics) >= 2
    assert namespace["scores"]["pope"]["n"] == 2
    assert namespace["trainer"].state.global_step == 2


README_COPIES = "configs/vlm/onevision_to_composed.yaml"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("", "bash", "sh")], ids=str)
def test_files_that_the_docs_name_are_there(block):
    for name in re.findall(r"\b(?:configs|benchmarks|docs)/[\w/.-]+\.(?:yaml|py|sh|md)", block.text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"^make (\S+)", block.text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def first_run():
    """The lines of README's first run, in order; installing and DeepSpeed's own launcher left out."""
    (block,) = [block for block in BLOCKS if block.page == "README.md" and "cp configs/" in block.text]
    lines = [re.split(r"\s+#\s", line)[0] for line in block.text.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith(("pip", "deepspeed"))]


def miniatures(folder):
    """Models, data and benchmarks small enough for the first run; returns what replaces the configuration's own."""
    tiny.write_teacher(folder / "teacher")
    tiny.write_student(folder / "student")
    data = tiny.write_data(folder / "data")
    shutil.copy(folder / "data" / "0.png", folder / "photo.jpg")
    image = base64.b64encode((folder / "photo.jpg").read_bytes()).decode()
    tables = {
        "MMStar": [{"question": "what?", "A": "red", "B": "blue", "C": "green", "D": "black", "answer": "A"}],
        "POPE": [{"question": "is it red?", "answer": "Yes"}, {"question": "is it blue?", "answer": "No"}],
    }
    (folder / "LMUData").mkdir()
    for name, rows in tables.items():
        cells = [{"index": i, "image": image, "category": "c", "l2_category": "l", **row} for i, row in enumerate(rows)]
        pandas.DataFrame(cells).to_csv(folder / "LMUData" / f"{name}.tsv", sep="\t", index=False)
    return {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher"), "dtype": "fp32"},
        "data": {"train": [{"path": str(data)}], "workers": 0, "max_length": 64},
        "training": {"batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "device": "cpu"},
    }


@pytest.mark.slow
def test_the_first_run_of_the_readme_runs(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("LMUData", str(here / "LMUData"))
    own = miniatures(here)
    for words in first_run():
        words = [os.path.expanduser(word) for word in words]
        if words[0] == "cp":
            assert (here / words[1]).is_file()
            (here / words[2]).write_text(yaml.safe_dump({"base": words[1], **own}))
            continue
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, words
    run = here / "runs" / "onevision_to_composed"
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in line]
    assert len(steps) == 100
    assert (run / "student").is_dir()
    assert (here / "samples.html").is_file()
    assert "mmstar" in (here / "runs" / "eval" / "scores.json").read_text().lower()
