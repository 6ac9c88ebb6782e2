"""ULD: distributions of different vocabularies, and groups of tokens of different tokenizers."""

import math

import pytest
import torch
from grouped_tokens import ROWS, SIZES, GroupedModels, only_groups
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, Term, fused_linear
from vlm_distill.losses.groups import TokenGroups
from vlm_distill.losses.uld import _merged


class CountProducts(TorchDispatchMode):
    """Count matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


class Setting(GroupedModels):
    """Models whose losses on groups are also computed by hand."""

    def whole(self, terms, scales=None):
        """Compute the weighted sum by ``by_hand`` for ULD and plain cross-entropy for the rest."""
        student, teacher = self.logits()
        total = 0.0
        for term in terms:
            if "teacher" in term.loss.needs:
                values = by_hand(student, teacher, self.targets, self.groups, term.loss.temperature)
            else:
                values = nn.functional.cross_entropy(student, self.targets, reduction="none")
            total = total + term.weight * (scales or {}).get(term.name, 1.0) * values.sum()
        return total

    def check(self, terms, **options):
        want, got = self.whole(terms, options.get("scales")), self.fused(terms, **options)
        torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
        wanted = [x for x in self.inputs() if x.requires_grad]
        expected = torch.autograd.grad(want, wanted)
        torch.testing.assert_close(torch.autograd.grad(got.loss, wanted), expected, rtol=1e-10, atol=1e-12)
        return got


def outcomes(logits, targets, span, temperature):
    """Return the probabilities of a group's outcomes as a list of 0-d tensors, token by token from the definition."""
    first, stop = span
    probs = [(logits[row] / temperature).softmax(-1) for row in range(first, stop)]
    whole = probs[0][targets[first]]
    for row in range(first + 1, stop):
        whole = whole * probs[row - first][targets[row]]
    others = [p for token, p in enumerate(probs[0]) if token != targets[first]]
    return [*others, whole, probs[0][targets[first]] - whole]


def by_hand(student, teacher, targets, groups, temperature=1.0):
    values = []
    for ours, theirs in zip(groups.student.tolist(), groups.teacher.tolist(), strict=True):
        q = sorted(outcomes(student, targets, ours, temperature), key=Tensor.item, reverse=True)
        p = sorted(outcomes(teacher, groups.teacher_targets, theirs, temperature), key=Tensor.item, reverse=True)
        zero = torch.zeros((), dtype=student.dtype)
        q, p = q + [zero] * (len(p) - len(q)), p + [zero] * (len(q) - len(p))
        values.append(sum((a - b).abs() for a, b in zip(q, p, strict=True)))
    return torch.stack(values)


def uld(**params):
    return losses.build("uld", **params)


def two_terms():
    return [Term("uld", uld()), Term("data", losses.build("cross_entropy"), 0.3)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", [(23, 31), (31, 23), (23, 23)], ids=str)
def test_definition_and_closed_form_equal_the_slow_way(vocabularies, temperature):
    loss = uld(temperature=temperature)
    student, teacher, targets, groups = only_groups(Setting(SIZES, *vocabularies))
    leaf = student.clone().requires_grad_()
    want = by_hand(leaf, teacher, targets, groups, temperature)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    defined = loss(leaf, teacher, targets, groups)
    torch.testing.assert_close(defined, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(defined.sum(), leaf)[0], gradient, rtol=1e-10, atol=1e-14)
    closed = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    without = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=False)
    torch.testing.assert_close(closed.loss, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-10, atol=1e-14)
    assert without.grad is None
    assert torch.equal(without.loss, closed.loss)


def test_other_devices_sort_alike(monkeypatch):
    student, teacher, targets, groups = only_groups(Setting())
    want = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    monkeypatch.setattr("vlm_distill.losses.uld._ascending", lambda x: x.sort(-1).values)
    monkeypatch.setattr("vlm_distill.losses.uld._order", lambda x: x.argsort(-1))
    got = uld().grouped_loss_and_grad(student, teacher, targets, groups, grad=True)
    torch.testing.assert_close((got.loss, got.grad), (want.loss, want.grad), rtol=1e-13, atol=1e-15)


