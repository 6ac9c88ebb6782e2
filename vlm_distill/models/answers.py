"""A model's answers, and how their tokens are chosen: greedily, or drawn reproducibly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass
class Answer:
    """A model's answer.

    Attributes:
        text: without special tokens.
        token_ids: with the end token.
        logprobs: of these tokens, in nats.
        complete: whether the answer ended by itself; false if it was cut at the maximum length.
        marked: the text with marks around thoughts that ``text`` lacks: special tokens, and the ``<think>`` with which
            the chat template's opening ends. ``None`` if it equals ``text``.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    complete: bool = True
    marked: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: each from a random generator of its own, so that the batch around it does not matter.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest of the allowed tokens.
        generators: one for each prompt, asked for one number a token.
    """

    temperature: float
    generators: Sequence[random.Random]


class TokenChoice(LogitsProcessor):
    """Chooses each token, greedily or by drawing, and records its log-probability; keeps no logits.

    A token is drawn by inverting the cumulative distribution at one uniform number. All other tokens become impossible,
    so that greedy generation takes it: neither the process's random state nor other rows influence the choice.

    Args:
        sampling: ``None``: greedy.
        vocabulary: ids from here on are never drawn; ``None``: no limit.
        barred: further ids that are never drawn.
    """

    def __init__(self, sampling: Sampling | None, vocabulary: int | None, barred: set[int]) -> None:
        self.sampling, self.vocabulary, self.barred = sampling, vocabulary, barred
        self.columns: list[Tensor] = []
        self._ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.sampling is None:
            self.columns.append(scores.max(-1).values - scores.logsumexp(-1))
            return scores
        chosen = self._drawn(scores, self.sampling)
        self.columns.append(scores.gather(-1, chosen).squeeze(-1) - scores.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _drawn(self, scores: Tensor, sampling: Sampling) -> Tensor:
        """Draw one id a row, ``[B, 1]``."""
        # In float64: a sum of this many small numbers is too inexact in float32.
        logits = scores.double()
        if self.vocabulary is not None:
            logits[:, self.vocabulary :] = -torch.inf
        logits.index_fill_(-1, self._barred_ids(logits), -torch.inf)
        if not sampling.temperature:
            return logits.argmax(-1, keepdim=True)
        numbers = [generator.random() for generator in sampling.generators]
        numbers += [0.5] * (len(scores) - len(numbers))  # a dummy row
        if sampling.temperature != 1.0:
            logits /= sampling.temperature
        total = logits.softmax(-1).cumsum(-1)
        mark = torch.tensor(numbers, dtype=total.dtype, device=total.device).unsqueeze(-1) * total[:, -1:]
        return torch.searchsorted(total, mark, right=True).clamp_(max=total.shape[-1] - 1)

    def _barred_ids(self, logits: Tensor) -> Tensor:
        """Return the barred ids within the logits as a tensor, made once: a list would be copied for every token."""
        if self._ids is None:
            within = [token for token in sorted(self.barred) if token < logits.shape[-1]]
            self._ids = torch.tensor(within, dtype=torch.int64, device=logits.device)
        return self._ids
