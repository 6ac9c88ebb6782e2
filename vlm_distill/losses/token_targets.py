"""Teachers that give the log-probabilities of the answer's own tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TokenTargets:
    """The outputs of a cached or served teacher that keeps one number a token.

    Attributes:
        logprobs: ``[M]`` nats, the log-probability of each of the teacher's supervised tokens at temperature 1.
    """

    logprobs: Tensor

    def __len__(self) -> int:
        return len(self.logprobs)

    def __getitem__(self, rows: slice) -> TokenTargets:
        return TokenTargets(self.logprobs[rows])
