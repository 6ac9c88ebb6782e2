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
        token_ids, logprobs: with the end token; log-probabilities in nats.
        complete: false where the answer was cut at the longest that was allowed, so that it has no end token.
        marked: the text with the marks around thoughts, where ``text`` lacks them: those that are special tokens, and
            the one that the chat template's opening ends with (``<think>``). ``None`` where it equals ``text``.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    complete: bool = True
    marked: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, each from random numbers of its own: it depends on no other answer beside it.

    Attributes:
        temperature: the logits are divided by it; at 0 the likeliest of the tokens that may be drawn are taken.
        generators: one for each prompt. An answer takes a number for each of its tokens.
    """

    temperature: float
    generators: Sequence[random.Random]


class TokenChoice(LogitsProcessor):
    """Chooses each token, the likeliest or a drawn one, and records its log-probability; keeps no logits.

    A token is drawn by inverting the cumulative distribution at one uniform number. Generation stays greedy and finds
    only that token possible: no random state of the process, nor the rows beside it, has a part in the choice.

    Args:
        sampling: ``None`` for the likeliest tokens.
        vocabulary: ids from here on are never drawn; ``None``: all may be.
        barred: further ids that are not.
    """

    def __init__(self, sampling: Sampling | None, vocabulary: int | None, barred: set[int]) -> None:
        self.sampling, self.vocabulary, self.barred = sampling, vocabulary, barred
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.sampling is None:
            self.columns.append(scores.max(-1).values - scores.logsumexp(-1))
            return scores
        chosen = self._drawn(scores, self.sampling)
        self.columns.append(scores.gather(-1, chosen).squeeze(-1) - scores.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _drawn(self, scores: Tensor, sampling: Sampling) -> Tensor:
        """One id a row, ``[B, 1]``."""
        # In float64: a sum of so many small numbers is rounded too much otherwise.
        logits = scores.double()
        if self.vocabulary is not None:
            logits[:, self.vocabulary :] = -torch.inf
        logits[:, [token for token in self.barred if token < logits.shape[-1]]] = -torch.inf
        if not sampling.temperature:
            return logits.argmax(-1, keepdim=True)
        numbers = [generator.random() for generator in sampling.generators]
        numbers += [0.5] * (len(scores) - len(numbers))  # a dummy row
        total = (logits / sampling.temperature).softmax(-1).cumsum(-1)
        mark = torch.tensor(numbers, dtype=total.dtype, device=total.device).unsqueeze(-1) * total[:, -1:]
        return (total <= mark).sum(-1, keepdim=True).clamp_(max=total.shape[-1] - 1)
