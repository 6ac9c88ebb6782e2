"""The command line: what a person's mistakes and a person's successes look like from outside."""

import base64
import csv
import inspect
import json
import shutil
import subprocess
import sys
from typing import get_type_hints

import pytest
import tiny
import torch
import typer
import yaml
from safetensors.torch import load_file

from data.errors import UserError
from vlm_distill import cli, train
from vlm_distill.cli.evaluation import RankEvalOptions
from vlm_distill.cli.options import parse
from vlm_distill.demo import make_tokenizer
from vlm_distill.eval import main as evaluate
from vlm_distill.models import build_vlm


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'config'."),
        (["losses", "--bad"], "No such option: --bad"),
        (["losses", "--training.steps"], "No such option: --training.steps"),
        (["eval", "x", "--rules", "mine"], "Invalid value for '--rules': 'mine' is not one of 'vlmevalkit',"),
        (["eval", "x", "--limit", "0"], "Invalid value for '--limit': "),
    ],
)
def test_wrong_options_are_one_line(command, words, says):
    code, _, errors = command(*words)
    assert code == 2
    assert errors.startswith(f"vlm-distill: {says}")
    assert errors.endswith("(--help lists the options)\n")
    assert errors.count("\n") == 1


def test_without_words_the_commands_are_listed(command):
    code, said, _ = command()
    assert code == 0
    assert "inspect" in said
    assert command("-h")[1].strip() == said.strip()


def test_every_command_has_a_short_help_option(command):
    for name in typer.main.get_command(cli.app).commands:
        code, said, errors = command(name, "-h")
        assert (code, errors) == (0, "")
        assert f"vlm-distill {name} " in said


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["train", "run.yaml", "--training.steps", "5"], "training.steps=5"),
        (["train", "run.yaml", "--training.steps=5", "--nproc", "2"], "training.steps=5"),
        (["classify", "run.yaml", "--training.steps", "--nproc", "2"], "training.steps=VALUE"),
        (["plan", "run.yaml", "--loss.0.divergence", "{name: jsd}"], "'loss.0.divergence={name: jsd}'"),
        (["sweep", "run.yaml", "--training.seed", "0,1"], "training.seed=0,1"),
    ],
)
def test_an_override_with_dashes_is_answered_with_the_right_word(command, words, right):
    code, _, errors = command(*words)
    option = words[2].partition("=")[0]
    assert code == 2
    assert errors == f"vlm-distill: {option}: keys of the configuration are given without dashes; write {right}\n"


def write(material, name="run", **changes):
    folder, data, teacher = material
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tiny.config(folder / name, data, teacher, **changes)))
    return path


def test_a_cache_is_filled_and_then_learnt_from(material, command, monkeypatch):
    folder = material[0]
    path, place = write(material, "cached", training__steps=1), f"teacher.cache.folder={folder / 'cache'}"
    code, _, errors = command("cache", path)
    assert code == 2
    assert "no cache to fill; set teacher.cache.folder for the teacher's outputs, or student.vision_cache" in errors
    started = []
    monkeypatch.setattr(cli.training, "launch", lambda *words: started.append(words) or 0)
    assert command("cache", path, place, "--nproc", 2)[0] == 0
    assert started == [("vlm_distill.cache", [str(path), place], 2)]
    # What those processes do.
    assert train.main([str(path), place]) == 2
    assert train.main([str(path), place], trainer="vlm_distill.caching.fill", work="fill") == 0
    assert train.main([str(path), place]) == 0
    assert yaml.safe_load((folder / "cached/config.yaml").read_text())["teacher"]["cache"]["form"] == "hidden"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.stepz=3"], "training.stepz: unknown key; did you mean 'steps'?"),
        (["training.steps=many"], "training.steps"),
        (["training.batch_size=9"], "9 is not divisible"),
        (["loss.0.name=tied"], "did you mean 'taid'?"),
        (["loss.0.t_strat=0.4"], "loss taid has no parameter 't_strat' (did you mean 't_start'?)"),
        (["loss.0.divergence.name=jsdd"], "loss taid: divergence is 'jsdd' (did you mean 'jsd'?)"),
        (["loss.0.divergence={name: jsd, bta: 0.1}"], "divergence jsd has no parameter 'bta'"),
    ],
)
def test_mistakes_found_before_processes_start(material, command, overrides, says):
    code, _, errors = command("train", write(material), *overrides)
    assert code == 2
    assert says in errors
    assert errors.count("\n") == 1