def test_gradcheck_of_groups():
    student, teacher, targets, groups = only_groups(Setting())
    assert torch.autograd.gradcheck(lambda s: uld()(s, teacher, targets, groups), student.requires_grad_())


def test_groups_of_one_are_plain_rows():
    setting = Setting([(1, 1, 0)] * 9)
    student, teacher = (x.detach()[:9] for x in setting.logits())
    plain = uld().loss_and_grad(student.clone(), teacher.clone(), grad=True)
    targets, groups = setting.targets[:9], setting.groups
    grouped = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    torch.testing.assert_close(plain.loss, grouped.loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(plain.grad, grouped.grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(uld()(student, teacher), plain.loss)


def test_plain_logits_of_different_vocabularies():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(2.0), 0.0, 0.0]])
    # ½ ½ 0 against ½ ¼ ¼
    torch.testing.assert_close(uld()(student, teacher), torch.tensor([0.5]))
    torch.testing.assert_close(uld()(teacher, student), torch.tensor([0.5]))
    torch.testing.assert_close(
        uld().loss_and_grad(teacher.clone(), student.clone(), grad=True).loss, torch.tensor([0.5])
    )


def test_a_merged_row_by_hand():
    """ "red" in one token of probability ½ against "re" + "d" of probabilities ½ and ⅘."""
    student = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]])
    groups = TokenGroups(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), torch.tensor([1, 0]))
    # ½ ¼ ¼ against ½ ⅖ ⅒
    result = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), torch.tensor([0]), groups, grad=True)
    torch.testing.assert_close(result.loss, torch.tensor([0.3]))
    torch.testing.assert_close(uld()(student, teacher, torch.tensor([0]), groups), torch.tensor([0.3]))


def test_merged_rows_sum_to_one():
    student, teacher, targets, groups = only_groups(Setting())
    sides = (student, targets, groups.student), (teacher, groups.teacher_targets, groups.teacher)
    for logits, tokens, spans in sides:
        merged = _merged(logits.log_softmax(-1), tokens, spans)
        assert merged.min() >= 0
        torch.testing.assert_close(merged.sum(-1), torch.ones(len(groups), dtype=torch.float64))


def test_zero_at_equality_and_never_above_two():
    setting = Setting([(a, a, 0) for a in (1, 2, 4, 3)], v=31)
    student, _ = (x.detach() for x in setting.logits())
    student, targets = student[:-1], setting.targets[:-1]
    same = TokenGroups(setting.groups.student, setting.groups.student, targets)
    result = uld().grouped_loss_and_grad(student.clone(), student.clone(), targets, same, grad=True)
    assert not result.loss.any()
    assert not result.grad.any()
    sure = torch.full((1, 50_000), -1e4)
    sure[0, 7] = 0.0
    assert 1.9 < uld()(sure, torch.zeros(1, 50_000)).item() <= 2.0


def test_the_order_of_a_vocabulary_does_not_matter():
    student, teacher, targets, groups = only_groups(Setting())
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randperm(x.shape[1], generator=generator) for x in (student, teacher))
    moved = TokenGroups(groups.student, groups.teacher, theirs.argsort()[groups.teacher_targets])
    want = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    got = uld().grouped_loss_and_grad(student[:, ours], teacher[:, theirs], ours.argsort()[targets], moved, grad=True)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.grad, want.grad[:, ours])


def test_gradients_sum_to_zero_over_the_vocabulary():
    student, teacher, targets, groups = only_groups(Setting())
    gradient = uld().grouped_loss_and_grad(student, teacher, targets, groups, grad=True).grad
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(student), dtype=torch.float64), rtol=0, atol=1e-14)


