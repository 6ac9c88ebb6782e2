"""What README.md and docs/ tell people to type and to write is what the commands and configurations take.

Every block is tried: YAML is a valid configuration, commands parse with the real options, Python runs on miniatures. A
comment before a block says what it is where it is no part of a run's configuration (CONTRIBUTING.md):
``<!-- test: in student -->``, ``<!-- test: benchmark -->``, ``<!-- test: sweep -->``; or why it is not tried:
``<!-- test: skip, needs a GPU -->``, ``<!-- test: skip, output -->``. Links and anchors are checked too, and that the
site's navigation has every page. ``<!-- test: file NAME -->`` is a module of the reader's own.
"""

import argparse
import base64
import json
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
import torch
import typer
import yaml
from run_files import CLASSIFIER, GOOD, write

from data.opening import open_source
from vision.config import ClassifierConfig
from vision.evaluate import EvaluateOptions
from vlm_distill import cli, losses
from vlm_distill.cli.evaluation import RankEvalOptions
from vlm_distill.cli.options import parse as parse_options
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config
from vlm_distill.config.kinds import kind_of
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_lookup import get_benchmark
from vlm_distill.evaluation.scoring.scorers import score
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
        for match in re.finditer(r"(?:^ *<!-- test: (.*?) -->\n)?^ *```(\w*)\n(.*?)^ *```", text, re.S | re.M):
            line = text[: match.start(2)].count("\n") + 1
            found.append(Block(page.relative_to(ROOT).as_posix(), line, match[2], match[3], match[1] or ""))
    return found


ALL_BLOCKS = blocks()
BLOCKS = [block for block in ALL_BLOCKS if not block.mark.startswith("skip")]
SHELL = ("", "bash", "sh")
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
    # What a plug-in's import and a program change.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(losses.PLUGINS, "_registered", {})
    for block in BLOCKS:
        if block.mark.startswith("file "):
            (tmp_path / block.mark.removeprefix("file ")).write_text(block.text)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(f"{tmp_path}/"):
            del sys.modules[name]


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


STARTS = re.compile(r"^(vlm-distill|python -m (?:vlm_distill|vision)\.|deepspeed .*--module|torchrun .*-m|srun .*-m)")
#: What stands for something of the reader's own in a line of the docs.
PLACES = {"CONFIG": "my.yaml", "N": "1", "FILE": "x.json"}
PLACES |= dict.fromkeys(("section.key=value", "key=value"), "training.seed=1")


def lines_of(block):
    """A shell block's lines, those that a backslash continues joined."""
    return [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]


def commands():
    for block in BLOCKS:
        if block.language in SHELL:
            for line in lines_of(block):
                if STARTS.match(line):
                    yield block, line


def words_of(line):
    """A line's words, without what is said beside it; what is optional in brackets is given."""
    line = re.split(r"\s+[#>]\s|\s{2,}(?![-\[])", line)[0]
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
        if words[1] == "plan" and context.params["config"].is_file():
            kind = kind_of(context.params["config"])
        return configuration_loads(here, [str(context.params["config"]), *overrides], kind)
    return None


def configuration_loads(here, words, kind):
    path, *overrides = words
    if not path.startswith("configs/"):
        copied = "configs/imagenet/resnet34_resnet18/dkd.yaml" if kind is ClassifierConfig else README_COPIES
        Path(path).write_text(f"base: {copied}\n")
    load_config(path, overrides, kind)


def run_python(here, page, namespace):
    """Run a page's blocks one after the other, as a reader does; long runs are cut short."""
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            text = block.text.replace("/data/LMUData", str(here / "LMUData"))
            text = text.replace("steps=500", "steps=2").replace(
                '{"train": 4000, "test": 400}', '{"train": 60, "test": 4}'
            )
            exec(compile("\n" * block.line + text, block.page, "exec"), namespace)
    return namespace


#: Pages whose Python trains, in `test_python_that_trains_runs`.
TRAINING_PAGES = ("README.md", "docs/index.md", "docs/python.md")