def test_what_starts_ranks_imports_nothing_heavy():
    """The ranks import torch and the rest; imported here too, it would cost seconds and half a gigabyte."""
    program = """
import sys
from vlm_distill.cli import app
from vlm_distill.config.checks import check_caches
from vlm_distill.config.file import load_config
from vlm_distill.losses import available
from vision.config import ClassifierConfig

check_caches(load_config("configs/demo/taid.yaml", ["teacher.cache.folder=cache"]))
load_config("configs/cifar100/resnet56_resnet20/kd.yaml", [], ClassifierConfig)
assert "taid" in available()
heavy = "torch torchvision transformers deepspeed timm open_clip datasets numpy pandas PIL".split()
print([name for name in heavy if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.device=cuda"], "PyTorch finds no CUDA device; use cpu or auto"),
        (["teacher.path=nowhere"], "nowhere"),
        (["loss.0.t_start=7"], "loss taid: t_start is 7; give a number from 0 to 1"),
        (["data.train.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.eval=[{path: DATA}, {path: DATA}]"], "2 sources are called data"),
        (
            ["deepspeed.fp16={enabled: true}"],
            "deepspeed.fp16.enabled: is true, but this run has false by training.dtype",
        ),
        (
            ["student.decoder=null", "student.from_teacher={layers: 9}"],
            "student.from_teacher.layers: 9 layers were asked for",
        ),
    ],
)
def test_mistakes_found_by_a_rank(material, capsys, monkeypatch, overrides, says):
    if "cuda" in overrides[0]:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [word.replace("DATA", str(material[1])) for word in overrides]
    assert train.main([str(write(material)), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_teacher_without_the_students_tokens(material, capsys):
    folder = material[0]
    build_vlm(tiny.settings(), make_tokenizer(["what", "colour"])).save_pretrained(folder / "other")
    make_tokenizer(tiny.WORDS).save_pretrained(folder / "tokenizer")
    words = [f"teacher.path={folder / 'other'}", f"student.tokenizer={folder / 'tokenizer'}"]
    assert train.main([str(write(material)), *words]) == 2
    assert "token" in capsys.readouterr().err


def test_an_adapter_and_its_export(material, command):
    folder, _, teacher = material
    lora = {"rank": 2, "merge": False}
    student = {"path": str(teacher), "lora": lora, "train": ["projector"]}
    config = write(material, "adapter", student=student, training__steps=2, evaluation__teacher=False)
    assert train.main([str(config)]) == 0
    run = folder / "adapter"
    assert {path.name for path in (run / "student").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert command("export", run, folder / "merged")[0] == 0
    (run / "student").rename(run / "elsewhere")
    assert command("export", run, folder / "merged_from_checkpoint")[0] == 0
    one, other = (load_file(folder / name / "model.safetensors") for name in ("merged", "merged_from_checkpoint"))
    base = load_file(teacher / "model.safetensors")
    assert one.keys() == other.keys() == base.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6)
        trained = name.startswith("projector.") or "_proj." in name
        assert torch.equal(tensor, base[name]) != trained, name


def test_from_training_to_an_answer(material, command, capsys):
    folder, data, teacher = material
    config = write(material, "whole", data__eval=[{"path": str(data), "name": "questions"}])
    # What `vlm-distill train` starts, in this process.
    assert train.main([str(config)]) == 0
    run = folder / "whole"
    (run / "student").rename(run / "elsewhere")
    for source, out in ((run, folder / "from_checkpoint"), (run, folder / "half")):
        code, told, _ = command("export", source, out, *(["--dtype", "bf16"] if out.name == "half" else []))
        assert code == 0
        assert str(out) in told.replace("\n", "")
    (run / "elsewhere").rename(run / "student")
    exported = folder / "from_checkpoint" / "model.safetensors"
    assert exported.read_bytes() == (run / "student" / "model.safetensors").read_bytes()
    code, told, _ = command("ask", folder / "half", data.parent / "1.png", "what color is it?", "--teacher", teacher)
    assert code == 0
    assert told.count("%)") == 2
    code, told, _ = command("report", run)
    assert code == 0
    assert "<html" in (run / "report.html").read_text()
    code, told, _ = command("inspect", config, "--samples", "2", "--html", folder / "inspect.html")
    assert code == 0
    assert "what" in told
    assert (folder / "inspect.html").stat().st_size > 1000


def test_evaluate(material, capsys, tmp_path):
    _, data, teacher = material
    words = ["--model", str(teacher), "--data", str(data), "--out", str(tmp_path), "--max-new-tokens", "2"]
    assert evaluate(words) == 0
    assert "on 24 questions" in capsys.readouterr().out
    assert json.loads((tmp_path / "data" / "scores.json").read_text())["n"] == 24
    # Answers are kept, but by another precision the questions are asked again.
    assert evaluate(words) == 0
    assert "data: 24 of 24 answers kept from before" in capsys.readouterr().err
    assert evaluate([*words, "--dtype", "bf16"]) == 0
    assert "kept" not in capsys.readouterr().err
    # With every image outside the root there is nothing to score.
    assert evaluate([*words, "--root", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "24 left out" in told.out
    assert "data: 24 of 24 questions left out, no questions could be used: image outside the roots (24)" in told.err


def test_an_evaluation_that_leaves_out_most_ends_with_the_reason(material, capsys, tmp_path):
    data = tiny.write_data(tmp_path / "data", rows=6, text_only=(0,))
    words = [
        "--model",
        str(material[2]),
        "--data",
        str(data),
        "--images",
        str(tmp_path / "empty"),
        "--max-new-tokens",
        "2",
    ]
    (tmp_path / "empty").mkdir()
    assert evaluate([*words, "--out", str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    assert (
        "data: 5 of 6 questions left out, more than --max-bad 0.5 allows: image not found (5), as in data, line "
        in told
    )
    assert told.rstrip().endswith("; name their folder with --images")
    assert json.loads((tmp_path / "a" / "data" / "scores.json").read_text())["n"] == 1
    assert evaluate([*words, "--out", str(tmp_path / "b"), "--max-bad", "0.9"]) == 0


def test_a_benchmark_without_a_question_that_can_be_asked(material, capsys, tmp_path):
    rows = ["index\timage_path\tquestion\tanswer", *(f"{i}\tgone/{i}.png\twhat color is it?\tred" for i in range(3))]
    (tmp_path / "Colours.tsv").write_text("\n".join(rows) + "\n")
    entry = {"tsv": {"name": "Colours"}, "scorer": "gqa", "metric": "exact match"}
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(entry))
    words = ["--model", str(material[2]), "--benchmarks", str(tmp_path / "colours.yaml"), "--data", str(tmp_path)]
    assert evaluate([*words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "not published" not in told.out
    assert "colours: 3 of 3 questions left out, no questions could be used: image not found (3)" in told.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to ask"),
        (["--benchmarks", "mmstarr"], "did you mean 'mmstar'"),
        (["--benchmarks", "mmstar", "--rules", "official"], "mmstar has no rules 'official'"),
        (["--benchmarks", "mmstar", "--data", "nowhere"], "mmstar: no data in nowhere; put there MMStar.tsv"),
        (["--benchmarks", "mmstar", "--data", "a", "--data", "b"], "the one folder"),
        (["--benchmarks", "mmstar", "--batch-size", "0"], "'--batch-size': Input should be greater than or equal to 1"),
        (["--benchmarks", "mmstar", "--limit", "0"], "'--limit': Input should be greater than or equal to 1"),
        (["--benchmarks", "mmstar", "--limit", "many"], "'--limit': Input should be a valid integer"),
        (
            ["--benchmarks", "mmstar", "--max-new-tokens", "-1"],
            "'--max-new-tokens': Input should be greater than or equal to 1",
        ),
        (["--benchmarks", "mmstar", "--max-length", "0"], "'--max-length': Input should be greater than or equal to 1"),
        (["--benchmarks", "mmstar", "--judge-rate", "0"], "'--judge-rate': 0 is too small"),
        (["--benchmarks", "mmstar", "--dtype", "fp8"], "'--dtype': 'fp8' is not one of 'fp32', 'bf16'"),
        (["--benchmark", "mmstar"], "No such option: --benchmark"),
        (["--data", "d", "--columns", "image"], "'image' is not a mapping; write it as '{name: value}'"),
        (["--data", "d", "--columns", "{image: 3}"], "image: 3 is not a name; put it in quotes"),
        (["--data", "d", "--template-arguments", "{a: [}"], "'{a: [}' is not a mapping"),
        (["--data", "d", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--data", "d", "--judge", "http://j"], "--judge: is about benchmarks (--benchmarks), not data"),
        (["--data", "d", "--teacher-template-arguments", "{a: 1}"], "there is no --teacher"),
        (["--benchmarks", "mmstar", "--teacher", "t"], "--teacher: is about data, not benchmarks"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(words, says, tmp_path, capsys):
    assert evaluate(["--model", "nowhere", "--out", str(tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_the_command_and_the_module_have_the_same_options():
    """Names, defaults and bounds."""
    hints = get_type_hints(cli.evaluation.evaluate, include_extras=True)
    parameters = {
        name: p for name, p in inspect.signature(cli.evaluation.evaluate).parameters.items() if name != "nproc"
    }
    theirs = {name: None if name == "model" else p.default for name, p in parameters.items()}
    bounds = {name: hints[name].__metadata__[0].min for name in parameters}
    options = vars(parse(RankEvalOptions, ["--model", "m"], "evaluate"))
    assert options.keys() == theirs.keys()
    for name, value in options.items():
        if name != "model":
            assert (value or None) == (theirs[name] or None), name
        smallest = bounds[name]
        if smallest is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        words = ["--model", "m", "--benchmarks", "pope", flag]
        assert vars(parse(RankEvalOptions, [*words, str(smallest)], "evaluate"))[name] == smallest
        with pytest.raises(UserError):
            parse(RankEvalOptions, [*words, str(smallest - 1)], "evaluate")


@pytest.mark.parametrize(
    "of_the_other",
    [
        ("--measures", "--teacher", "--columns", "--teacher-template-arguments", "--video-sampling"),
        ("--benchmarks", "--rules", "--score", "--judge"),
    ],
    ids=["benchmarks", "data"],
)
def test_every_option_of_the_command_reaches_the_module(command, monkeypatch, of_the_other):
    started = []
    monkeypatch.setattr(cli.evaluation, "launch", lambda *words: started.append(words) or 0)
    given = {
        "--benchmarks": "pope", "--data": "d", "--rules": "official", "--format": "tsv", "--score": "likelihood",
        "--measures": "kl", "--teacher": "t", "--max-length": "7", "--judge": "http://j", "--judge-model": "q",
        "--judge-rate": "2.5", "--images": "i", "--root": "r", "--out": "o", "--limit": "3", "--batch-size": "2",
        "--max-new-tokens": "9", "--dtype": "bf16", "--columns": "{'q': 'p'}", "--template-arguments": "{'a': 1}",
        "--teacher-template-arguments": "{'b': True}", "--video-sampling": "{'fps': 2}",
    }  # fmt: skip
    given = {flag: text for flag, text in given.items() if flag not in of_the_other}
    assert command("eval", "m", *(word for pair in given.items() for word in pair), "--shard", "--nproc", "2")[0] == 0
    ((_, words, processes),) = started
    parsed = vars(parse(RankEvalOptions, words, "evaluate"))
    assert processes == 2
    for flag, text in given.items():
        value = parsed[flag.removeprefix("--").replace("-", "_")]
        assert [str(value)] == [text] or [*map(str, value)] == [text], flag
    assert parsed["shard"]


def test_a_template_gets_its_arguments_and_answers_are_kept_by_them(material, tmp_path, capsys, command):
    _, data, teacher = material
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    path = next(path for path in model.rglob("chat_template.jinja"))
    path.write_text(path.read_text() + "{% if add_generation_prompt and shout %}!{% endif %}")
    words = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--limit", "2"]
    for given, kept in (("{shout: true}", False), ("{shout: true}", True), ("{shout: false}", False)):
        assert evaluate([*words, "--template-arguments", given]) == 0
        assert ("2 of 2 answers kept" in capsys.readouterr().err) == kept
    asked = json.loads((tmp_path / "out" / data.stem / "predictions.jsonl").read_text().splitlines()[0])
    assert asked["answer"]
    picture = data.parent / "1.png"
    plain, loud = (
        command("ask", model, picture, "what color is it?", "--template-arguments", f"{{shout: {shout}}}")
        for shout in ("false", "true")
    )
    assert (plain[0], loud[0]) == (0, 0)
    assert plain[1] != loud[1]
    code, _, said = command("ask", model, picture, "what?", "--template-arguments", "{shuot: true}")
    assert code == 2
    assert "--template-arguments: the chat template does not read 'shuot'; did you mean 'shout'?" in said


def test_columns_name_the_keys_of_data(material, tmp_path, capsys):
    _, data, teacher = material
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    renamed = [{"p": str(data.parent / line["image"]), "q": "what color is it?", "a": "red"} for line in lines]
    path = tmp_path / "renamed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in renamed))
    words = ["--model", str(teacher), "--data", str(path), "--out", str(tmp_path / "out")]
    assert evaluate([*words, "--columns", "{image: p, question: q, answers: a}"]) == 0
    assert "on 24 questions" in capsys.readouterr().out


def test_evaluate_takes_a_runs_folder(material, capsys, tmp_path):
    _, data, teacher = material
    shutil.copytree(teacher, tmp_path / "run" / "student")
    words = ["--data", str(data), "--out", str(tmp_path / "out"), "--limit", "2"]
    assert evaluate(["--model", str(tmp_path / "run"), *words]) == 0
    assert "on 2 questions, limited: of 24 questions" in capsys.readouterr().out
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.yaml").touch()
    assert evaluate(["--model", str(tmp_path / "begun"), *words]) == 2
    assert "has no student yet" in capsys.readouterr().err


def test_no_benchmark_ends_another(material, tmp_path, capsys):
    _, data, teacher = material
    picture = base64.b64encode((data.parent / "0.png").read_bytes()).decode()
    for name, cell in (("POPE", picture), ("RealWorldQA", base64.b64encode(b"no image" * 9).decode())):
        with (tmp_path / f"{name}.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index", "image", "question", "answer", "category"])
            writer.writerows([i, cell, "what color is it?", "Yes", "random"] for i in range(3))
    (tmp_path / "MMStar.tsv").write_text("index,image,question,A,B,answer\n1,x,y,a,b,A\n")
    words = ["--benchmarks", "mme,mmstar,realworldqa,pope", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert evaluate([*words, "--model", str(teacher), "--limit", "2"]) == 2
    told = capsys.readouterr()
    assert "pope: limited: 2 of 3 questions" in told.out
    assert "right answers are not published" not in told.out
    mme, mmstar, realworldqa = told.err.splitlines()[-3:]
    assert mme.startswith(f"vlm-distill: mme: no data in {tmp_path}")
    assert "separated by tabs" in mmstar
    assert realworldqa.startswith("vlm-distill: realworldqa: 2 of 2 questions left out, no questions could be used")
    assert json.loads((tmp_path / "out" / "pope" / "scores.json").read_text())["n"] == 2
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())["failures"]) == {
        "mme",
        "mmstar",
        "realworldqa",
    }


def test_benchmarks_on_two_processes_equal_one(material, tmp_path, capsys):
    _, data, teacher = material
    with (tmp_path / "MMStar.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "A", "B", "answer", "category", "l2-category"])
        for i in range(11):
            picture = base64.b64encode((data.parent / f"{i}.png").read_bytes()).decode()
            writer.writerow([i, picture, "what color is it?" * (1 + i % 3), "red", "blue", "AB"[i % 2], "c", "d"])
    words = ["--benchmarks", "mmstar", "--data", str(tmp_path), "--batch-size", "3", "--max-new-tokens", "5"]
    assert evaluate([*words, "--model", str(teacher), "--out", str(tmp_path / "one")]) == 0
    told = capsys.readouterr()
    assert "mmstar" in told.out
    assert "md5" in told.err
    # In shards, with answers of different lengths: no rank may leave the others waiting.
    command = [sys.executable, "-m", "vlm_distill.cli", "eval", str(teacher), *words, "--nproc", "2", "--shard"]
    done = subprocess.run([*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ((tmp_path / out / "mmstar" / "predictions.jsonl").read_text().splitlines() for out in ("one", "two"))
    one, two = ([json.loads(line) for line in lines] for lines in (one, two))
    assert len(one) == 11
    for first, second in zip(one, two, strict=True):
        assert second.pop("probability") == pytest.approx(first.pop("probability"), rel=1e-4)
        assert second == first
    summary = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert summary["benchmarks"][0]["benchmark"] == "mmstar"
    assert summary["average"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "nowhere"], "two or more"),
        (["score", "nowhere"], "nowhere: no predictions.jsonl there"),
        (["score", "nowhere", "--rules", "kit"], "--rules: no 'kit'; there are vlmevalkit, lmms-eval, official"),
        (["compare", "nowhere", "else"], "nowhere: no predictions.jsonl there"),
        (["export", "nowhere", "out"], "nowhere: not a run's folder"),
        (["report", "nowhere"], "nowhere"),
        (["ask", "nowhere", "-", "what?"], "nowhere"),
        (["ask", "nowhere", "none.png", "what?"], "none.png"),
        (["ask", "nowhere", "-", "what?", "--video", "none.mp4"], "none.mp4"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_files_that_are_not_there(command, words, says):
    code, _, errors = command(*words)
    assert code == 2
    assert says in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["losses"], ["models"], ["train", "--help"]])
def test_what_teaches(command, words):
    code, told, _ = command(*words)
    assert code == 0
    assert told
