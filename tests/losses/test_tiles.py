"""Tiles of tokens × vocabulary against whole logits and autograd: values, products and memory."""

import math
import sys

import pytest
import torch

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, Term, TopKTargets, fused_linear, tiles

STREAMED = [name for name in losses.available(losses.DistillationLoss) if losses.build(name).kernel_form() is not None]


@pytest.fixture
def small(monkeypatch):
    """Set a tile's numbers of tokens and columns, and return the ``chunk_bytes`` for it."""

    def set_tile(tokens, columns, *, teacher=True, itemsize=8):
        monkeypatch.setattr(tiles, "TOKENS_CPU", tokens)
        monkeypatch.setattr(tiles, "COLUMNS", 1)
        return tokens * columns * (1 + teacher + tiles.TORCH_SCRATCH + 1) * itemsize

    return set_tile


@pytest.fixture
def whole_rows(monkeypatch):
    """Make ``recompute`` run what a GPU runs without it: tiles of whole rows, gradients of several blocks at once."""
    module = sys.modules["vlm_distill.losses.from_hidden"]

    def uncut(work, terms, count, *, recompute):
        return tiles.Tiles(work, terms, count, recompute=False)

    monkeypatch.setattr(module, "Tiles", uncut)


def test_the_family():
    whole = {"adaptive_kl", "alm", "amid", "dkd", "ctkd", "uld", "overlap_kl", "policy_gradient", "diagnostics"}
    assert set(STREAMED) == set(losses.available(losses.DistillationLoss)) - whole


