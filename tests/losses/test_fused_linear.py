"""The chunked path against whole logits and autograd."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_distill import losses
from vlm_distill.losses import DistillationLoss, HiddenTargets, MixedTargets, Term, fused_linear
from vlm_distill.models.lm_head import LMHead

NAMES = list(losses.available(DistillationLoss))


class TotalVariation(DistillationLoss):
    """½ Σ|p − q|, without a closed form of its gradient."""

    def forward(self, student_logits, teacher_logits, targets=None):
        return 0.5 * (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1)


class Setting:
    """Student and teacher of different widths on the same rows."""

    def __init__(self, n=13, v=37, h=8, h_teacher=11, *, dtype=torch.float64, bias=False, **head):
        generator = torch.Generator().manual_seed(n + v)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.linear = nn.Linear(h, v, bias=bias, dtype=dtype)
        teacher = nn.Linear(h_teacher, v, dtype=dtype)
        with torch.no_grad():
            for layer in (self.linear, teacher):
                layer.weight.copy_(random(*layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(random(v))
        self.hidden = random(n, h).requires_grad_()
        self.head = LMHead(self.linear, **head)
        self.teacher = HiddenTargets(random(n, h_teacher), LMHead(teacher))
        self.targets = torch.randint(v, (n,), generator=generator)
        self.distilled = torch.rand(n, generator=generator) < 0.6

    def inputs(self):
        return [self.hidden, *self.linear.parameters()]

    def fused(self, terms, rows=slice(None), **options):
        options.setdefault("distilled", self.distilled[rows])
        teacher = HiddenTargets(self.teacher.hidden[rows], self.teacher.head)
        return fused_linear(terms, self.hidden[rows], self.head, teacher, self.targets[rows], **options)

    def whole(self, terms, distilled=None, scales=None):
        """Compute the same weighted sum from whole logits by the definitions, for autograd."""
        distilled = self.distilled if distilled is None else distilled
        student = self.hidden @ self.linear.weight.t()
        student = (student if self.linear.bias is None else student + self.linear.bias) * self.head.scale
        if self.head.softcap:
            student = self.head.softcap * (student / self.head.softcap).tanh()
        teacher = self.teacher.head._linear(self.teacher.hidden).detach()
        total = 0.0
        for term in terms:
            rows = distilled if "teacher" in term.loss.needs else torch.ones_like(distilled)
            values = term.loss(student[rows], teacher[rows], self.targets[rows])
            total = total + term.weight * (scales or {}).get(term.name, 1.0) * values.sum()
        return total

    def check(self, terms, **options):
        scales = options.get("scales")
        want = self.whole(terms, options.get("distilled"), scales)
        got = self.fused(terms, **options)
        torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
        wanted = [x for x in self.inputs() if x.requires_grad]
        expected = torch.autograd.grad(want, wanted)
        torch.testing.assert_close(torch.autograd.grad(got.loss, wanted), expected, rtol=1e-10, atol=1e-12)
        return got


def two_terms():
    return [Term("taid", losses.build("taid")), Term("data", losses.build("cross_entropy"), 0.3)]


class CountProducts(TorchDispatchMode):
    """Count matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_equals_whole_logits(name):
    Setting().check([Term("only", losses.build(name))])


def test_a_loss_without_a_closed_form_goes_the_same_way():
    Setting().check([Term("tvd", TotalVariation()), *two_terms()], chunk_bytes=4000)


@pytest.mark.parametrize("shape", [(3, 47), (31, 123), (1, 7)], ids=str)
def test_odd_shapes(shape):
    Setting(*shape).check(two_terms(), chunk_bytes=10_000)


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (2, 1), (3, 1), (5, 1), (7, 2)])
def test_any_chunk_gives_the_same(rows, block):
    """Chunks that divide the rows and chunks that do not."""
    setting = Setting(n=12)
    term = Term("taid", losses.build("taid"))
    one_row = 37 * 8  # a row of a block takes TAID's scratch and its gradient, one of a chunk both models' logits
    chunk_bytes = (2 * rows + block * (term.loss.scratch + 1)) * one_row
    with CountProducts() as counter:
        setting.fused([term], chunk_bytes=chunk_bytes, distilled=None)
    assert counter.count == 4 * math.ceil(12 / rows)
    setting.check([term], chunk_bytes=chunk_bytes, distilled=torch.ones(12, dtype=torch.bool))


