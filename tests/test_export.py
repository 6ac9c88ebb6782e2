"""Exports: others load them without this suite and get the same tokens; the card is what the hub reads; the upload."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.conversation import Conversation
from data.errors import UserError
from vlm_distill import cli
from vlm_distill.demo import make_tokenizer
from vlm_distill.evaluation.predictions import Prediction, write_predictions
from vlm_distill.evaluation.source_scores import wilson_interval
from vlm_distill.export import export_student, push
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.reporting.card import Publication
from vlm_distill.reporting.card_scores import card_scores

CLIP = {
    "source": "transformers",
    "config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "image_size": 28,
        "patch_size": 7,
    },
    "layer": -2,
}

# Run by a Python that cannot import anything of ours: what others do with a folder, as its card says.
ELSEWHERE = """
import json, sys
for ours in ("vlm_distill", "data", "vision"):
    sys.modules[ours] = None
code = sys.argv[1:]
found = {}
for name in code:
    text = open(f"{name}/README.md", encoding="utf-8").read()
    lines = text.split("```python\\n")[1].split("```")[0]
    lines = lines.replace("path/to/this/folder", name).replace("max_new_tokens=64", "max_new_tokens=6")
    scope = {}
    exec(lines, scope)
    found[name] = scope["output"][0, scope["inputs"]["input_ids"].shape[1]:].tolist()
