"""Every loss and the TAID schedule against values that this project did not compute."""

import json
import shutil

import pytest
import torch
from torch import nn

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, fused_linear
from vlm_distill.models.lm_head import LMHead


def test_golden_case(check_golden, golden, golden_case):
    comparisons = list(check_golden.compare(golden, golden_case))
    assert comparisons
    assert [c for c in comparisons if not c.ok] == []


def test_files_are_those_of_the_index(golden):
    assert golden.changed() == []


def test_no_loss_of_the_index_is_skipped(check_golden, golden):
    assert [name for name in golden.index["losses"] if not check_golden.built(name)] == []


@pytest.mark.parametrize("recompute", [False, True])
def test_the_engine_gives_the_golden_values(recompute, check_golden, golden):
    """An identity head turns the golden logits into hidden states; the golden mask becomes the distilled rows."""
    checked = 0
    for case in golden.cases.values():
        if case["loss"] not in (*losses.available(), "logit_std_kd", "logit_std_dkd"):
            continue
        if case["input"] not in ("n9_v31", "n6_v31_extreme", "n4_v7_allmasked"):
            continue
        inputs = golden.inputs(case)
        size = inputs["student"].shape[1]
        linear = nn.Linear(size, size, bias=False, dtype=torch.float64)
        nn.init.eye_(linear.weight)
        hidden = inputs["student"].double().requires_grad_()
        terms = check_golden.build(case)
        if recompute and any(term.loss.kernel_form() is None for term in terms):
            continue
        sums = fused_linear(
            terms,
            hidden,
            LMHead(linear),
            HiddenTargets(inputs["teacher"].double(), LMHead(linear)),
            inputs["target"],
            distilled=inputs["mask"],
            scales={"loss": 1.0 / max(int(inputs["mask"].sum()), 1)},
            chunk_bytes=1,
            recompute=recompute,
        )
        sums.loss.backward()
        assert sums.loss.item() == pytest.approx(golden.expected(case, "paper", "loss"), rel=1e-12, abs=1e-12)
        want = golden.expected(case, "paper", "grad")
        assert want is not None
        torch.testing.assert_close(hidden.grad, torch.from_numpy(want), rtol=1e-11, atol=1e-12)
        checked += 1
    assert checked > 10


def test_the_checker_fails_on_a_wrong_number_and_skips_losses_not_built(check_golden, golden, tmp_path, capsys):
    case = dict(golden.cases["forward_kl/n5_v7/T1"])
    case["expect"] = [dict(case["expect"][0], loss=1.9)]
    index = dict(golden.index, files={}, cases=[case, dict(case, id="other", loss="other")])
    (tmp_path / "index.json").write_text(json.dumps(index))
    for name in ("inputs.npz", "forward_kl.npz"):
        shutil.copy(golden.folder / name, tmp_path)
    assert check_golden.main(["losses", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL forward_kl/n5_v7/T1: float64 forward loss" in printed
    assert "not built" in printed
    case["expect"][0]["loss"] = golden.expected(golden.cases[case["id"]], "paper", "loss")
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert check_golden.main(["losses", str(tmp_path)]) == 0