@pytest.mark.parametrize(
    "head", [{"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 1.7, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_bias_scale_and_softcap(head, chunk_bytes):
    Setting(**head).check(two_terms(), chunk_bytes=chunk_bytes)


def test_weights_scales_and_distilled_rows():
    setting = Setting()
    sums = setting.check(two_terms(), scales={"taid": 1 / 7, "data": 1 / 13})
    taid, data = sums.terms["taid"], sums.terms["data"]
    assert (taid.count, data.count) == (int(setting.distilled.sum()), 13)
    torch.testing.assert_close(sums.loss.detach(), taid.loss / 7 + 0.3 * data.loss / 13)
    assert not taid.loss.requires_grad
    assert set(taid.signals) == {"kl", "cross_entropy"}
    torch.testing.assert_close(taid.signals["kl"], taid.loss)
    assert data.signals == {}


def test_all_rows_are_distilled_by_default():
    assert Setting().check(two_terms(), distilled=torch.ones(13, dtype=torch.bool)).terms["taid"].count == 13
    assert Setting().fused(two_terms(), distilled=None).terms["taid"].count == 13


def test_no_row_distilled():
    setting = Setting()
    none = torch.zeros(13, dtype=torch.bool)
    sums = setting.fused(losses.build("forward_kl"), distilled=none)
    assert (sums.loss.item(), sums.terms["loss"].count) == (0.0, 0)
    # Every rank must reduce the same signals, with or without rows.
    assert set(setting.fused(two_terms(), distilled=none).terms["taid"].signals) == {"kl", "cross_entropy"}
    sums.loss.backward()
    assert all(x.grad is not None and not x.grad.any() for x in setting.inputs())
    setting.check(two_terms(), distilled=none)


def test_no_rows_at_all_still_reach_every_parameter():
    setting = Setting(bias=True)
    sums = setting.fused(two_terms(), rows=slice(0, 0))
    assert sums.loss.item() == 0.0
    sums.loss.backward()
    assert all(x.grad is not None and not x.grad.any() for x in setting.inputs())


def test_a_term_of_weight_zero_is_measured_and_pulls_nothing():
    setting = Setting()
    one, other = two_terms()
    sums = setting.check([one, Term("data", other.loss, 0.0)])
    assert sums.terms["data"].loss > 0
    setting.check([Term("taid", one.loss, 0.0)])


def test_micro_batches_add_up_to_one():
    whole, split = Setting(31, 123, bias=True), Setting(31, 123, bias=True)
    scales = {"taid": 1 / 17, "data": 1 / 31}
    one = whole.fused(two_terms(), scales=scales)
    one.loss.backward()
    parts = [split.fused(two_terms(), slice(a, b), scales=scales) for a, b in ((0, 9), (9, 9), (9, 10), (10, 31))]
    for part in parts:
        part.loss.backward()
    torch.testing.assert_close(sum(p.loss.detach() for p in parts), one.loss.detach(), rtol=1e-13, atol=0)
    assert sum(p.terms["taid"].count for p in parts) == one.terms["taid"].count
    for a, b in zip(whole.inputs(), split.inputs(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_gradcheck_through_the_function():
    setting = Setting(3, 5, 4, 4, bias=True)

    def loss(*_):
        return setting.fused(two_terms()[1:]).loss

    assert torch.autograd.gradcheck(loss, setting.inputs())


def test_the_backward_pass_scales_and_can_be_repeated():
    setting = Setting()
    loss = setting.fused(two_terms()).loss
    once = torch.autograd.grad(loss, setting.inputs(), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, setting.inputs())
    torch.testing.assert_close([3 * g for g in once], list(thrice))


@pytest.mark.parametrize(
    ("frozen", "products"),
    [((), 4), (("weight",), 3), (("hidden",), 3), (("weight", "hidden"), 2)],
    ids=str,
)
def test_only_the_products_that_are_needed(frozen, products):
    setting = Setting()
    setting.hidden.requires_grad_("hidden" not in frozen)
    setting.linear.weight.requires_grad_("weight" not in frozen)
    with CountProducts() as counter:
        sums = setting.fused(two_terms(), distilled=None)
    assert counter.count == products
    assert sums.loss.requires_grad == (len(frozen) < 2)
    if sums.loss.requires_grad:
        setting.check(two_terms())


def test_evaluation_makes_no_gradient():
    setting = Setting()
    trained = setting.fused(two_terms(), distilled=None)
    with torch.no_grad(), CountProducts() as counter:
        sums = setting.fused(two_terms(), distilled=None)
    assert counter.count == 2
    assert not sums.loss.requires_grad
    assert torch.equal(sums.loss, trained.loss.detach())


def test_without_a_teacher():
    setting = Setting()
    with CountProducts() as counter:
        sums = fused_linear(losses.build("cross_entropy"), setting.hidden, setting.head, targets=setting.targets)
    assert counter.count == 3
    want = nn.functional.cross_entropy(setting.linear(setting.hidden), setting.targets, reduction="sum")
    torch.testing.assert_close(sums.loss, want)


def test_a_teacher_that_no_term_reads_costs_nothing():
    with CountProducts() as counter:
        Setting().fused(losses.build("cross_entropy"))
    assert counter.count == 3


def test_the_shared_vocabulary_gets_all_the_gradient():
    setting = Setting(bias=True)
    setting.head.vocabulary = setting.teacher.head.vocabulary = 30
    setting.targets %= 30
    sums = setting.fused(two_terms())
    sums.loss.backward()
    cut = Setting(bias=True)
    student = cut.linear(cut.hidden)[:, :30]
    teacher = cut.teacher.head._linear(cut.teacher.hidden)[:, :30].detach()
    one, other = two_terms()
    kl = one.loss(student[cut.distilled], teacher[cut.distilled]).sum()
    (kl + 0.3 * other.loss(student, None, setting.targets).sum()).backward()
    for a, b in zip(setting.inputs(), cut.inputs(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    assert not setting.linear.weight.grad[30:].any()


@pytest.mark.parametrize("chunk_bytes", [2000, None])
def test_lora_on_the_head(chunk_bytes):
    setting = Setting(n=9)
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["head"], lora_dropout=0.0)
    layer = inject_adapter_in_model(settings, nn.ModuleDict({"head": setting.linear}))["head"].double()
    adapter = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        adapter[1].normal_(generator=torch.Generator().manual_seed(0))
    inputs = [setting.hidden, *adapter]
    targets, head = HiddenTargets(setting.teacher.hidden, setting.teacher.head), LMHead(layer)

    got = fused_linear(two_terms(), setting.hidden, head, targets, setting.targets, chunk_bytes=chunk_bytes).loss
    teacher = setting.teacher.head._linear(setting.teacher.hidden).detach()
    want = sum(t.weight * t.loss(layer(setting.hidden), teacher, setting.targets).sum() for t in two_terms())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))
    with pytest.raises(RuntimeError, match="require grad"):
        torch.autograd.grad(got, layer.base_layer.weight)

    layer.enable_adapters(False)
    with head.weight() as weight:
        assert weight.data_ptr() == layer.base_layer.weight.data_ptr()
    layer.enable_adapters(True)
    layer.lora_dropout["default"] = nn.Dropout(0.1)
    with pytest.raises(ValueError, match="without dropout"), head.weight():
        pass


def test_the_heads_context_is_open_for_the_whole_call_and_closed_after():
    """ZeRO-3 empties the weight outside the context."""
    setting = Setting(bias=True)
    opened = []

    class Guarded(LMHead):
        def weight(self):
            inner = super().weight()

            class Context:
                def __enter__(self):
                    opened.append(True)
                    return inner.__enter__()

                def __exit__(self, *error):
                    opened.pop()
                    return inner.__exit__(*error)

            return Context()

        @property
        def bias(self):
            assert opened
            return super().bias

    class Watching(TotalVariation):
        def forward(self, student_logits, teacher_logits, targets=None):
            assert len(opened) == 2
            return super().forward(student_logits, teacher_logits, targets)

    setting.head = Guarded(setting.linear)
    setting.teacher.head = Guarded(setting.teacher.head._linear)
    setting.fused(Watching()).loss.backward()
    assert not opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype):
    """Logits, losses and sums of gradients are float32; only operands and the finished gradients are rounded."""
    exact, low = Setting(31, 123, bias=True), Setting(31, 123, dtype=dtype, bias=True)
    for a, b in zip([*exact.inputs(), exact.teacher.hidden], [*low.inputs(), low.teacher.hidden], strict=True):
        a.data.copy_(b.data)
    for a, b in zip(exact.teacher.head._linear.parameters(), low.teacher.head._linear.parameters(), strict=True):
        a.data.copy_(b.data)
    want, got = (s.fused(two_terms(), scales={"taid": 1e-6, "data": 1e-6}) for s in (exact, low))
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-6, atol=0)
    (2.0**16 * want.loss).backward()
    (2.0**16 * got.loss).backward()
    for a, b in zip(exact.inputs(), low.inputs(), strict=True):
        assert b.grad.dtype == dtype
        largest = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.double(), a.grad, rtol=torch.finfo(dtype).eps, atol=1e-6 * largest)


def test_autocast_does_not_lower_the_logits():
    setting = Setting(31, 123, dtype=torch.float32)
    plain = setting.fused(two_terms())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = setting.fused(two_terms())
    assert torch.equal(plain.loss, cast.loss)


def test_a_non_finite_logit_shows_in_the_sum():
    setting = Setting()
    with torch.no_grad():
        setting.hidden[setting.distilled.nonzero()[0]] = float("nan")
    sums = setting.fused(two_terms())
    assert sums.loss.isnan()
    assert sums.terms["taid"].signals["cross_entropy"].isnan()


@pytest.mark.parametrize("terms", [two_terms, lambda: [Term("tvd", TotalVariation())]], ids=["closed", "autograd"])
def test_chunk_bytes_bounds_the_memory(terms, benchmark_losses):
    setting = Setting(256, 2000, dtype=torch.float32, softcap=5.0)
    limit, row = 40 * 2000 * 4, 2000 * 4
    peak = benchmark_losses.peak_bytes(lambda: setting.fused(terms(), chunk_bytes=limit, distilled=None))
    gradients = sum(x.numel() for x in setting.inputs()) * 4
    assert peak < limit + gradients + 2 * row
    assert peak < 0.5 * 2 * 256 * row  # both models' whole logits


def test_what_does_not_fit_is_named():
    setting = Setting()
    teacher = setting.teacher
    with pytest.raises(ValueError, match="term 'taid' of the loss needs teacher"):
        fused_linear(two_terms(), setting.hidden, setting.head, None, setting.targets)
    with pytest.raises(ValueError, match="term 'data' of the loss needs targets"):
        fused_linear(two_terms(), setting.hidden, setting.head, teacher)
    with pytest.raises(ValueError, match="share a name: taid, taid"):
        setting.fused(two_terms()[:1] * 2)
    with pytest.raises(ValueError, match="no term"):
        setting.fused([])
    with pytest.raises(ValueError, match="the student has 13 rows, the teacher 12"):
        fused_linear(
            losses.build("taid"), setting.hidden, setting.head, HiddenTargets(teacher.hidden[1:], teacher.head)
        )
    teacher.head.vocabulary = 30
    with pytest.raises(ValueError, match="the student has 37 tokens in the vocabulary, the teacher 30"):
        setting.fused(losses.build("taid"))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "recompute"), [("eager", False), ("eager", True), ("inductor", False)])
