"""A model's answers, and how their tokens are chosen: greedily, or drawn reproducibly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

# Tokens whose probabilities are added up at once before one of them is looked for.
_BLOCK = 128


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


class TokenChoice:
    """Chooses each token, greedily or by drawing.

    A token is drawn by inverting the cumulative distribution at one uniform number: neither the process's random state
    nor other rows influence the choice.

    Args:
        sampling: ``None``: greedy.
        vocabulary: ids from here on are never drawn; ``None``: no limit.
        barred: further ids that are never drawn.
    """

    def __init__(self, sampling: Sampling | None, vocabulary: int | None, barred: set[int]) -> None:
        self.sampling, self.vocabulary, self.barred = sampling, vocabulary, barred
        self._ids: Tensor | None = None

    def choose(self, logits: Tensor, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return each row's next token, and its log-probability among all tokens at temperature 1; both ``[B]``.

        Args:
            logits: float32 ``[B, V]``; may be overwritten.
            prompts: the number of each row's prompt, whose generator is asked. One beyond them is a dummy row's.
        """
        total = logits.logsumexp(-1)
        if self.sampling is None:
            best, chosen = logits.max(-1)
            return chosen, best - total
        if self.vocabulary is not None:
            logits[:, self.vocabulary :] = -torch.inf
        logits.index_fill_(-1, self._barred_ids(logits), -torch.inf)
        if not self.sampling.temperature:
            best, chosen = logits.max(-1)
            return chosen, best - total
        chosen = self._drawn(logits, self.sampling, prompts)
        return chosen, logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - total

    def _drawn(self, logits: Tensor, sampling: Sampling, prompts: Sequence[int]) -> Tensor:
        """Draw one id a row, ``[B]``: the first whose cumulative probability exceeds the row's number."""
        generators = sampling.generators
        numbers = [generators[prompt].random() if prompt < len(generators) else 0.5 for prompt in prompts]

        # Probabilities up to a factor, in blocks.
        likely = logits - logits.amax(-1, keepdim=True)
        if sampling.temperature != 1.0:
            likely /= sampling.temperature
        blocks = nn.functional.pad(likely.exp_(), (0, -likely.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))

        # Find the block, then the token in it. In float64: a sum of this many small numbers is too inexact in float32.
        totals = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
        mark = torch.tensor(numbers, dtype=totals.dtype, device=totals.device).unsqueeze(-1) * totals[:, -1:]
        block = _first_above(totals, mark)
        before = totals.gather(-1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
        inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
        return (block * _BLOCK + _first_above(inside, mark - before)).squeeze(-1)

    def _barred_ids(self, logits: Tensor) -> Tensor:
        """Return the barred ids within the logits as a tensor, made once: a list would be copied for every token."""
        if self._ids is None:
            within = [token for token in sorted(self.barred) if token < logits.shape[-1]]
            self._ids = torch.tensor(within, dtype=torch.int64, device=logits.device)
        return self._ids


def _first_above(totals: Tensor, mark: Tensor) -> Tensor:
    """Return where cumulative sums ``[B, n]`` first exceed ``mark [B, 1]``, or reach their end; int64 ``[B, 1]``."""
    # Rounding may leave a mark at the very end, where the rest of the row adds nothing.
    end = torch.searchsorted(totals, totals[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(totals, mark, right=True), end)


class ForcedChoice(LogitsProcessor):
    """Makes Transformers' greedy generation take the tokens that a :class:`TokenChoice` chooses.

    All other tokens become impossible. ``columns`` collects the tokens' log-probabilities ``[B]``.
    """

    def __init__(self, choice: TokenChoice) -> None:
        self.choice = choice
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen, logprobs = self.choice.choose(scores.float(), range(len(scores)))
        self.columns.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen.unsqueeze(-1), 0.0)
