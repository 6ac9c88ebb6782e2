"""LoRA on students: what trains, what stays, what is written, and the base as a teacher."""

import json
import sys

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from data.batch import DistillationBatch
from data.collate import collate
from data.encoding import encode_pair
from data.errors import UserError
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.adapters import adapted_layers, plain_state
from vlm_distill.models.lora import WithoutAdapters, add_lora, save_adapter
from vlm_distill.models.teacher import ModelTeacher

EVERY_PART = ("vision_encoder", "projector", "decoder")


@pytest.fixture
def base(tmp_path):
    return tiny.write_teacher(tmp_path / "base")


def adapted(folder, move=True, **options):
    """Load the model in ``folder`` with LoRA; B is not zero."""
    model = load_vlm(folder)
    model.requires_grad_(False)
    torch.manual_seed(3)
    add_lora(model, **{"rank": 2, **options})
    if move:
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.lora_B["default"].weight.normal_(0, 0.3)
    return model.eval()


def logits(model, talk, picture):
    images = [picture()] if model.processor.has_vision else []
    parts = [None, "what color is it ?"] if images else "what color is it ?"
    inputs = model.processor.collate([model.processor.encode(talk(parts, "red"), images)])
    with torch.no_grad():
        hidden = model(inputs, torch.arange(inputs["input_ids"].numel())).hidden
    return model.head.logits(hidden).detach()


def test_only_adapters_train_and_a_new_one_changes_nothing(base, talk, picture):
    model = adapted(base, move=False)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(name.startswith("decoder.model.layers.") for name in adapted_layers(model))
    assert len(adapted_layers(model)) == 3 * 7
    torch.testing.assert_close(logits(model, talk, picture), logits(load_vlm(base), talk, picture), rtol=0, atol=0)


def test_what_trains_whole_goes_on_training(base):
    model = load_vlm(base)
    model.set_trainable(["projector"])
    add_lora(model)
    assert all(p.requires_grad for p in model.projector.parameters())
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 2.0), (8.0, False, 8 / 4), (3.0, True, 3 / 4**0.5)]
)
def test_scale(base, alpha, rslora, scale):
    model = adapted(base, rank=4, alpha=alpha, rslora=rslora)
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {scale}


@pytest.mark.parametrize(
    "options",
    [{}, {"parts": EVERY_PART}, {"target": ["q_proj", "lm_head"], "rslora": True}],
    ids=["decoder", "all", "head"],
)
def test_merged_equals_unmerged(base, talk, picture, tmp_path, options):
    model = adapted(base, **options)
    before, unmerged = logits(load_vlm(base), talk, picture), logits(model, talk, picture)
    assert (unmerged - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "merged")
    merged = load_vlm(tmp_path / "merged")
    assert not adapted_layers(merged)
    torch.testing.assert_close(logits(merged, talk, picture), unmerged, rtol=1e-5, atol=1e-5)
    # Writing changes neither adapters nor base.
    torch.testing.assert_close(logits(model, talk, picture), unmerged, rtol=0, atol=0)
    plain = load_vlm(base).state_dict()
    touched = set(adapted_layers(model))
    for name, tensor in plain_state(model).items():
        assert torch.equal(tensor, plain[name]) == (name.removesuffix(".weight") not in touched), name


def test_every_linear_layer_of_every_part(base):
    names = set(adapted_layers(adapted(base, parts=EVERY_PART)))
    model = load_vlm(base)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == linear - {"decoder.lm_head"}


@pytest.mark.parametrize("whole", [[], ["projector"]])
def test_plain_peft_loads_the_adapter_onto_an_assembled_base(base, talk, picture, tmp_path, whole):
    model = adapted(base, parts=["vision_encoder", "decoder"])
    if whole:
        with torch.no_grad():
            for parameter in model.projector.parameters():
                parameter.add_(0.1)
    wanted = logits(model, talk, picture)
    save_adapter(model, tmp_path / "adapter", str(base), whole=whole)
    plain = load_vlm(base)
    PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain.eval(), talk, picture), wanted, rtol=1e-5, atol=1e-5)
    # Ours, merged; its processor comes from the adapter's folder.
    torch.testing.assert_close(logits(load_vlm(tmp_path / "adapter"), talk, picture), wanted, rtol=1e-5, atol=1e-5)


def test_plain_peft_loads_the_adapter_onto_a_language_model(tmp_path, talk):
    base = tiny.write_language_model(tmp_path / "base")
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter", str(base))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in stored)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert len(settings["target_modules"]) > 2
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    ids = model.processor.encode(talk("what color is it ?", "red"), []).input_ids[None]
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, model.decoder(ids).logits)
    assert peft.peft_config["default"].base_model_name_or_path == str(base)


