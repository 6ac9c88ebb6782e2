"""A step's operations by parameters and positions: against the model's own code, with experts, on known devices."""

import pytest
import tiny
import torch

from data.collate import Collator
from data.images import load_image
from data.opening import open_source
from vlm_distill.models import build_vlm
from vlm_distill.planning.simulation import HeadCost, Meter, simulate
from vlm_distill.runtime.devices import DEVICES, known_device
from vlm_distill.training.flops import StepFlops


def test_devices_are_known_by_their_drivers_names():
    assert known_device("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert known_device("NVIDIA H100 PCIe") is DEVICES["h100-pcie"]
    assert known_device("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40"]
    assert known_device("Abacus 3000") is None


@pytest.mark.parametrize("trained", [("decoder",), ("projector",), ("vision_encoder", "projector", "decoder")])
def test_operations_from_parameters_are_those_of_the_model_s_own_code(tmp_path, trained):
    source = open_source(tiny.write_data(tmp_path, rows=4))
    with Meter() as meter:
        model = build_vlm(tiny.settings(width=64), tokenizer=tiny.make_tokenizer(tiny.WORDS))
        model.set_trainable(trained)
        collator = Collator(model.processor, None, 64)
        pairs = [p for row in source for p in collator.encode(row, [load_image(i) for i in row.images])]
        batch = collator.batch(pairs)
        with model.head.weight() as weight:
            products = 2 * len(batch.targets) * weight.numel() * (2 + weight.requires_grad)
        found = simulate(meter, model, None, batch, HeadCost(0, products), autocast=False)
        counted = StepFlops(model, None, torch.device("cpu"), bf16=False).count(batch)
    assert counted == pytest.approx(found.student_flops, rel=0.1)


def test_of_experts_those_are_counted_that_a_token_is_sent_to():
    def operations(experts):
        config = {**tiny.settings()["decoder"]["config"], "model_type": "qwen3_moe", "head_dim": 8}
        config |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model = build_vlm({"decoder": {"config": config}}, tokenizer=tiny.make_tokenizer(tiny.WORDS))
        batch = Collator(model.processor, None, 64).batch([])
        assert batch.student.inputs["input_ids"].numel() == 1
        return StepFlops(model, None, torch.device("cpu"), bf16=False).count(batch)

    # One token, two layers of width 16, in each a router with a row for each expert: forward and two gradients.
    assert operations(8) - operations(4) == 6 * 2 * 16 * 4
