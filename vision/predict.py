"""A classifier's answers to labelled images, on any number of ranks, and their scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.batch import Problem
from data.conversation import ImageSource
from data.errors import BadSample, UserError
from data.images import load_image
from data.workers import make_loader
from vlm_distill.evaluation.pictures import write_pictures
from vlm_distill.evaluation.predictions import Prediction, image_key, write_predictions
from vlm_distill.evaluation.question_source import evenly_spaced
from vlm_distill.evaluation.rank_share import AllGather

from . import imagenet
from .metrics import Answers, measure, summarise, together

if TYPE_CHECKING:
    from data.classification import LabelledImage, LabelledImages

    from .classifier import Classifier
    from .inputs import InputSettings

# Pictures that are kept for the report: mostly of wrong answers, where models differ.
_WRONG_PICTURES, _RIGHT_PICTURES = 60, 20


class _Item(NamedTuple):
    row: int
    label: int
    right: Sequence[int]
    key: str
    pixels: Tensor


class _Batch(NamedTuple):
    """uint8 ``[N, 3, H, W]`` with what is known of the N images, and those that cannot be read."""

    rows: list[int]
    labels: list[int]
    right: list[list[int]]
    keys: list[str]
    pixels: Tensor
    problems: list[Problem]


def predict(
    classifier: Classifier,
    source: LabelledImages,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
    out: Path | None = None,
    pictures: Path | None = None,
    label_map: Sequence[int] | Tensor | None = None,
    only_mapped: bool = False,
    references: Callable[[LabelledImage], Sequence[int]] | None = None,
    logits: dict[int, Tensor] | None = None,
    teacher: Mapping[int, Tensor] | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    skipped: list[Problem] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """A classifier's scores on a source: timm's evaluation transform, one view, no augmentation.

    Batches are cut once from the source and dealt to the ranks in turn: neither their content nor a score depends on
    ``world``. Every rank makes the same number of forward passes. Images that cannot be read are left out of the scores
    and listed in ``skipped``.

    Args:
        classifier: a ``vision.classifier.Classifier``, or what has its ``inputs``, ``classes`` and forward; on
            ``device``. Its mode is put back to what it was.
        source: images with labels; names of its classes that are ImageNet's synsets are written out.
        workers: processes that decode, of this rank; 0 decodes in this one.
        dtype: of autocast in the forward passes; ``None`` computes in the weights' own.
        limit: ask only about this many images, evenly spaced over the source.
        all_gather: gives every rank's list to every rank; needed when ``world`` > 1.
        out: folder for ``predictions.jsonl`` and ``scores.json``, written by rank 0.
        pictures: folder for small copies of pictures that are no files, for the report's gallery.
        label_map: of each of the source's labels, the classifier's output; by default the outputs are in their order.
        only_mapped: only these outputs compete; otherwise all that the classifier has.
        references: all right labels of an image, where there may be several; ``BadSample`` leaves it out.
        logits: receives this rank's logits of the source's classes, float32 ``[K]`` on the CPU, by row.
        teacher: such logits of a teacher, from the same ``batch_size``, ``limit`` and ranks, to be compared with.
        load: decodes an image.
        skipped: receives the images that were left out, of all ranks.
        progress: called with (images done over all ranks, images in all) after each batch.

    Returns:
        As :func:`vision.metrics.summarise`, with ``skipped``, reason to number; the same on every rank.

    Raises:
        UserError: the source has classes that the classifier has no output for.
    """
    if world > 1 and all_gather is None:
        raise ValueError("evaluation on several ranks needs all_gather")
    device = torch.device(device)
    places = torch.as_tensor(range(len(source.classes)) if label_map is None else label_map)
    inputs = classifier.inputs
    rows = evenly_spaced(len(source), limit)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rounds = math.ceil(len(batches) / world)
    mine = [batches[i] if i < len(batches) else [] for i in range(rank, rounds * world, world)]
    loader = make_loader(_Views(source, mine, inputs, load, references), 0, len(mine), min(workers, len(mine)))
    normalise = _Normalise(inputs, device, channels_last)
    names = imagenet.readable(source.classes)
    parts: list[Answers] = []
    facts: dict[int, tuple[str, list[int]]] = {}  # of a row: its image's key and its right labels
    problems: list[Problem] = []
    width = 0
    with _evaluating(classifier), torch.no_grad():
        for done, batch in enumerate(loader, start=1):
            # Ranks may wait for each other inside a forward pass: none leaves one out, and a blank image fills in.
            blank = torch.zeros(1, 3, *inputs.size, dtype=torch.uint8)
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
                raw = classifier(normalise(batch.pixels if batch.rows else blank)).logits[: len(batch.rows)]
            raw = raw.float()
            width = _width(raw, source, places)
            problems += batch.problems
            if batch.rows:
                known = raw[:, places.to(raw.device)]
                if logits is not None:
                    logits.update(zip(batch.rows, known.cpu(), strict=True))
                pair = None if teacher is None else (known, _theirs(teacher, batch.rows).to(known.device))
                compete = known if only_mapped else raw
                right = torch.zeros(compete.shape, dtype=torch.bool)
                for k, labels in enumerate(batch.right):
                    right[k, list(labels) if only_mapped else places[list(labels)]] = True
                parts.append(measure(batch.rows, batch.labels, compete, right.to(raw.device), pair))
                facts.update(zip(batch.rows, zip(batch.keys, batch.right, strict=True), strict=True))
            if progress is not None:
                progress(min(done * world * batch_size, len(rows)), len(rows))

    if all_gather is not None:
        gathered = [part for found in all_gather([(parts, facts, problems)]) for part in found]
        parts = [part for found, _, _ in gathered for part in found]
        facts = {row: fact for _, found, _ in gathered for row, fact in found.items()}
        problems = [problem for _, _, found in gathered for problem in found]
    problems.sort(key=lambda problem: problem.line)
    if skipped is not None:
        skipped += problems
    answers = together(parts)
    scores = summarise(answers, names) | {"skipped": dict(Counter(problem.reason for problem in problems))}
    if rank == 0 and (out is not None or pictures is not None):
        said = dict(enumerate(names)) if only_mapped else _output_names(classifier, names, places, width)
        predictions = _predictions(answers, source, names, said, facts)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_predictions(out / "predictions.jsonl", predictions)
            (out / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if pictures is not None:
            wrong = [p for p in predictions if not p.exact]
            right_ones = [p for p in predictions if p.exact]
            shown = [wrong[i] for i in evenly_spaced(len(wrong), _WRONG_PICTURES)]
            shown += [right_ones[i] for i in evenly_spaced(len(right_ones), _RIGHT_PICTURES)]
            write_pictures(pictures, shown, lambda row: source[row].image, load)
    return scores


def in_words(scores: Mapping[str, Any]) -> str:
    """The overall scores of :func:`predict`, for a person."""
    if not scores["n"]:
        return "no image could be read"
    text = f"top-1 {scores['exact']:.2%}, top-5 {scores['top5']:.2%} on {scores['n']:,} images"
    return text + (f", agrees with the teacher on {scores['agreement']:.2%}" if "agreement" in scores else "")


class _Views(Dataset[_Batch]):
    """Batches of images as timm's evaluation has them, before they are normalised."""

    def __init__(
        self,
        source: LabelledImages,
        batches: Sequence[Sequence[int]],
        inputs: InputSettings,
        load: Callable[[ImageSource], Image.Image],
        references: Callable[[LabelledImage], Sequence[int]] | None,
    ) -> None:
        self.source, self.batches, self.load, self.references = source, batches, load, references
        # Not normalised: bytes are a quarter of what floats are on their way to the device.
        self.view = create_transform(
            (3, *inputs.size),
            interpolation=inputs.interpolation,
            crop_pct=inputs.crop_pct,
            normalize=False,
        )

    def __getitem__(self, index: int) -> _Batch:
        items = [self._read(row) for row in self.batches[index]]
        good = [item for item in items if isinstance(item, _Item)]
        return _Batch(
            [item.row for item in good],
            [item.label for item in good],
            [list(item.right) for item in good],
            [item.key for item in good],
            torch.stack([item.pixels for item in good]) if good else torch.empty(0, dtype=torch.uint8),
            [item for item in items if isinstance(item, Problem)],
        )

    def _read(self, row: int) -> _Item | Problem:
        try:
            item = self.source[row]
            right = [item.label] if self.references is None else self.references(item)
            return _Item(row, item.label, right, image_key(item.image), self.view(self.load(item.image)))
        except BadSample as bad:
            return Problem(self.source.name, self.source.line(row), bad.reason, bad.detail)


