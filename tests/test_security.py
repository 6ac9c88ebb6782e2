"""What comes from outside is data: no pickle runs, no page or card carries its markup, no secret is saved."""

import ast
import json
import os
import pickle
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image

from data.errors import UserError
from data.opening import open_source
from vision.classifier import load_classifier
from vision.weights import read as read_weights
from vlm_distill import train
from vlm_distill.config.confidential import secret_in
from vlm_distill.config.file import load_config, save_config
from vlm_distill.demo import make_tokenizer
from vlm_distill.evaluation.judge import Judge
from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.evaluation.source_scores import write_answers
from vlm_distill.export import export_student
from vlm_distill.models import build_vlm, load_processor, load_vlm
from vlm_distill.models.tokenizer import load_tokenizer
from vlm_distill.reporting.inspection_page import InspectedModel, InspectedSample, render_html
from vlm_distill.reporting.report import write_report
from vlm_distill.reporting.run_card import CardModel, CardRun, run_card
from vlm_distill.runtime import manifest
from vlm_distill.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]

# What may run code, and where it may stand: file, and why.
ALLOWED = {
    ("torch.load", "vlm_distill/training/engine.py"): "DeepSpeed's checkpoints, of the run's own folder alone",
    ("torch.load", "vlm_distill/training/shards.py"): "the same, read on other ranks than those that wrote them",
    ("pickle", "data/plain_pickle.py"): "CIFAR's files, read without calling what they name",
    ("pickle", "data/workers.py"): "what a run's own processes send it, as DataLoader's queues do",
    ("pickle", "vision/weights.py"): "the name of an error",
}


def code_that_may_run_code(tree):
    """(what, line) of every call and import that hands control to data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} & set(names):
                yield "pickle", node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keys = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called.endswith("torch.load") and keys.get("weights_only") != "True":
            yield "torch.load", node.lineno
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield called, node.lineno
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield "pickle.load", node.lineno
        if called.startswith("yaml.") and "load" in called and called != "yaml.safe_load":
            yield "yaml.load", node.lineno
        if keys.get("allow_pickle", "False") != "False" or (called.endswith("np.load") and "allow_pickle" not in keys):
            yield "allow_pickle", node.lineno
        if keys.get("trust_remote_code") == "True":
            yield "trust_remote_code", node.lineno
        if keys.get("shell") == "True":
            yield "shell", node.lineno
        # Transformers asks on the terminal where it is left out, and takes a `y` from a pipe.
        if called.endswith((".from_pretrained", ".from_config")) and "trust_remote_code" not in keys:
            yield "trust_remote_code left out", node.lineno


def test_nothing_runs_what_it_reads():
    found = {}
    for folder in ("data", "vlm_distill", "vision", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for what, line in code_that_may_run_code(ast.parse(path.read_text("utf-8"))):
                found.setdefault((what, name), line)
    assert found.keys() == ALLOWED.keys(), found.keys() ^ ALLOWED.keys()


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(x)", "import pickle", "eval(x)"),
        *("from pickle import loads", "np.load(f)", "np.load(f, allow_pickle=True)", "yaml.load(f, Loader=L)"),
        *("load(x, trust_remote_code=True)", "run(x, shell=True)", "yaml.unsafe_load(f)"),
        *("AutoModel.from_pretrained(x)", "AutoModel.from_config(x, dtype=y)", "kind.from_pretrained(x, **options)"),
    ],
)
def test_the_search_finds_what_it_seeks(line):
    assert list(code_that_may_run_code(ast.parse(line)))


class Bomb:
    """A pickle that leaves a file behind where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_that_are_pickles_run_nothing(tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "model" / "pytorch_model.bin"
    tiny.write_language_model(file.parent)
    (file.parent / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, file)
    for content in (file.read_bytes(), pickle.dumps(Bomb(mark))):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_vlm(file.parent)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match="neither a safetensors file nor tensors"):
            read_weights(file)
        with pytest.raises(UserError):
            open_source(file)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it does bite


def test_code_that_comes_with_data_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(UserError):
        open_source(tmp_path / "data")
    assert not mark.exists()


def as_encoder(folder):
    encoder = {"source": "transformers", "name": str(folder), "pretrained": True}
    return build_vlm({"vision_encoder": encoder, "decoder": tiny.settings()["decoder"]}, make_tokenizer(tiny.WORDS))


def as_new_encoder(folder):
    encoder = {"source": "transformers", "name": str(folder), "image_size": 16}
    return build_vlm({"vision_encoder": encoder, "decoder": tiny.settings()["decoder"]}, make_tokenizer(tiny.WORDS))


