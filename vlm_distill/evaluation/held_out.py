"""How well a model predicts held-out answers and texts: perplexity, and its KL from a teacher."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from vlm_distill.losses import CrossEntropy, DistillationLoss, ForwardKL, Term, fused_linear
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher

from .runner import AllGather, in_words, notes_on, share

#: Measures that need answers; the others need one forward.
OF_ANSWERS = {"exact", "rouge_l"}


class Samples(Protocol):
    """What is needed of a data source."""

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
        n, tokens: samples, and supervised tokens in them.
        perplexity: exp of the mean cross-entropy; ``None`` where there is no token.
        kl: mean KL(teacher‖model) in nats a token, over the distilled tokens; ``None`` without a teacher.
        skipped: numbers of samples left out, by reason.
    """

    n: int
    tokens: int
    perplexity: float | None
    kl: float | None
    skipped: dict[str, int]

    def values(self, measures: Sequence[str]) -> dict[str, Any]:
        """``tokens`` and those of the measures that are known, by name."""
        values = {name: value for name, value in asdict(self).items() if name in measures and value is not None}
        return {**values, "tokens": self.tokens}


@torch.no_grad()
def measure(
    model: VisionLanguageModel,
    teacher: Teacher | None,
    source: Samples,
    collator: Collator,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    skipped: list[Problem] | None = None,
) -> HeldOut:
    """One forward of the model, and of the teacher if there is one, over a source's samples.

    Batches are cut once from the source sorted by length and dealt to the ranks in turn; every rank makes the same
    number of forwards, empty ones too, because under ZeRO-3 ranks wait for each other in them.

    Args:
        teacher: with the same tokens as the model; its processor is the collator's.
        collator: of the model and the teacher.
        batch_size: samples in a forward.
        limit: as in :func:`~.runner.evaluate`.
        all_gather: needed when ``world`` > 1.
        skipped: receives the samples that were left out, of all ranks.

    Returns:
        The same on every rank.
    """
    if world > 1 and all_gather is None:
        raise ValueError("measuring on several ranks needs all_gather")
    rows = sorted(share(source, limit), key=lambda i: (source.size(i), i))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses: list[DistillationLoss] = [CrossEntropy()] if teacher is None else [CrossEntropy(), ForwardKL()]
    terms = [Term(str(number), loss) for number, loss in enumerate(losses)]
    device = next(model.parameters()).device
    totals = [0.0] * 5  # samples, then sum and tokens of each term
    problems: list[Problem] = []
    training = model.training
    model.eval()
    try:
        for turn in range(math.ceil(len(batches) / world)):
            number = turn * world + rank
            pairs: list[Pair] = []
            for row in batches[number] if number < len(batches) else []:
                try:
                    sample = source[row]
                    images = [] if isinstance(sample, Document) else [load(image) for image in sample.images]
                    pairs += collator.encode(sample, images)
                except BadSample as bad:
                    problems.append(Problem(source.name, source.line(row), bad.reason, bad.detail))
            batch = collator.batch(pairs).to(device)
            targets = None if teacher is None else teacher.outputs(batch).targets
            hidden = model(batch.student.inputs.to(device, model.dtype), batch.student.positions).hidden
            sums = fused_linear(terms, hidden, model.head, targets, batch.targets, distilled=batch.distilled)
            totals[0] += batch.samples
            for place, term in enumerate(terms):
                found = sums.terms[term.name]
                totals[1 + 2 * place] += float(found.loss)
                totals[2 + 2 * place] += found.count
    finally:
        model.train(training)
    parts: list[tuple[list[float], list[Problem]]] = [(totals, problems)]
    if all_gather is not None:
        parts = [part for gathered in all_gather(parts) for part in gathered]
    n, loss, tokens, kl, distilled = (math.fsum(column) for column in zip(*(part[0] for part in parts), strict=True))
    left_out = sorted((problem for part in parts for problem in part[1]), key=lambda problem: problem.line)
    if skipped is not None:
        skipped += left_out
    return HeldOut(
        int(n),
        int(tokens),
        math.exp(min(loss / tokens, 700.0)) if tokens else None,
        kl / distilled if distilled else None,
        dict(Counter(problem.reason for problem in left_out)),
    )


def add_to_scores(folder: Path, measures: Sequence[str], values: Mapping[str, Any]) -> None:
    """Writes what was measured into ``scores.json``, beside what stands there of answers where there were any."""
    path = folder / "scores.json"
    answered = OF_ANSWERS & set(measures) and path.is_file()
    scores = json.loads(path.read_text("utf-8")) if answered else {}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(scores | {"measures": list(measures)} | dict(values), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def measured_in_words(values: Mapping[str, Any]) -> str:
    """What was measured on a source, for a person."""
    words = [in_words(values)] if "exact" in values else []
    if "rouge_l" in values:
        words.append(f"ROUGE-L {values['rouge_l']:.2%} on {values['n']:,} samples")
    if "perplexity" in values:
        words.append(f"perplexity {values['perplexity']:.4g}")
    if "kl" in values:
        words.append(f"KL {values['kl']:.4f} nats a token")
    if "exact" not in values:  # which says it already
        words += notes_on(values)
    return ", ".join(words) if values["n"] else "nothing could be read"