class _Normalise:
    """uint8 to what the classifier takes: ``(x / 255 − mean) / std``, on the device."""

    def __init__(self, inputs: InputSettings, device: torch.device, channels_last: bool) -> None:
        self.device = device
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (inputs.mean, inputs.std))
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.device, non_blocking=True).float().div_(255).sub_(self.mean).div_(self.std)
        return x.contiguous(memory_format=self.format)


@contextmanager
def _evaluating(classifier: nn.Module) -> Iterator[None]:
    training = classifier.training
    classifier.eval()
    try:
        yield
    finally:
        classifier.train(training)


def _width(raw: Tensor, source: LabelledImages, places: Tensor) -> int:
    """The classifier's number of outputs, if it is enough."""
    width = raw.shape[-1]
    needed = int(places.max()) + 1
    if needed > width:
        raise UserError(
            f"{source.name}: its {len(source.classes)} classes need {needed} outputs and the classifier has {width}; "
            "name the classifier's classes, or other data"
        )
    return width


def _theirs(teacher: Mapping[int, Tensor], rows: Sequence[int]) -> Tensor:
    try:
        return torch.stack([teacher[row] for row in rows])
    except KeyError as missing:
        raise ValueError(f"no logits of the teacher for row {missing}: ask it the same images, batched alike") from None


def _output_names(classifier: Classifier, names: Sequence[str], places: Tensor, width: int) -> dict[int, str]:
    """Names of all outputs: the source's where it has the class, else the classifier's own, else the number."""
    classes = classifier.classes
    own = [f"output {k}" for k in range(width)] if classes is None else imagenet.readable(classes)
    return dict(enumerate(own)) | dict(zip(places.tolist(), names, strict=True))


def _predictions(
    answers: Answers,
    source: LabelledImages,
    names: Sequence[str],
    said: Mapping[int, str],
    facts: Mapping[int, tuple[str, list[int]]],
) -> list[Prediction]:
    return [
        Prediction(
            index=row,
            source=source.name,
            line=source.line(row),
            question="",
            references=[names[label] for label in facts[row][1]],
            answer=said[int(answers.answers[k])],
            probability=float(answers.confidence[k]),
            exact=float(answers.right[k]),
            soft=float(answers.right[k]),
            image=facts[row][0],
        )
        for k, row in enumerate(answers.rows.tolist())
    ]