def as_zero_shot(folder):
    about = {"vision_cfg": {"layers": 1, "width": 8, "image_size": 8, "patch_size": 4}, "embed_dim": 8}
    about |= {"text_cfg": {"hf_tokenizer_name": "me/tokens", "layers": 1, "width": 8, "heads": 1}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    return load_classifier(str(folder), source="open_clip", classes=["a", "b"])


#: How a foreign folder is used: what reads its code if it may.
USES = {
    "a whole model": load_vlm,
    "a decoder": lambda folder: build_vlm({"decoder": str(folder)}),
    "a vision encoder": as_encoder,
    "a vision encoder with new weights": as_new_encoder,
    "a tokenizer": lambda folder: load_tokenizer(str(folder)),
    "a processor": lambda folder: load_processor(str(folder)),
    "a classifier": as_zero_shot,
}


@pytest.mark.parametrize("use", USES)
def test_code_that_comes_with_a_model_is_not_run_whatever_is_answered(tmp_path, monkeypatch, use):
    """A folder of a model type of its own, with code for every part, and `yes |` before the command."""
    mark, folder = tmp_path / "ran", tiny.write_llava(tmp_path / "model", layers=1)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    parts = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "Processor", "ImageProcessor")
    names = {f"Auto{part}": f"own.{part}" for part in parts} | {"AutoTokenizer": ["own.Tokens", "own.Tokens"]}
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        for key in ("tokenizer_class", "processor_class", "image_processor_type"):
            content.pop(key, None)
        (folder / file).write_text(json.dumps(content | {"model_type": "own", "auto_map": names}))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    with pytest.raises(UserError) as caught:
        USES[use](folder)
    assert "\n" not in str(caught.value)
    assert not asked
    assert not mark.exists()


#: What a foreign folder of an assembled model says to have weights fetched, or a file elsewhere opened.
FOREIGN = {
    "weights of the library": ({"vision_encoder": {"pretrained": True}}, None),
    "an address": (
        {"vision_encoder": {"config": {"pretrained_cfg": {"url": "http://127.0.0.1:9/x"}}}},
        "pretrained_cfg",
    ),
    "an overlay": (
        {"vision_encoder": {"config": {"pretrained_cfg_overlay": {"file": "/x"}}}},
        "pretrained_cfg_overlay",
    ),
    "a checkpoint": ({"vision_encoder": {"config": {"checkpoint_path": "/etc/passwd"}}}, "checkpoint_path"),
    "a cache": ({"vision_encoder": {"config": {"cache_dir": "/x"}}}, "cache_dir"),
    "a value that is a place": ({"vision_encoder": {"config": {"norm_layer": "/etc/passwd"}}}, "norm_layer"),
    "a folder": ({"vision_encoder": {"name": "local-dir:/etc"}}, "must be an architecture of timm"),
    "the hub": ({"vision_encoder": {"name": "hf-hub:me/model"}}, "must be an architecture of timm"),
    "a path": ({"vision_encoder": {"name": "../other"}}, "must be an architecture of timm"),
    "an unknown key": ({"vision_encoder": {"weights": "/x"}}, "unknown key 'weights'"),
    "an unknown part": ({"adapter": {}}, "unknown key 'adapter'"),
    "a tower of timm": (
        {"vision_encoder": {"source": "open_clip", "config": {"vision_cfg": {"timm_model_pretrained": True}}}},
        "would load weights from elsewhere",
    ),
    "a key open_clip lacks": (
        {"vision_encoder": {"source": "open_clip", "config": {"vision_cfg": {"url": "x"}}}},
        "unknown key 'url'",
    ),
    "Transformers without a configuration": (
        {"vision_encoder": {"source": "transformers", "name": "/etc", "config": None}},
        "config is missing",
    ),
    "timm under Transformers": (
        {
            "vision_encoder": {
                "source": "transformers",
                "config": {"model_type": "timm_wrapper", "architecture": "local-dir:/etc"},
            }
        },
        "may not name places outside",
    ),
    "a kernel": ({"decoder": {"attn_implementation": "me/kernel"}}, "code on the hub"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_model_is_built_of_its_own_folder_alone(tmp_path, monkeypatch, kind):
    folder = tiny.write_teacher(tmp_path / "model")
    change, expected = FOREIGN[kind]
    settings = json.loads((folder / "vlm_distill.json").read_text())
    for part, keys in change.items():
        own = settings.setdefault(part, {})
        inner = {
            k: {**(own.get(k) or {}), **v} if isinstance(v, dict) and k == "config" else v for k, v in keys.items()
        }
        if keys.get("source", "timm") != "timm":
            inner["config"] = keys["config"]
        own |= inner
    (folder / "vlm_distill.json").write_text(json.dumps(settings))
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    if expected is None:  # it means nothing there: weights are the folder's
        load_vlm(folder)
        return
    with pytest.raises(UserError, match=expected) as caught:
        load_vlm(folder)
    assert "vlm_distill.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pretrained_cfg": {"url": "http://127.0.0.1:9/x"}}, "pretrained_cfg.url names weights elsewhere"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "pretrained_cfg.file"),
        ({"pretrained_cfg": {"hf_hub_id": "me/model"}}, "pretrained_cfg.hf_hub_id"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"architecture": "hf-hub:me/model"}, "may not name places"),
        ({"pretrained_cfg": []}, "a list where a JSON object"),
    ],
)
def test_a_foreign_classifier_is_built_of_its_own_folder_alone(tmp_path, change, expected):
    load_classifier("test_resnet").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=expected):
        load_classifier(str(tmp_path))


FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json")
FILES += ("processor_config.json", "adapter_config.json", "vlm_distill.json", "model.safetensors.index.json")


@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"', '{"a": ', "", "[" * 100_000, "\udcff", '{"a": "\\ud800'])
@pytest.mark.parametrize("file", FILES)
def test_files_of_another_shape_are_named(tmp_path, file, content):
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=re.escape(file)) as caught:
        load_vlm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"num_hidden_layers": None}),
        ("config.json", {"architectures": 5, "model_type": ["llama"]}),
        ("config.json", {"transformers_weights": "../other.safetensors"}),
        ("generation_config.json", {"eos_token_id": "end"}),
        ("generation_config.json", {"eos_token_id": [[1]]}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"gguf_file": "/etc/hostname"}),
        ("model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": ["a"]}),
        ("model.safetensors.index.json", {}),
    ],
)
def test_values_of_another_type_end_in_one_line(tmp_path, file, change):
    folder = tiny.write_language_model(tmp_path / "model")
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(UserError) as caught:
        load_vlm(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("linked", ["checkpoints", "step_2", "file"])
def test_a_run_resumes_from_its_own_folder_alone(tmp_path, linked):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / "step_2" / "saved").mkdir(parents=True)
    (elsewhere / "step_2" / "saved" / "model.pt").write_bytes(b"a pickle")
    manifest.write(elsewhere / "step_2")
    place = {"checkpoints": "checkpoints", "step_2": "checkpoints/step_2", "file": "checkpoints/step_2/saved/model.pt"}
    link = run / place[linked]
    link.parent.mkdir(parents=True)
    target = {"checkpoints": "", "step_2": "step_2", "file": "step_2/saved/model.pt"}[linked]
    link.symlink_to(elsewhere / target)
    with pytest.raises(UserError, match="leads out of the run's folder"):
        checkpoint.find(run / "checkpoints")
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match="leads out of the run's folder"):
        export_student(run, tmp_path / "exported")
    assert checkpoint.find(elsewhere).path == elsewhere / "step_2"


# Markup.

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}</pre></style><svg onload=alert(3)>"