def test_what_a_model_rules_out():
    student, teacher, targets, groups = only_groups(Setting())
    padding = torch.full((len(student), 4), -math.inf, dtype=torch.float64)
    want = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    got = uld().grouped_loss_and_grad(torch.cat([student, padding], 1), teacher.clone(), targets, groups, grad=True)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.grad[:, :-4], want.grad)
    assert not got.grad[:, -4:].any()
    # A later token of a group has no probability: all of the first one's goes to "otherwise".
    later = int(groups.student[3, 0]) + 1
    student[later, targets[later]] = -math.inf
    leaf = student.clone().requires_grad_()
    result = uld().grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    values = uld()(leaf, teacher, targets, groups)
    torch.testing.assert_close(result.loss, values.detach())
    torch.testing.assert_close(result.grad, torch.autograd.grad(values.sum(), leaf)[0])
    assert result.loss.isfinite().all()
    assert result.grad.isfinite().all()


@pytest.mark.parametrize("side", ["first", "later", "teacher's later"])
def test_nan_is_never_hidden(side):
    student, teacher, targets, groups = only_groups(Setting())
    if side.startswith("teacher"):
        teacher[groups.teacher[3, 0] + 1, 5] = math.nan
    else:
        student[groups.student[3, 0] + (2 if side == "later" else 0), 5] = math.nan
    result = uld().grouped_loss_and_grad(student, teacher, targets, groups, grad=True)
    assert result.loss.isnan().tolist() == [i == 3 for i in range(len(groups))]