@pytest.mark.slow
def test_python_that_trains_runs(here):
    miniatures(here)
    tiny.write_llava(here / "models" / "small", layers=2)
    tiny.write_llava(here / "models" / "large", layers=3)
    (here / "data" / "data.jsonl").rename(here / "data" / "train.jsonl")
    found = {page: run_python(here, page, {}) for page in TRAINING_PAGES}
    assert all(len(namespace["run"].metrics) >= 2 for namespace in found.values())
    assert found["README.md"]["scores"]["pope"]["n"] == 2
    assert found["docs/python.md"]["trainer"].state.global_step == 2


def of_evaluation(here):
    """What the page's reader has: rows with answers, a model, a source, a folder, and answers of two models."""
    from data.opening import open_source
    from vlm_distill.models import load_vlm

    miniatures(here)
    row = {"index": 1, "question": "what?", "A": "red", "B": "blue", "answer": "A", "prediction": "A", "category": "c"}
    rows = [row | {"l2-category": "l", "split": "dev"}]
    written = here / "answers" / "predictions.jsonl"
    names = {"folder": here / "answers", "a": written, "b": written}
    return {"rows": rows, "model": load_vlm(here / "student"), "source": open_source(here / "data/data.jsonl"), **names}


def of_models(here):
    """What the page's reader has: a trained student and a picture."""
    tiny.write_student(here / "runs" / "first" / "student")
    tiny.write_data(here / "data")
    shutil.copy(here / "data" / "0.png", here / "cat.jpg")
    return {}


def of_losses(here):
    (here / "tests").symlink_to(ROOT / "tests")
    return {}


def of_plugins(here):
    sys.path.append(str(here))  # as a notebook and pytest do
    return {}


#: Pages with other Python, and what makes the things that their blocks name.
READERS = {
    "docs/evaluation.md": of_evaluation,
    "docs/first_pair.md": lambda here: {},
    "docs/losses.md": of_losses,
    "docs/models.md": of_models,
    "docs/plugins.md": of_plugins,
    "docs/taid.md": of_losses,
}


@pytest.mark.parametrize("page", READERS)
def test_python_of_other_pages_runs(here, page):
    run_python(here, page, READERS[page](here))


def test_plug_ins_of_the_docs_work(here):
    page = run_python(here, "docs/plugins.md", of_plugins(here))
    page["test_hellinger"]()
    assert "hellinger" in losses.available()

    rows = [{"picture": "7.png", "ask": ["how many?", "which?"], "say": ["two", "the left one"]}]
    (here / "records.jsonl").write_text("".join(json.dumps(row) for row in rows))
    sample = open_source(here / "records.jsonl", layout="my_data:read_record")[0]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 2
    scores = score(get_benchmark("my_benchmarks:CHARTS").scorer, [{"prediction": " Red", "answer": "red"}])
    assert scores.main == 100

    cooling = losses.build("ramps:Cooling", start=3)
    cooling.update({}, losses.Progress(step=1, steps=4))
    assert cooling.metrics() == {"temperature": 2}
    student, teacher = torch.randn(2, 3, 7)
    torch.testing.assert_close(cooling(student, teacher), losses.build("forward_kl", temperature=2)(student, teacher))


def test_python_is_tried_on_every_page():
    assert {b.page for b in BLOCKS if b.language == "python"} == {*READERS, *TRAINING_PAGES}


REASONS = ("needs ", "output", "part of ", "an example of style")


def test_blocks_that_are_not_tried_say_why():
    skipped = [block for block in ALL_BLOCKS if block not in BLOCKS]
    assert [str(b) for b in skipped if not b.mark.removeprefix("skip, ").startswith(REASONS)] == []
    assert [str(b) for b in BLOCKS if b.language not in (*SHELL, "yaml", "python", "json")] == []