print(json.dumps(found))
"""


def write_run(folder, model, **sections):
    """What a finished run leaves, without the training."""
    model.save_pretrained(folder / "student")
    config = tiny.config(folder, folder / "data.jsonl", folder / "teacher") | sections
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for data, scores in {
        "questions/student": {"n": 12, "exact": 0.75, "soft": 0.8, "interval": list(wilson_interval(0.75, 12))},
        "questions/teacher": {"n": 12, "exact": 0.5, "soft": 0.5},
        "mmstar/student": {"benchmark": "mmstar", "n": 5, "main": 41.5, "metric": "accuracy", "rules": "vlmevalkit"},
    }.items():
        (folder / "evaluation" / data).mkdir(parents=True)
        (folder / "evaluation" / data / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    native = load_vlm(tiny.write_llava(folder / "teacher", layers=2))
    torch.manual_seed(0)
    parts = {**tiny.settings(), "vision_encoder": CLIP}
    composed = build_vlm(parts, tokenizer=make_tokenizer([*tiny.WORDS, "User:", "Assistant:", "What", "this?"]))
    language = load_vlm(tiny.write_language_model(folder / "language_model"))
    tiny._sharpen(composed.decoder)
    models = {"native": native, "composed": composed, "language": language}
    return folder, {name: (write_run(folder / name, model), model) for name, model in models.items()}


def answer(model, sees):
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    conversation = Conversation(
        ({"role": "user", "content": content if sees else [{"type": "text", "text": "Hello"}]},)
    )
    return model.generate([(conversation, [picture()] if sees else [])], max_new_tokens=6)[0].token_ids


def picture():
    # Of the towers' size: two libraries resize a picture alike only to a rounding step.
    return Image.linear_gradient("L").resize((28, 28)).convert("RGB")


def test_others_load_it_and_get_the_same_tokens(runs):
    folder, made = runs
    picture().save(folder / "picture.png")
    exported = {}
    for name, (run, model) in made.items():
        out = export_student(run, folder / f"{name}_out", format="llava" if name == "composed" else "native")
        exported[str(out)] = answer(model.eval(), name != "language")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, *exported]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == exported
    assert all(exported.values())


def test_a_llava_in_bf16(runs, tmp_path):
    """It keeps the type, and its logits are those in float32 but for the rounding of weights and sums."""
    run, model = runs[1]["composed"]
    out = export_student(run, tmp_path / "out", dtype="bf16", format="llava")
    plain = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    processor = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture()], return_tensors="pt").to(torch.bfloat16)
    sample = model.processor.encode(Conversation(tuple(messages)), [picture()], generation=True)
    with torch.no_grad():
        ours = model.eval()(model.processor.collate([sample]), torch.arange(len(sample.input_ids)))
        expected = model.head.logits(ours.hidden)
        got = plain(**inputs).logits[0].float()
    assert len(got) == len(expected)
    difference = (got[:, : expected.shape[1]] - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05


def test_the_card_is_what_the_hub_reads(runs, tmp_path):
    _, made = runs
    run, model = made["composed"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"] = {"path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    config["student"] |= {"decoder": {"name": "HuggingFaceTB/SmolLM2-135M"}, "projector": {"type": "mlp"}}
    config["data"]["train"] = [
        {"path": "TIGER-Lab/Mantis-Instruct", "config": "nlvr2", "split": "train"},
        {"path": "here/own.jsonl", "weight": 0.5},
    ]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = export_student(run, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "vlm-distill"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == ["Qwen/Qwen2.5-VL-7B-Instruct", "HuggingFaceTB/SmolLM2-135M"]
    assert card.data.datasets == ["TIGER-Lab/Mantis-Instruct"]
    assert card.data.license is None
    results = {(r.dataset_name, r.metric_name): r for r in card.data.eval_results}
    exact, main = results[("questions", "exact match")], results[("mmstar", "accuracy")]
    assert (exact.metric_value, exact.metric_args) == (0.75, {"n": 12, "interval_95": [0.4677, 0.9111]})
    assert (main.metric_value, main.metric_args["rules"]) == (41.5, "vlmevalkit")
    text = (out / "README.md").read_text()
    for words in (
        "| taid | 1 | t_start 0.4; by default t_end 1.0, alpha 0.0005,",
        "| cross_entropy | 0.5 |",
        "| TIGER-Lab/Mantis-Instruct | TIGER-Lab/Mantis-Instruct | nlvr2/train | 1 |",
        "| own.jsonl | own.jsonl |  | 0.5 |",
        "steps 5, batch_size 8",
        "lr 0.01, schedule cosine, warmup 0.2",
        "| questions | exact match | 75.00% | 46.77% to 91.11% | 50.00% | 12 |",
        "| mmstar | accuracy | 41.50 |  |  | 5 | vlmevalkit |",
        'vlm-distill ask path/to/this/folder picture.png "What is this?"',
        "# license: yours to choose",
    ):
        assert words in text, text
    loaded = load_vlm(out)
    assert answer(loaded, True) == answer(model.eval(), True)


def test_a_card_says_licence_name_and_further_evaluations(runs, tmp_path):
    run, _ = runs[1]["native"]
    predictions = [answered(index, score) for index, score in enumerate((1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0, 1.0))]
    folder = tmp_path / "scored" / "mmstar"
    folder.mkdir(parents=True)
    write_predictions(folder / "predictions.jsonl", predictions)
    scores = {"benchmark": "mmstar", "n": 8, "main": 68.75, "metric": "accuracy", "rules": "official"}
    (folder / "scores.json").write_text(json.dumps(scores))
    publication = Publication("apache-2.0", "me/student", [tmp_path / "scored"])
    out = export_student(run, tmp_path / "out", publication=publication)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    (main,) = [result for result in card.data.eval_results if result.dataset_name == "mmstar"]
    low, high = main.metric_args["interval_95"]
    assert main.metric_value == 68.75
    assert 25 < low < 60 < 75 < high < 100
    text = (out / "README.md").read_text()
    assert 'from_pretrained("me/student")' in text
    assert "hf download me/student --local-dir path/to/this/folder" in text
    assert text.rstrip().endswith("## Licence\n\napache-2.0")
    with pytest.raises(UserError, match=r"neither a run .* nor an evaluation"):
        export_student(run, tmp_path / "out", publication=Publication(evaluations=[tmp_path / "none"]))


def test_a_language_models_card_has_its_measures(tmp_path):
    folder = tmp_path / "run" / "evaluation" / "text"
    for who, scores in {
        "student": {"n": 9, "perplexity": 5.25, "kl": 0.125, "rouge_l": 0.5},
        "teacher": {"n": 9, "perplexity": 4.0},
    }.items():
        (folder / who).mkdir(parents=True)
        (folder / who / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "run" / "config.yaml").write_text("output: x")
    assert [score.row()[1:6] for score in card_scores(tmp_path / "run")] == [
        ["ROUGE-L", "50.00%", "", "", "9"],
        ["perplexity", "5.25", "", "4.00", "9"],
        ["KL to the teacher, nats a token", "0.12", "", "", "9"],
    ]


def answered(index, score):
    return Prediction(index, "mmstar", index, "q?", ["a"], "a", 1.0, score, score, image=f"{index}.png", score=score)


def test_a_model_of_transformers_is_no_assembled_one(runs, tmp_path):
    _, made = runs
    with pytest.raises(UserError, match="leave --format out"):
        export_student(made["native"][0], tmp_path / "out", format="llava")
    with pytest.raises(UserError, match="--format: 'gguf' is not one of native, llava"):
        export_student(made["native"][0], tmp_path / "out", format="gguf")
    export_student(made["composed"][0], tmp_path / "two")
    with pytest.raises(UserError, match="holds a model in another format"):
        export_student(made["composed"][0], tmp_path / "two", format="llava")


def test_the_upload_is_private_and_whole(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, **o: calls.append((name, o)) or f"https://x/{name}"
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **o: calls.append(o))
    assert push(tmp_path, "me/student") == "https://x/me/student"
    assert calls[0] == ("me/student", {"private": True, "exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("me/student", tmp_path)
    push(tmp_path, "me/student", public=True)
    assert calls[2][1]["private"] is False

    def refuse(**options):
        raise OSError("403 Forbidden\nmore")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"me/student: 403 Forbidden; .* is written"):
        push(tmp_path, "me/student")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--push-to-hub", "me/student"], "no Hugging Face token found"),
        (["--push-to-hub", "student"], "write owner/name"),
        (["--public"], "add --push-to-hub owner/name"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_any_work(words, says, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(sys, "argv", ["vlm-distill", "export", "nowhere", "out", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
