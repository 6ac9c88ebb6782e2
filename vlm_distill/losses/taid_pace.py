"""The pace of TAID's adaptive schedule, from how fast the student closes in on its teacher."""

from __future__ import annotations

import math


class Pace:
    """How fast TAID's adaptive t may move: 0 to 2, and 1 if the student's gap shrinks by a factor e² over the run.

    The gap is KL(p_t‖q) without what t itself has done to it: at each step the logarithm of the KL is lowered by
    e·Δlog t, where e = dlog KL(p_t‖q)/dlog t for a student that stands still, averaged over the two steps. The gap of a
    student that learns nothing therefore stays constant, however t moves. The slope of its logarithm over training is
    estimated from two exponential means with time constants of 1 and 5 % of the run, whose centres are 4 % apart. The
    pace is 2·sigmoid(slope − 2). A non-finite gap changes nothing.
    """

    FAST, SLOW, NEUTRAL = 0.01, 0.05, 2.0

    def __init__(self, *state: float) -> None:
        self._fast, self._slow, self._seen, self._by_t, self._t, self._elasticity = state or (0.0,) * 6

    def state(self) -> tuple[float, ...]:
        """Return what the constructor takes."""
        return self._fast, self._slow, self._seen, self._by_t, self._t, self._elasticity

    def after(self, kl: float, slope: float, t: float, steps: int) -> float:
        """Return the pace after one more step.

        Args:
            kl: KL(p_t‖q) of the step.
            slope: dKL/dlog t of the step.
            t: used in the step.
            steps: of the whole run.
        """
        if math.isfinite(kl) and math.isfinite(slope) and kl > 0.0 and t > 0.0:
            elasticity = slope / kl
            if self._t > 0.0:
                self._by_t += (elasticity + self._elasticity) / 2.0 * math.log(t / self._t)
            self._t, self._elasticity = t, elasticity
            gap = kl * math.exp(-self._by_t)
            self._seen += 1
            # Plain means at first, so that the means do not start from an arbitrary value.
            self._fast += (gap - self._fast) / min(self._seen, max(1.0, self.FAST * steps))
            self._slow += (gap - self._slow) / min(self._seen, max(1.0, self.SLOW * steps))
        if self._seen < max(2.0, self.SLOW * steps):
            return 1.0
        shrinking = (math.log(self._slow) - math.log(self._fast)) / (self.SLOW - self.FAST)
        return 2.0 * sigmoid(shrinking - self.NEUTRAL)


def sigmoid(x: float) -> float:
    """Compute the logistic function without overflow."""
    small = math.exp(-abs(x))
    return 1.0 / (1.0 + small) if x >= 0 else small / (1.0 + small)
