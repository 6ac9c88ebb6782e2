"""The alpha-beta divergence, which contains forward and reverse KL (ABKD)."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence
from .errors import LossError
from .kernels import ALPHA_BETA_FLOOR, Form, Kind
from .parameters import check_choice, check_number
from .softmax import Softmax, through_softmax_

# Exponents smaller than this count as 0: the divergence differs there by less than rounding would.
_ZERO = 1e-7
# Below this, differences of powers are computed by expm1, and in float64 if both exponents are smaller.
_SMALL = 0.05


class AlphaBeta(Divergence):
    """Alpha-beta divergence, −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] (Wang et al., ABKD, 2025).

    α = 1 and β = 0 give KL(p‖q), α = 0 and β = 1 give KL(q‖p). A larger α puts weight on tokens that the teacher likes
    and the student does not; a larger β puts it on the student's own likely tokens. Where α, β or α+β is 0, the
    divergence is its limit.

    Args:
        alpha: α, from −2 to 2.
        beta: β, from −2 to 2.
        temperature: divides both models' logits.
        convention: ``limit``, or ``authors``: as in their code, the divergence is multiplied by α where β or α+β is
            0, and by β where α is 0, so that it jumps there unless that exponent is 1.
    """

    label = "alpha_beta"
    scratch = 2

    def __init__(
        self, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0, convention: str = "limit"
    ) -> None:
        super().__init__(temperature)
        self.alpha = _exponent(check_number("loss alpha_beta: alpha", alpha, -2.0, 2.0))
        self.beta = _exponent(check_number("loss alpha_beta: beta", beta, -2.0, 2.0))
        self.total = _exponent(self.alpha + self.beta)
        self._multiplier = 1.0
        if check_choice("loss alpha_beta: convention", convention, ("limit", "authors")) == "authors":
            self._multiplier = self._of_authors()
        if not self._multiplier > 0:
            raise LossError(
                f"loss alpha_beta: by convention authors, alpha {alpha} and beta {beta} give a negative divergence; "
                "leave convention out"
            )

    def _of_authors(self) -> float:
        """Return the authors' factor of the divergence."""
        if self.alpha != 0.0 and (self.beta == 0.0 or self.total == 0.0):
            return self.alpha
        if self.alpha == 0.0 and self.beta != 0.0:
            return self.beta
        return 1.0

    def kernel_form(self) -> Form | None:
        # Near an axis the kernels would lose digits.
        if self._is_near_axis():
            return None
        return Form(Kind.ALPHA_BETA, self.alpha, self.temperature, beta=self.beta)

    def _is_near_axis(self) -> bool:
        return min(abs(self.alpha), abs(self.beta), abs(self.total)) < _SMALL

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        outside = (log_p == -torch.inf) & (log_q == -torch.inf)
        x, y = torch.where(outside, 0.0, log_p), torch.where(outside, 0.0, log_q)
        a, b = self.alpha, self.beta
        # Exchanging p with q and α with β changes nothing: divide by the larger exponent only.
        if abs(a) < abs(b):
            x, y, a, b = y, x, b, a
        if abs(a) < _SMALL:
            x, y = x.double(), y.double()
        if a == 0.0:
            return (0.5 * self._multiplier * (y - x).square()).sum(-1).to(log_q.dtype)
        # 1/α Σ [(q^(α+β) − p^(α+β))/(α+β) − p^α (q^β − p^β)/β]; at p = 0 the second product is 0.
        power = torch.exp(a * x)
        inner = power * torch.where(power > 0, _difference(y, x, b), 0.0)
        summands = (_difference(y, x, self.total) - inner) * (self._multiplier / a)
        return summands.sum(-1).to(log_q.dtype)

    def value_and_grad(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        a, b, s = self.alpha, self.beta, self.total
        if self._is_near_axis():
            return self._near_axes(p, q, grad=grad)
        x, y = p.log_probs.clamp_(min=ALPHA_BETA_FLOOR), q.log_probs.clamp_(min=ALPHA_BETA_FLOOR)
        mixed = torch.mul(x, a, out=p.probs).add_(y, alpha=b).exp_()
        theirs = x.mul_(s).exp_().sub_(mixed)
        own = y.mul_(s).exp_().sub_(mixed)
        loss = (own.sum(-1) + a / b * theirs.sum(-1)) / (a * s)
        if not grad:
            return loss, None
        # (q^(α+β) − p^α q^β)/α
        return loss, through_softmax_(own.div_(a), q.probs)

    def _near_axes(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """Compute what ``value_and_grad`` does where an exponent is near 0; slower."""
        x, y = p.log_probs, q.log_probs
        loss = self.value(x, y)
        if not grad:
            return loss, None
        # q^β (q^α − p^α)/α; 0 for tokens outside the vocabulary.
        outside = (x == -torch.inf) & (y == -torch.inf)
        x, y = x.masked_fill(outside, 0.0), y.masked_fill(outside, 0.0)
        power = torch.exp(self.beta * y)
        slope = power * torch.where(power > 0, _difference(x, y, self.alpha), 0.0)
        return loss, through_softmax_(slope.mul_(-self._multiplier), q.probs)


def _exponent(value: float) -> float:
    return 0.0 if abs(value) < _ZERO else value


def _difference(log_u: Tensor, log_v: Tensor, exponent: float) -> Tensor:
    """Compute (u^e − v^e)/e, or log u − log v at e = 0; without cancellation at small e. Wants v > 0 if e is small."""
    if abs(exponent) >= _SMALL:
        return (torch.exp(exponent * log_u) - torch.exp(exponent * log_v)) / exponent
    gap = log_u - log_v
    if exponent == 0.0:
        return gap
    # The limit matters at v = 0 alone, where the product must not be 0·∞.
    return torch.exp(exponent * log_v) * torch.expm1((exponent * gap).clamp(max=80.0)) / exponent
