"""Measure how well a model predicts held-out answers and texts: perplexity, and KL from a teacher."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from data.batch import Problem
from data.collate import Collator
from data.conversation import Conversation, Document, ImageSource
from data.encoding import Pair
from data.errors import BadSample
from data.images import load_image
from data.sample_images import load_images
from vlm_distill.losses import CrossEntropy, DistillationLoss, ForwardKL, Term, fused_linear
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.runtime.rank_share import RankShare

from .question_source import share
from .source_scores import in_words, notes_on

#: Measures that need generated answers; the others need one forward pass.
OF_ANSWERS = {"exact", "rouge_l"}


class Samples(Protocol):
    """What measuring needs of a data source (``data.sources.Source`` is one)."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation | Document: ...
    def size(self, index: int, /) -> int: ...
    def line(self, index: int, /) -> int: ...


@dataclass(frozen=True)
class HeldOut:
    """Means over supervised tokens.

    Attributes:
        n, tokens: number of samples, and of supervised tokens in them.
        perplexity: exp of the mean cross-entropy; ``None`` without tokens.
        kl: mean KL(teacher‖model) in nats per distilled token; ``None`` without a teacher.
        skipped: number of samples left out, by reason.
        limited_from: number of samples in the source, if a limit left some out.
    """

    n: int
    tokens: int
    perplexity: float | None
    kl: float | None
    skipped: dict[str, int]
    limited_from: int | None = None

    def values(self, measures: Sequence[str]) -> dict[str, Any]:
        """Return those of ``measures`` that were measured, by name, with ``n``, ``tokens`` and what limits them."""
        measured = {name: value for name, value in asdict(self).items() if name in measures and value is not None}
        limit = {} if self.limited_from is None else {"limited_from": self.limited_from}
        return {"n": self.n, **measured, "tokens": self.tokens, **limit}


@torch.no_grad()
def measure(
    model: VisionLanguageModel,
    teacher: Teacher | None,
    source: Samples,
    collator: Collator,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    ranks: RankShare = RankShare(),  # noqa: B008 - frozen
    load: Callable[[ImageSource], Image.Image] = load_image,
    skipped: list[Problem] | None = None,
) -> HeldOut:
    """Run the model, and the teacher if there is one, once over a source's samples.

    Batches are cut once from the source sorted by length and dealt to the ranks in turn. Every rank runs the same
    number of forwards, including empty ones, because under ZeRO-3 ranks wait for each other in them.

    Args:
        teacher: must have the model's tokens; its processor is the collator's.
        collator: of the model and the teacher.
        batch_size: samples per forward.
        limit: measure only this many samples, evenly spaced.
        ranks: this process's share. Every rank makes the same call.
        load: decodes an image.
        skipped: receives the samples that were left out, from all ranks.

    Returns:
        The same on every rank.
    """
    rows = sorted(share(source, limit), key=lambda i: (source.size(i), i))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses: list[DistillationLoss] = [CrossEntropy()] if teacher is None else [CrossEntropy(), ForwardKL()]
    terms = [Term(str(number), loss) for number, loss in enumerate(losses)]
    device = next(model.parameters()).device
    totals, problems = _Totals(), list[Problem]()
    training = model.training
    model.eval()
    try:
        for own in ranks.deal(batches):
            batch = collator.batch(_read_pairs(source, own, collator, load, problems)).to(device)
            targets = None if teacher is None else teacher.outputs(batch).targets
            hidden = model(batch.student.inputs.to(device, model.dtype), batch.student.positions).hidden
            sums = fused_linear(terms, hidden, model.head, targets, batch.targets, distilled=batch.distilled)
            summed = [sums.terms[term.name] for term in terms]
            totals.add(batch.samples, [(float(term.loss), term.count) for term in summed])
    finally:
        model.train(training)
    parts = ranks.gather((totals, problems))
    found = _Totals.of([part for part, _ in parts])
    left_out = sorted((problem for _, part in parts for problem in part), key=lambda problem: problem.line)
    if skipped is not None:
        skipped += left_out
    return HeldOut(
        int(found.samples),
        int(found.tokens),
        math.exp(min(found.cross_entropy / found.tokens, 700.0)) if found.tokens else None,
        found.kl / found.distilled if found.distilled else None,
        dict(Counter(problem.reason for problem in left_out)),
        len(source) if len(rows) < len(source) else None,
    )


@dataclass
class _Totals:
    """Sums over samples: cross-entropy over supervised tokens, and KL over distilled ones."""

    samples: float = 0.0
    cross_entropy: float = 0.0
    tokens: float = 0.0
    kl: float = 0.0
    distilled: float = 0.0

    @classmethod
    def of(cls, parts: Sequence[_Totals]) -> _Totals:
        """Return the sum over ranks."""
        return cls(*(math.fsum(column) for column in zip(*map(astuple, parts), strict=True)))

    def add(self, samples: int, sums: Sequence[tuple[float, int]]) -> None:
        """Add one batch: sum and token count of cross-entropy, and of KL if there is a teacher."""
        self.samples += samples
        self.cross_entropy += sums[0][0]
        self.tokens += sums[0][1]
        if len(sums) > 1:
            self.kl += sums[1][0]
            self.distilled += sums[1][1]


def _read_pairs(
    source: Samples,
    rows: Sequence[int],
    collator: Collator,
    load: Callable[[ImageSource], Image.Image],
    problems: list[Problem],
) -> list[Pair]:
    """Return these rows as the models take them; those that cannot be used become problems."""
    pairs: list[Pair] = []
    for row in rows:
        try:
            sample, images = load_images(source[row], load)
            pairs += collator.encode(sample, images)
        except BadSample as bad:
            problems.append(Problem(source.name, source.line(row), bad.reason, bad.detail))
    return pairs


def add_to_scores(folder: Path, measures: Sequence[str], values: Mapping[str, Any]) -> None:
    """Add what was measured to ``scores.json``, which already holds the scores of answers if there were any."""
    path = folder / "scores.json"
    answered = OF_ANSWERS & set(measures) and path.is_file()
    scores = json.loads(path.read_text("utf-8")) if answered else {}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(scores | {"measures": list(measures)} | dict(values), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def measured_in_words(values: Mapping[str, Any]) -> str:
    """Return what was measured on a source in words."""
    words = [in_words(values)] if "exact" in values else []
    if "rouge_l" in values:
        words.append(f"ROUGE-L {values['rouge_l']:.2%} on {values['n']:,} samples")
    if "perplexity" in values:
        words.append(f"perplexity {values['perplexity']:.4g}")
    if "kl" in values:
        words.append(f"KL {values['kl']:.4f} nats a token")
    if "exact" not in values:  # in_words includes the notes
        words += notes_on(values)
    return ", ".join(words) if values["n"] else "nothing could be read"