@pytest.mark.parametrize("tile", [(13, 37), (4, 12), (5, 36), (1, 8)], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_each_loss_equals_whole_logits(name, tile, chunked, small):
    """Tiles that divide tokens and vocabulary and tiles that do not."""
    chunked.Setting().check([Term("only", losses.build(name))], recompute=True, chunk_bytes=small(*tile))


@pytest.mark.parametrize("tile", [(13, 37), (5, 12)], ids=str)
@pytest.mark.parametrize("name", STREAMED)
def test_buffers_wider_than_the_tile(name, tile, chunked, small, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(tiles, "WIDTH_CPU", 16)
    setting = chunked.Setting(softcap=4.0, bias=True)
    setting.check([Term("only", losses.build(name))], recompute=True, chunk_bytes=small(*tile))


@pytest.mark.parametrize("shape", [(3, 47), (31, 123), (1, 7)], ids=str)
def test_odd_shapes(shape, chunked, small):
    chunked.Setting(*shape).check(chunked.two_terms(), recompute=True, chunk_bytes=small(7, 20))
    chunked.Setting(*shape).check(chunked.two_terms(), recompute=True)


@pytest.mark.parametrize(
    "head", [{"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 1.7, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bias_scale_and_softcap(head, dtype, chunked, small):
    limit = small(4, 10)
    if dtype == torch.float64:
        chunked.Setting(**head).check(chunked.two_terms(), recompute=True, chunk_bytes=limit)
        return
    setting = chunked.Setting(dtype=dtype, **head)
    want, got = (
        setting.fused(chunked.two_terms()),
        setting.fused(chunked.two_terms(), recompute=True, chunk_bytes=limit),
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(x.loss, setting.inputs()) for x in (got, want)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1e-6 * b.float().abs().max().item())


@pytest.mark.parametrize("tile", [(13, 37), (4, 12)], ids=str)
def test_a_weighted_sum_of_several_losses(tile, chunked, small):
    limit = small(*tile)
    names = ["taid", "jsd", "cross_entropy", "tvd", "kd"]
    terms = [Term(name, losses.build(name), 0.1 + i / 3) for i, name in enumerate(names)]
    terms.append(Term("measured", losses.build("reverse_kl"), 0.0))
    setting = chunked.Setting()
    sums = setting.check(terms, recompute=True, chunk_bytes=limit, scales={"jsd": 0.2})
    plain = setting.fused(terms, scales={"jsd": 0.2})
    for name, term in plain.terms.items():
        got = sums.terms[name]
        assert got.count == term.count
        torch.testing.assert_close([got.loss, got.signals], [term.loss, term.signals])
    setting.check([Term("nothing", losses.build("taid"), 0.0)], recompute=True, chunk_bytes=limit)


def test_rows_without_a_teacher_and_no_rows(chunked, small):
    limit = small(4, 12)
    setting = chunked.Setting()
    for distilled in (torch.zeros(13, dtype=torch.bool), torch.ones(13, dtype=torch.bool)):
        setting.check(chunked.two_terms(), recompute=True, chunk_bytes=limit, distilled=distilled)
    sums = setting.fused(chunked.two_terms(), rows=slice(0, 0), recompute=True)
    sums.loss.backward()
    assert sums.loss.item() == 0.0
    assert all(x.grad is not None and not x.grad.any() for x in setting.inputs())


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 40_000, 10**9])
def test_uncut_rows_in_groups(chunk_bytes, chunked, whole_rows, monkeypatch):
    """What a GPU does by default: several blocks of logits, then the products of all their gradients."""
    monkeypatch.setattr(tiles, "ROWS", 2)
    setting = chunked.Setting(bias=True, softcap=4.0)
    setting.check(chunked.two_terms(), recompute=True, chunk_bytes=chunk_bytes)
    setting.check([Term("jsd", losses.build("jsd"))], recompute=True, chunk_bytes=chunk_bytes)


def test_uncut_rows_repeat_no_product(chunked, whole_rows):
    with chunked.CountProducts() as counter:
        chunked.Setting().fused(chunked.two_terms(), distilled=None, recompute=True)
    assert counter.count == 4


@pytest.mark.parametrize(("name", "passes"), [("taid", 1), ("jsd", 2)])
@pytest.mark.parametrize(("frozen", "products"), [((), 2), (("weight",), 1), (("hidden",), 1)], ids=str)
def test_products_are_those_that_are_needed(name, passes, frozen, products, chunked, small):
    """Each pass forms both models' logits once, except for the tile still in memory; a frozen head costs no product."""
    setting = chunked.Setting()
    setting.hidden.requires_grad_("hidden" not in frozen)
    setting.linear.weight.requires_grad_("weight" not in frozen)
    limit = small(5, 10)
    blocks, wide = math.ceil(13 / 5), math.ceil(37 / 10)
    with chunked.CountProducts() as counter:
        setting.fused([Term("it", losses.build(name))], distilled=None, recompute=True, chunk_bytes=limit)
    assert counter.count == blocks * (2 * wide + passes * 2 * (wide - 1) + products * wide)


def test_evaluation_makes_no_gradient(chunked, small):
    setting, limit = chunked.Setting(), small(5, 10)
    options = {"distilled": None, "recompute": True, "chunk_bytes": limit}
    trained = setting.fused(chunked.two_terms(), **options)
    with torch.no_grad(), chunked.CountProducts() as counter:
        sums = setting.fused(chunked.two_terms(), **options)
    assert counter.count == 3 * 4 * 2
    assert not sums.loss.requires_grad
    torch.testing.assert_close(sums.loss, trained.loss.detach())
    with chunked.CountProducts() as counter:
        frozen = chunked.Setting()
        frozen.hidden.requires_grad_(False)
        frozen.linear.weight.requires_grad_(False)
        assert not frozen.fused(chunked.two_terms(), **options).loss.requires_grad
    assert counter.count == 3 * 4 * 2


def test_memory_depends_on_neither_tokens_nor_vocabulary(chunked, benchmark_losses):
    """Besides the gradients, four times the tokens or four times the vocabulary need no more memory."""
    spare = []
    for n, v in ((512, 4096), (2048, 4096), (512, 16384)):
        setting = chunked.Setting(n, v, 4, 4, dtype=torch.float32)
        peak = benchmark_losses.peak_bytes(
            lambda s=setting: s.fused(chunked.two_terms(), distilled=None, recompute=True)
        )
        spare.append(peak - sum(x.numel() for x in setting.inputs()) * 4)
    assert max(spare) < min(spare) + 2**18
    assert max(spare) < 1.1 * tiles.TILE_BYTES_CPU
    assert max(spare) < 0.3 * 2 * 512 * 4096 * 4  # both models' whole logits of the smallest


def test_what_needs_whole_rows_is_named(chunked):
    setting = chunked.Setting()
    for loss in (losses.build("adaptive_kl"), losses.build("taid", power=1.0), losses.build("diagnostics")):
        with pytest.raises(ValueError, match="term 'it' of the loss needs whole rows of logits"):
            setting.fused([Term("it", loss)], recompute=True)
    teacher = setting.teacher.head._linear(setting.teacher.hidden).detach()
    with pytest.raises(ValueError, match="recompute needs the teacher's hidden states"):
        fused_linear(losses.build("taid"), setting.hidden, setting.head, TopKTargets.of(teacher, 5), recompute=True)


def test_a_nan_shows_in_the_sum(chunked, small):
    setting = chunked.Setting()
    hidden = setting.hidden.detach().clone()
    hidden[2] = math.nan
    teacher = HiddenTargets(setting.teacher.hidden, setting.teacher.head)
    sums = fused_linear(losses.build("jsd"), hidden, setting.head, teacher, recompute=True, chunk_bytes=small(4, 12))
    assert sums.loss.isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_on_a_gpu(recompute, benchmark_losses):
    """1.2 GiB above inputs, returned gradients and the float32 accumulator of the head's gradient, at real sizes."""
    case = benchmark_losses.Case(benchmark_losses.Shape(4096, 151_936, 1024, 2048), "cuda")
    for name in ("taid", "jsd"):
        case.ours(name, recompute=recompute)  # the matrix library's workspace stays
        peak = benchmark_losses.peak_bytes(lambda name=name: case.ours(name, recompute=recompute), "cuda")
        returned = sum(x.numel() * 2 for x in (case.hidden, case.weight))
        assert peak - returned - case.weight.numel() * 4 < 1.2 * 2**30


@pytest.mark.gpu
def test_a_gpu_gives_what_float64_gives(benchmark_losses):
    """bfloat16 operands at a real vocabulary, which is odd, against whole logits in float64."""
    case = benchmark_losses.Case(benchmark_losses.Shape(300, 92_553, 256, 512), "cuda")
    exact = benchmark_losses.Case(benchmark_losses.Shape(1, 1, 1, 1), "cuda")
    for field in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        value = getattr(case, field).detach().double()
        setattr(exact, field, value.requires_grad_(getattr(case, field).requires_grad))
    student = exact.hidden @ exact.weight.t()
    teacher = exact.teacher_hidden @ exact.teacher_weight.t()
    for name, loss in benchmark_losses.LOSSES.items():
        value = loss(student, teacher).mean()
        want = torch.autograd.grad(value, (exact.hidden, exact.weight), retain_graph=True)
        for recompute in (False, True):
            for got, expected in zip(case.ours(name, recompute=recompute), want, strict=True):
                largest = expected.abs().max().item()
                torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=1e-2 * largest)