def test_transformers_own_vlm(tmp_path, talk, picture):
    base = tiny.write_llava(tmp_path / "base", layers=2)
    model = adapted(base, parts=EVERY_PART)
    wanted = logits(model, talk, picture)
    save_adapter(model, tmp_path / "adapter", str(base))
    plain = load_vlm(base)
    PeftModel.from_pretrained(plain.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(plain.eval(), talk, picture), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_vlm(tmp_path / "adapter"), talk, picture), wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_vlm(tmp_path / "merged"), talk, picture), wanted, rtol=1e-5, atol=1e-5)


def batch_of(model, talk, picture) -> DistillationBatch:
    sample = talk([None, "what color is it ?"], "red"), [picture()]
    processors = model.processor, model.processor
    return collate([encode_pair(*sample, *processors, 64)], *processors)


def test_the_base_is_the_teacher_in_one_copy(base, talk, picture):
    model = adapted(base, target=["q_proj", "down_proj", "lm_head"]).train()
    modes = [m.training for m in model.modules()]
    teacher = ModelTeacher(WithoutAdapters(model))
    batch = batch_of(model, talk, picture)
    found = teacher.outputs(batch, ["hidden.1"])
    wanted = ModelTeacher(load_vlm(base)).outputs(batch, ["hidden.1"])
    assert torch.equal(found.targets.hidden, wanted.targets.hidden)
    assert torch.equal(found.features["hidden.1"], wanted.features["hidden.1"])
    head, hidden = found.targets.head, wanted.targets.hidden
    assert torch.equal(head.logits(hidden), wanted.targets.head.logits(hidden))
    assert not torch.equal(model.head.logits(hidden), head.logits(hidden))
    # One copy: the teacher reads the student's own tensors and has none of its own.
    assert not list(teacher.model.parameters())
    with head.weight() as weight:
        assert weight.data_ptr() == model.decoder.lm_head.base_layer.weight.data_ptr()
    # The student keeps its mode, with its adapters on and trained.
    assert model.training
    assert [m.training for m in model.modules()] == modes
    assert not any(layer.disable_adapters for layer in adapted_layers(model).values())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_the_base_answers_as_itself(base, talk, picture):
    model = adapted(base)
    prompts = [(talk([None, "what color is it ?"]), [picture()])]
    plain, teacher = load_vlm(base), WithoutAdapters(model)
    assert teacher.generate(prompts, max_new_tokens=5) == plain.generate(prompts, max_new_tokens=5)
    assert teacher.score_options(prompts, [["red", "no"]]) == plain.score_options(prompts, [["red", "no"]])
    assert model.score_options(prompts, [["red", "no"]]) != plain.score_options(prompts, [["red", "no"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ["q_prj"]}, "no linear layer is called 'q_prj' in these parts; did you mean 'q_proj'"),
        ({"target": ["q_proj"], "parts": ["projector"]}, "no linear layer is called 'q_proj'"),
        ({"target": ["lm_head"], "dropout": 0.1}, "the output layer is read without it"),
    ],
)
def test_layers_that_cannot_have_one(base, options, message):
    with pytest.raises(UserError, match=message):
        adapted(base, **options)


def test_layers_that_peft_refuses():
    decoder = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = build_vlm({"decoder": {"config": decoder}}, tiny.make_tokenizer(tiny.WORDS))
    with pytest.raises(UserError, match=r"peft refuses these layers .*out_proj.*; name others"):
        add_lora(model)


def test_a_tied_output_layer_and_a_part_that_is_not_there():
    model = build_vlm({"decoder": tiny.settings(tied=True)["decoder"]}, tiny.make_tokenizer(tiny.WORDS))
    with pytest.raises(UserError, match="the output layer is tied"):
        add_lora(model, target=["lm_head"])
    with pytest.raises(UserError, match="no projector; it has decoder"):
        add_lora(model, parts=["projector"])


def test_packages_that_are_not_there(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is not installed; install vlm-distill\[lora\]"):
        adapted(base)


def test_adapters_that_cannot_be_read(base, tmp_path):
    model = adapted(base, rank=2)
    save_adapter(model, tmp_path / "adapter", str(base))
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"r": 3}))
    with pytest.raises(UserError, match="does not fit its base"):
        load_vlm(tmp_path / "adapter")
    path.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base"):
        load_vlm(tmp_path / "adapter")