@pytest.mark.parametrize("terms", [two_terms, lambda: [Term("uld", uld(temperature=2.0))]], ids=["two", "one"])
@pytest.mark.parametrize("chunk_bytes", [1, 3_000, 9_000, 30_000, None])
def test_any_chunk_gives_the_same(terms, chunk_bytes):
    Setting().check(terms(), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize(
    "head", [{"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 1.7, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_bias_scale_and_softcap(head, chunk_bytes):
    Setting(**head).check(two_terms(), chunk_bytes=chunk_bytes)


def test_counts_and_scales():
    sums = Setting().check(two_terms(), scales={"uld": 1 / 7, "data": 1 / 17})
    assert (sums.terms["uld"].count, sums.terms["data"].count) == (len(SIZES), ROWS)
    torch.testing.assert_close(sums.loss.detach(), sums.terms["uld"].loss / 7 + 0.3 * sums.terms["data"].loss / 17)


def test_two_of_them():
    Setting().check([Term("a", uld()), Term("b", uld(temperature=3.0), 0.5), Term("c", uld(), 0.0)], chunk_bytes=5000)


def test_no_group_at_all():
    setting = Setting()
    empty = torch.empty(0, 2, dtype=torch.int64)
    setting.groups = TokenGroups(empty, empty, torch.empty(0, dtype=torch.int64))
    setting.teacher.hidden = setting.teacher.hidden[:0]
    sums = setting.fused(two_terms())
    assert (sums.terms["uld"].count, sums.terms["data"].count) == (0, ROWS)
    alone = setting.fused(uld())
    alone.loss.backward()
    assert alone.loss.item() == 0.0
    assert all(x.grad is not None and not x.grad.any() for x in setting.inputs())


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 4), (("weight",), 3), (("hidden",), 3), (("weight", "hidden"), 2)], ids=str
)
def test_only_the_products_that_are_needed(frozen, products):
    setting = Setting([(a, b, 0) for a, b, _ in SIZES])
    setting.hidden = setting.hidden[:-1].detach().requires_grad_("hidden" not in frozen)
    setting.targets = setting.targets[:-1]
    setting.linear.weight.requires_grad_("weight" not in frozen)
    with CountProducts() as counter:
        sums = setting.fused(two_terms())
    assert counter.count == products
    assert sums.loss.requires_grad == (len(frozen) < 2)
    if sums.loss.requires_grad:
        setting.check(two_terms())


def test_evaluation_makes_no_gradient():
    setting = Setting()
    trained = setting.fused(uld())
    with torch.no_grad(), CountProducts() as counter:
        sums = setting.fused(uld())
    assert counter.count == 2
    assert not sums.loss.requires_grad
    assert torch.equal(sums.loss, trained.loss.detach())


def test_a_vocabulary_cut_to_its_tokens():
    setting = Setting(bias=True)
    setting.targets, setting.groups.teacher_targets = setting.targets % 20, setting.groups.teacher_targets % 25
    setting.head.vocabulary, setting.teacher.head.vocabulary = 20, 25
    setting.fused(two_terms()).loss.backward()
    cut = Setting(bias=True)
    student, teacher = cut.logits()
    want = by_hand(student[:, :20], teacher[:, :25], setting.targets, setting.groups).sum()
    want = want + 0.3 * nn.functional.cross_entropy(student[:, :20], setting.targets, reduction="sum")
    expected = torch.autograd.grad(want, cut.inputs())
    torch.testing.assert_close([x.grad for x in setting.inputs()], list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    exact, low = Setting(bias=True), Setting(dtype=dtype, bias=True)
    pairs = [*zip(exact.inputs(), low.inputs(), strict=True), (exact.teacher.hidden, low.teacher.hidden)]
    heads = (exact.teacher.head._linear.parameters(), low.teacher.head._linear.parameters())
    for a, b in [*pairs, *zip(*heads, strict=True)]:
        a.data.copy_(b.data)
    want, got = exact.fused(two_terms()), low.fused(two_terms())
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    want.loss.backward()
    got.loss.backward()
    for a, b in zip(exact.inputs(), low.inputs(), strict=True):
        assert b.grad.dtype == dtype
        largest = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.double(), a.grad, rtol=torch.finfo(dtype).eps, atol=1e-5 * largest)


def test_rows_without_groups_may_differ_in_vocabulary():
    setting = Setting([(1, 1, 0)] * 9)
    hidden = setting.hidden[:9]
    options = {"distilled": torch.arange(9) % 2 == 0, "chunk_bytes": 3000}
    got = fused_linear(two_terms(), hidden, setting.head, setting.teacher, setting.targets[:9], **options)
    student, teacher = setting.logits()
    want = uld()(student[:9][::2], teacher[::2]).sum()
    want = want + 0.3 * nn.functional.cross_entropy(student[:9], setting.targets[:9], reduction="sum")
    torch.testing.assert_close(got.loss, want)
    gradients = (torch.autograd.grad(loss, setting.inputs()) for loss in (got.loss, want))
    torch.testing.assert_close(*gradients)


def test_what_cannot_be_is_refused():
    setting = Setting()
    with pytest.raises(ValueError, match="term 'kl' of the loss compares token by token, and groups were given"):
        setting.fused([*two_terms(), Term("kl", losses.build("forward_kl"))])
    with pytest.raises(ValueError, match="23 tokens in the vocabulary, the teacher 31"):
        fused_linear(
            [Term("uld", uld()), Term("kl", losses.build("forward_kl"))],
            setting.hidden[:5],
            setting.head,
            HiddenTargets(setting.teacher.hidden[:5], setting.teacher.head),
        )
    with pytest.raises(ValueError, match="no targets"):
        fused_linear(uld(), setting.hidden, setting.head, setting.teacher, distilled=setting.groups)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu():
    exact, low = Setting(bias=True), Setting(dtype=torch.bfloat16, bias=True)
    pairs = [*zip(exact.inputs(), low.inputs(), strict=True), (exact.teacher.hidden, low.teacher.hidden)]
    heads = (exact.teacher.head._linear.parameters(), low.teacher.head._linear.parameters())
    for a, b in [*pairs, *zip(*heads, strict=True)]:
        a.data.copy_(b.data)
    want = exact.fused(two_terms())
    want.loss.backward()
    for layer in (low.linear, low.teacher.head._linear):
        layer.cuda()
    low.hidden = low.hidden.detach().cuda().requires_grad_()
    low.teacher.hidden, low.targets, low.groups = low.teacher.hidden.cuda(), low.targets.cuda(), low.groups.to("cuda")
    got = low.fused(two_terms(), chunk_bytes=9_000)
    got.loss.backward()
    torch.testing.assert_close(got.loss.double().cpu(), want.loss, rtol=1e-5, atol=0)
    for a, b in zip(exact.inputs(), low.inputs(), strict=True):
        largest = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.double().cpu(), a.grad, rtol=2e-2, atol=1e-2 * largest)