def test_torch_compile_leaves_it_alone(backend, recompute):
    """The rest of the module is compiled; the loss and all gradients do not change."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.setting = Setting(dtype=torch.float32)
            self.body, self.linear = nn.Linear(8, 8), self.setting.linear

        def forward(self, x):
            self.setting.hidden = self.body(x).tanh()
            return self.setting.fused(two_terms(), recompute=recompute).loss

    torch.manual_seed(0)
    task, x = Task(), torch.randn(13, 8)
    plain = task(x)
    want = torch.autograd.grad(plain, list(task.parameters()))
    torch.compiler.reset()
    compiled = torch.compile(task, backend=backend)
    got = compiled(x)
    torch.testing.assert_close(got, plain)
    torch.testing.assert_close(torch.autograd.grad(got, list(task.parameters())), want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain)


def test_the_benchmark_compares_equals(benchmark_losses):
    rows = benchmark_losses.measure(benchmark_losses.Shape(16, 200, 8, 12, compared="whole logits"), repeats=1)
    assert [row["side"] for row in rows] == ["products", "ours", "ours_recompute", "full"]
    assert max(row["gradient_difference"] for row in rows[1:]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["taid", "jsd", "reverse_kl", "adaptive_kl"])
def test_bfloat16_on_a_gpu(name, recompute):
    """Triton's kernels and, for adaptive KL, torch's; together with cross-entropy."""
    if name == "adaptive_kl" and recompute:
        pytest.skip("it needs whole rows")
    terms = [Term("taid", losses.build(name)), two_terms()[1]]
    low, exact = Setting(64, 500, 32, 48, dtype=torch.bfloat16, bias=True), Setting(64, 500, 32, 48, bias=True)
    pairs = [*zip(exact.linear.parameters(), low.linear.parameters(), strict=True)]
    pairs += zip(exact.teacher.head._linear.parameters(), low.teacher.head._linear.parameters(), strict=True)
    pairs += [(exact.hidden, low.hidden), (exact.teacher.hidden, low.teacher.hidden)]
    for a, b in pairs:
        a.data.copy_(b.data)
    want = exact.fused(terms)
    want.loss.backward()
    for layer in (low.linear, low.teacher.head._linear):
        layer.cuda()
    low.hidden = low.hidden.detach().cuda().requires_grad_()
    low.teacher.hidden, low.targets, low.distilled = (
        x.cuda() for x in (low.teacher.hidden, low.targets, low.distilled)
    )
    got = low.fused(terms, chunk_bytes=100_000, recompute=recompute)
    got.loss.backward()
    torch.testing.assert_close(got.loss.double().cpu(), want.loss, rtol=1e-5, atol=0)
    for a, b in zip(exact.inputs(), low.inputs(), strict=True):
        largest = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.double().cpu(), a.grad, rtol=2e-2, atol=1e-2 * largest)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("options", [{}, {"recompute": True, "chunk_bytes": 2000}, {"chunk_bytes": 3000}])
def test_several_teachers_mixed_equal_their_mixture(combine, options):
    one, other = Setting(), Setting(h_teacher=5)
    weights = 0.7, 0.3
    terms = [Term("kl", losses.build("reverse_kl")), Term("ce", losses.build("cross_entropy"), 0.5)]
    mixed = MixedTargets([one.teacher, other.teacher], weights, combine)
    if combine == "probabilities" and "recompute" in options:
        with pytest.raises(ValueError, match="mean of probabilities"):
            fused_linear(terms, one.hidden, one.head, mixed, one.targets, **options)
        return
    found = fused_linear(terms, one.hidden, one.head, mixed, one.targets, distilled=one.distilled, **options)
    found.loss.backward()
    gradient, one.hidden.grad = one.hidden.grad, None

    logits = [side.head.logits(side.hidden.double()).double() for side in (one.teacher, other.teacher)]
    if combine == "logits":
        mixture = sum(weight * z for weight, z in zip(weights, logits, strict=True))
    else:
        mixture = sum(weight * z.softmax(-1) for weight, z in zip(weights, logits, strict=True)).log()
    student = one.hidden @ one.linear.weight.t()
    kept = one.distilled
    kl = losses.build("reverse_kl")(student[kept], mixture[kept]).sum()
    expected = kl + 0.5 * nn.functional.cross_entropy(student, one.targets, reduction="sum")
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient, one.hidden.grad, rtol=1e-5, atol=1e-7)
