"""Models without weights: Transformers' families and LoRA are planned as they are, and take no memory."""

import families
import pytest
import tiny

from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.planning import plan


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("internvl", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "smolvlm")),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "internvl", "smolvlm")),
    ],
)
def test_families_are_planned_without_their_weights(tmp_path, make_tokenizer, name, lora):
    folder = families.Maker(make_tokenizer).write(name, tmp_path / name)
    with families.num2words():
        real = sum(p.numel() for p in load_vlm(folder).parameters())
        (folder / "model.safetensors").unlink()
        plain = tiny.config(tmp_path / "run", tiny.write_data(tmp_path / "data", rows=8), folder)
        plain |= {"student": {"path": str(folder)}, "loss": [{"name": "forward_kl"}], "deepspeed": {"stage": 2}}
        plain["data"]["max_length"] = 512
        if lora:
            plain["student"]["lora"] = {"rank": 2}
            plain["teacher"] = {"from_student": True}
        found = plan(RunConfig.model_validate(plain), gpus=2)
    counted = {
        (model, kind): sum(getattr(part, kind) for part in found.parts if part.model == model)
        for model in ("student", "teacher")
        for kind in ("parameters", "trained")
    }
    row = found.memory[found.configured]
    assert row.activations > 0
    assert found.flops > 0
    if lora:
        assert 0 < counted["student", "trained"] == counted["student", "parameters"] - real
        assert row.teacher == 0
    else:
        assert counted["student", "trained"] == counted["student", "parameters"] == real
        assert counted["teacher", "parameters"] == real
        assert row.teacher == 4 * real
    assert row.optimizer == 12 * counted["student", "trained"] / 2
