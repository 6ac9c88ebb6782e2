"""Models in fewer bits: what is stored, how inexact it is, and one as a teacher."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from data.conversation import Conversation
from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.models.common import count_parameters
from vlm_distill.models.quantize import quantization
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

# Bytes of a weight, and the largest error of such a model's logits, relative to their spread.
KINDS = {"int8": (1, 0.1), "nf4": (0.5, 0.5), "fp8": (1, 0.3)}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    # Some CPUs' kernels take weights of four bits in blocks of 32 by 64.
    return tiny.write_llava(tmp_path_factory.mktemp("llava"), layers=3, size=128)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A model wide enough for the blocks of weights that share a scale."""
    folder = tiny.write_language_model(tmp_path_factory.mktemp("language"))
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder, kind=None, dtype=torch.bfloat16):
    if kind == "fp8":
        pytest.importorskip("torchao")
    return load_vlm(folder, dtype=dtype, quantize=kind and quantization(kind, dtype, "teacher"))


def linear(model):
    return model.decoder.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_bits_and_nearly_the_same_logits(language, kind, dtype):
    size, limit = KINDS[kind]
    whole, less = loaded(language, dtype=dtype), loaded(language, kind, dtype)
    stored = getattr(linear(less), "qdata", linear(less))  # torchao's tensor wraps the stored one
    assert stored.numel() * stored.element_size() == size * linear(whole).numel()
    talk = Conversation(({"role": "user", "content": [{"type": "text", "text": "what color is it"}]},))
    inputs = whole.processor.collate([whole.processor.encode(talk, [], generation=True)])
    positions = torch.arange(inputs["input_ids"].numel())
    with torch.no_grad():
        expected = whole.head.logits(whole(inputs, positions).hidden)
        logits = less.head.logits(less(inputs, positions).hidden)
    assert count_parameters(less.parts) == count_parameters(whole.parts)
    assert not torch.equal(logits, expected)
    assert (logits - expected).abs().max() < limit * expected.std()


def losses(folder, teacher, student, stops=(None,), on_policy=None, **changes):
    """Train two steps that barely move the student; with ``stops`` the run is restarted after each."""
    data = tiny.write_data(folder / "data")
    more = {"loss": [{"name": "forward_kl"}], "training__steps": 2, "optimizer__lr": 1e-4}
    plain = tiny.config(folder / "run", data, teacher, student=student, **more)
    plain["teacher"] |= changes
    plain["on_policy"] = on_policy
    processes = Processes("cpu")
    for stop in stops:
        Trainer(RunConfig.model_validate(plain), processes).run(stop)
    processes.close()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_fewer_bits(llava, tmp_path, kind):
    if kind == "fp8":
        pytest.importorskip("torchao")
    # The student has the teacher's weights, so they differ by rounding alone.
    assert all(0 < loss < 0.05 for loss in losses(tmp_path, llava, {"path": str(llava)}, quantize=kind))


def test_adapters_on_a_student_of_four_bits(llava, tmp_path):
    lora = {"rank": 2, "target": ["q_proj", "down_proj"], "merge": False}
    student = {"path": str(llava), "quantize": "nf4", "lora": lora}
    found = losses(tmp_path, llava, student)
    assert all(0 < loss < 0.05 for loss in found)
    assert losses(tmp_path / "resumed", llava, student, stops=(1, None)) == found
    # It still learns after answering, for which some CPU kernels repack weights.
    losses(tmp_path / "asked", llava, student, on_policy={"fraction": 1.0, "max_new_tokens": 2})
    adapter = load_file(tmp_path / "asked" / "run" / "student" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    merged = load_vlm(tmp_path / "run" / "student")  # with the base's own weights
    assert sum(count_parameters(merged.parts).values()) == sum(count_parameters(load_vlm(llava).parts).values())


def test_what_cannot_be_loaded_in_fewer_bits(llava, tmp_path, monkeypatch):
    assembled = tiny.write_teacher(tmp_path / "assembled")
    with pytest.raises(UserError, match="assembled; only models of Transformers"):
        load_vlm(assembled, quantize=object())
    monkeypatch.setattr("vlm_distill.models.quantize.find_spec", lambda name: None)
    for kind, package in {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp8": "torchao"}.items():
        with pytest.raises(UserError, match=rf"teacher.quantize: {kind} needs the package {package}; install"):
            quantization(kind, torch.float32, "teacher")