def is_tried(line):
    """Whether a shell line is tried: its command parses, or what it names is there."""
    if not line or line.startswith(("#", "make ")) or STARTS.match(line):
        return True  # targets of make are looked up with the files
    words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
    project = (ROOT / "pyproject.toml").read_text()
    if words[:2] == ["pip", "install"]:
        extras = [re.fullmatch(r"(?:-e|\.|vlm-distill(?:\[(\w[\w-]*)\])?)", word) for word in words[2:]]
        return all(found and (not found[1] or f"\n{found[1]} = [" in project) for found in extras)
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text()
        return all(f'"{word}"' in source for word in words if word.startswith("--"))
    if words[0] in ("bash", "cp"):
        return (ROOT / words[1]).exists()
    return words[0] == "export"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL], ids=str)
def test_every_line_of_shell_is_tried(block):
    assert [line for line in lines_of(block) if not is_tried(line)] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json_of_the_docs_is_json(block):
    for line in lines_of(block):
        assert json.loads(line.replace("…", '"": 0'))


README_COPIES = "configs/vlm/onevision_to_composed.yaml"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in SHELL], ids=str)
def test_files_that_the_docs_name_are_there(block):
    for name in re.findall(r"\b(?:configs|benchmarks|docs)/[\w/.-]+\.(?:yaml|py|sh|md)", block.text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"^make (\S+)", block.text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


def first_run():
    """The lines of README's first run, in order; installing and DeepSpeed's own launcher left out."""
    (block,) = [block for block in BLOCKS if block.page == "README.md" and "vlm-distill configs" in block.text]
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
        "data": {"train": [{"path": str(data)}], "eval": [{"path": str(data)}], "workers": 0, "max_length": 64},
        "training": {"batch_size": 4, "micro_batch_size": 2, "dtype": "fp32", "device": "cpu"},
    }


@pytest.mark.slow
def test_the_first_run_of_the_readme_runs(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("LMUData", str(here / "LMUData"))
    own = miniatures(here)
    for words in first_run():
        words = [os.path.expanduser(word) for word in words]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, words
        if words[1] == "configs":
            (here / words[3]).rename(here / "copied.yaml")
            (here / words[3]).write_text(yaml.safe_dump({"base": "copied.yaml", **own}))
    run = here / "runs" / "onevision_to_composed"
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in line]
    assert len(steps) == 100
    assert (run / "student").is_dir()
    assert (here / "samples.html").is_file()
    assert "mmstar" in (here / "runs" / "eval" / "scores.json").read_text().lower()


def of_the_pair(here, monkeypatch):
    """Run the commands of the page on a pair up to the real names, its training cut short, on one process."""
    for block in BLOCKS:
        if block.page != "docs/first_pair.md" or block.language == "python":
            continue
        if "charts" in block.text or "Qwen" in block.text:
            return
        if block.language == "yaml":
            (here / "shapes.yaml").write_text(
                block.text.replace("steps: 300, batch_size: 64", "steps: 2, batch_size: 4")
            )
            continue
        for line in lines_of(block):
            words = shlex.split(line.replace("--nproc 2", "--nproc 1"))
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code, line


@pytest.mark.slow
def test_the_page_on_a_pair_runs_from_pictures_to_an_exported_student(here, monkeypatch):
    (here / "configs").unlink()  # as outside the repository: the page's first command copies them
    run_python(here, "docs/first_pair.md", {})
    of_the_pair(here, monkeypatch)
    assert (here / "samples.html").is_file()
    assert (here / "runs" / "shapes" / "report.html").is_file()
    assert (here / "student" / "model.safetensors").is_file()


def anchors_of(page):
    """The anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    found = set()
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found | set(re.findall(r'<a id="([\w-]+)">', text))


LINKING = [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors_of(file), link


def test_the_site_has_every_page(monkeypatch):
    """What `make docs` would refuse: pages that the navigation lacks, and names in it that are no page."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import build

    navigation = build.read_navigation()
    made = {name for name in build.named_in(navigation) if name.startswith("reference/")}
    build.check_navigation(navigation, {*build.pages().values(), *made})
    with pytest.raises(build.SiteError, match=r"nav lacks new\.md"):
        build.check_navigation(navigation, {*build.pages().values(), *made, "new.md"})
