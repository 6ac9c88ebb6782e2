"""The Triton kernels against the torch kernels; test_kernels.py runs this in a process with Triton's interpreter.

Its rows hold every special case at once, for the interpreter takes milliseconds for every row.
"""

import math

import pytest
import torch

from vlm_distill.losses.kernels import RowStatistics, loss_and_grad, torch_kernels, triton_kernels

NAMES = [
    "forward_kl at T",
    "reverse_kl at T",
    "jsd at T",
    "skew_forward_kl at T",
    "skew_reverse_kl",
    "skew_reverse_kl held",
    "alpha_beta",
    "todi at T",
    "tvd",
    "taid",
    "taid at 0",
    "taid over jsd",
    "taid adaptive",
    "cross_entropy",
]


def special_rows(kernels):
    """Eight rows ``[8, 47]``: plain, ±80, ruled out by the teacher, outside the vocabulary, NaN, ties, equal, far."""
    student, teacher, targets = kernels.logits(8, 47)
    student[1] = torch.where(student[1] > 0, 80.0, -80.0)
    teacher[1] = -student[1]
    teacher[2, :4] = -math.inf
    student[3, 20:], teacher[3, 20:], targets[3] = -math.inf, -math.inf, 2
    student[4, 30] = math.nan
    student[5], teacher[5] = student[5].round(), teacher[5].round()
    teacher[6] = student[6]
    teacher[7] -= 300.0
    return student, teacher, targets


@pytest.mark.parametrize("name", NAMES)
def test_special_rows_equal_the_torch_kernels(name, kernels):
    loss = kernels.make(name)
    assert RowStatistics(loss.kernel_form(), 1, torch.empty(1))._engine is triton_kernels
    student, teacher, targets = special_rows(kernels)
    got = kernels.streamed(loss, student, teacher, targets, 30)
    want = kernels.streamed(loss, student, teacher, targets, 30, engine=torch_kernels)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[0].isnan().tolist() == [row == 4 for row in range(8)]
    # TVD's gradient jumps where p = q; row 1's losses are in the hundreds.
    even = [0, 2, 3, 4, 5, 7] if name == "tvd" else [0, 2, 3, 4, 5, 6, 7]
    finite = [row for row in even if not want[0][row].isinf()]
    torch.testing.assert_close(got[1][finite], want[1][finite], rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(got[1][1], want[1][1], rtol=1e-4, atol=1e-4)
    if name != "cross_entropy":
        assert ("slope" in got[2]) == (name == "taid adaptive")
        if "slope" in got[2]:
            # A variance from two sums: their digits cancel.
            slopes = [signals.pop("slope") for signals in (got[2], want[2])]
            torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("name", "shape"), [("taid", (31, 123)), ("jsd at T", (3, 47)), ("tvd", (1, 7))], ids=str)
def test_odd_shapes(name, shape, kernels):
    loss = kernels.make(name)
    student, teacher, targets = kernels.logits(*shape)
    kernels.close(kernels.streamed(loss, student, teacher), kernels.defined(loss, student, teacher, targets))


def test_rows_of_many_blocks(kernels):
    loss = kernels.make("taid over jsd")
    student, teacher, _ = kernels.logits(1, 2 * triton_kernels.BLOCK + 77)
    kernels.close(kernels.streamed(loss, student, teacher, tile=5000), kernels.defined(loss, student, teacher, None))


def test_scale_sum_softcap_rounding_and_strides(kernels):
    loss = kernels.make("skew_reverse_kl")
    wide, teacher, _ = kernels.logits(3, 60)
    student = wide[:, :47]
    options = {"scale": 0.3, "softcap": 12.0, "add": True}
    out = torch.ones(3, 64, dtype=torch.bfloat16)[:, :47]
    reference = torch.ones(3, 47)
    kernels.streamed(loss, student, teacher[:, 13:], tile=20, out=out, **options)
    kernels.streamed(loss, student, teacher[:, 13:], engine=torch_kernels, out=reference, **options)
    torch.testing.assert_close(out.float(), reference, rtol=2**-7, atol=0)  # the interpreter truncates
    want = kernels.defined(loss, student, teacher[:, 13:], None)
    value, gradient, _ = loss_and_grad(loss.kernel_form(), student, teacher[:, 13:], grad=True)
    assert gradient.data_ptr() == wide.data_ptr()
    kernels.close((value, gradient), want)