class Strict(HTMLParser):
    """Refuses what runs or fetches; counts scripts and attacks that are text."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.told = 0, text.count("alert(1)")
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert tag not in ("iframe", "object", "embed", "base", "link", "form", "foreignobject"), tag
        self.scripts += tag == "script"
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name, value)
            if name in ("src", "href", "action", "xlink:href", "data", "formaction"):
                assert value.startswith(("data:image/png", "data:image/jpeg", "#")), (tag, name, value)
            assert not (name == "style" and ("url(" in value or "alert" in value))

    handle_startendtag = handle_starttag


def evil_tree(value):
    """The same shape with every text in it, and keys beside those that are known, turned into an attack."""
    if isinstance(value, dict):
        return {key: evil_tree(inner) for key, inner in value.items()} | {EVIL: EVIL}
    if isinstance(value, list):
        return [evil_tree(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


def test_no_page_carries_what_its_data_say(tmp_path):
    run = tmp_path / EVIL.replace("/", "")
    run.mkdir()
    picture = tmp_path / f"{EVIL.replace('/', '')}.png"
    Image.new("RGB", (8, 8)).save(picture)
    tree = tiny.config(run, tmp_path / "data.jsonl", tmp_path / "teacher")
    (run / "config.yaml").write_text(yaml.safe_dump(evil_tree(tree)))
    lines = [{"kind": "train", "step": i, "loss": 1.0, f"{EVIL}/loss": 1.0 / i, "seconds": i} for i in range(1, 9)]
    lines += [{"kind": "eval", "step": i, "data": EVIL, "exact": 0.5, "seconds": i} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"command": "", "started": "", "device": "", "versions": {}, "problems": {}, "seconds": 5, "steps": 8}
    (run / "summary.json").write_text(json.dumps(evil_tree(summary) | {"parameters": {"student": 5, "teacher": 9}}))
    data = EVIL.replace("/", "")
    for who, right in (("student", 1.0), ("teacher", 0.0)):
        answers = [
            Prediction(i, EVIL, i, EVIL, [EVIL], EVIL, 0.5, right, right, EVIL, [str(picture), EVIL, None][i % 3])
            for i in range(9)
        ]
        write_answers(run / "evaluation" / data / who, answers)
    for runs in ([run], {EVIL: run, "b": run}):
        page = Strict(
            write_report(
                runs, tmp_path / "report.html", title=EVIL, baselines={EVIL: {"n": 9, "exact": 0.5}}
            ).read_text()
        )
        assert page.scripts == 1
        assert page.told > 20
    model = InspectedModel([EVIL] * 3, [True, False, True], [False, False, True], [False, True, False])
    samples = [InspectedSample(EVIL, [Image.new("RGB", (4, 4))], {EVIL: model}, EVIL, [(EVIL, "b")])]
    page = Strict(render_html(samples, tmp_path / "inspect.html").read_text())
    assert page.scripts == 0
    assert page.told > 5


def test_a_card_holds_no_markup_and_no_front_matter_of_others(tmp_path):
    evil = EVIL + "\n---\nlicense: mit\n---\n| a | b |\n# Title"
    run = tmp_path / "run"
    scores = run / "evaluation" / evil.replace("/", "") / "student" / "scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({"n": 5, "main": 3.0, "metric": evil, "rules": evil}))
    (run / "config.yaml").write_text("output: run")  # the folder is a run's, so that its scores are shown
    section = {"name": evil, "path": evil, "split": evil}
    config = {
        "student": {"decoder": section, "train": [evil]},
        "teacher": {"path": evil},
        "data": {"train": [section]},
        "loss": [{"name": evil, evil: evil}],
        "optimizer": {"lr": evil},
        "training": {"dtype": evil},
    }
    card = run_card(CardRun(run, config, [evil]), CardModel(False, 10, "transformers", ["import transformers"]))
    _, front, text = (
        card.split("\n---\n", 2) if card.startswith("\n") else ["", *card.removeprefix("---\n").split("\n---\n", 1)]
    )
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "transformers"
    assert "license" not in facts
    assert facts["model-index"][0]["results"][0]["metrics"][0]["name"] == evil
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("\n# ") == 1
    assert "\nlicense" not in text


# Secrets.

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    "value",
    [
        *("${oc.env:MY_API_KEY}", "${oc.env:HF_TOKEN,none}", "a ${oc.env:DB_PASSWORD} b", "${oc.env: wandb_api_key}"),
        *(TOKEN, "sk-" + "x1" * 20, "http://me:hush@host/data", "https://token@host/x", "s3cr3t-value-of-mine"),
    ],
)
def test_no_secret_enters_a_configuration(tmp_path, monkeypatch, value):
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value-of-mine")
    monkeypatch.setenv("HF_TOKEN", "another-secret-value")
    monkeypatch.setenv("DB_PASSWORD", "third-secret-value")
    plain = tiny.config(tmp_path / "run", tmp_path / "data.jsonl", tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain))
    for key in ("output", "data.train.0.name", "deepspeed.tag", "loss.0.note"):
        for overrides in ([f"{key}='{value}'"], [f"{key}='{value}'", f"{key}=a"]):
            with pytest.raises(UserError, match=f"{key}: holds") as caught:
                load_config(path, overrides)
            assert "secret-value" not in str(caught.value)
            assert TOKEN not in str(caught.value)
    plain["output"] = value
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match="output: holds"):
        load_config(path)


def test_what_is_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "definitely")
    monkeypatch.setenv("DATA_HOME", "/data/of/mine")
    monkeypatch.setenv("SHORT_KEY", "true")
    texts = [
        "definitely",
        "/data/of/mine/x",
        "true",
        "${oc.env:DATA_HOME}",
        "http://host:80/a@b",
        "owner/model",
        "<eos>",
    ]
    assert [text for text in texts if secret_in(text)] == []


def test_a_run_folder_holds_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value-of-mine")
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value-of-mine")
    data, teacher = tiny.write_data(tmp_path / "data", rows=8), tiny.write_teacher(tmp_path / "teacher")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny.config(tmp_path / "run", data, teacher, training__steps=1)))
    assert train.main([str(path)]) == 0
    write_report([tmp_path / "run"])
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8
    assert not [file for file in files if b"s3cr3t-value-of-mine" in file.read_bytes()]
    save_config(load_config(path), tmp_path / "again.yaml")


def test_a_judges_address_has_no_password(tmp_path):
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        Judge("http://me:hush@localhost:8000/v1", "judge", tmp_path / "judge.jsonl")
