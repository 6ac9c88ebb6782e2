"""Ask a classifier about labelled images, on any number of ranks, and score its answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
from vlm_distill.runtime.rank_share import RankShare

from . import imagenet
from .metrics import Answers, measure, summarise, together

if TYPE_CHECKING:
    from data.classification import LabelledImage, LabelledImages

    from .classifier import Classifier
    from .inputs import InputSettings

# Pictures for the report: mostly of wrong answers, where models differ.
_WRONG_PICTURES, _RIGHT_PICTURES = 60, 20


class _Item(NamedTuple):
    row: int
    label: int
    right: Sequence[int]
    key: str
    pixels: Tensor


class _Fact(NamedTuple):
    """A row's image key and right labels."""

    key: str
    right: list[int]


class _Batch(NamedTuple):
    """Pixels, uint8 ``[N, 3, H, W]``, and facts of N images; and the images that cannot be read."""

    rows: list[int]
    labels: list[int]
    right: list[list[int]]
    keys: list[str]
    pixels: Tensor
    problems: list[Problem]


@dataclass(frozen=True)
class Inference:
    """How images are read and run.

    Attributes:
        batch_size: images in a forward pass.
        workers: this rank's decoding processes; 0 decodes in this one.
        device: where the classifier is.
        channels_last: the memory format of the images.
        dtype: autocast's dtype; ``None`` computes in the weights' own.
        load: function that decodes an image.
    """

    batch_size: int = 256
    workers: int = 0
    device: torch.device | str = "cpu"
    channels_last: bool = False
    dtype: torch.dtype | None = None
    load: Callable[[ImageSource], Image.Image] = load_image


@dataclass(frozen=True)
class Labels:
    """How a source's labels and a classifier's outputs belong together.

    Attributes:
        outputs: the classifier's output for each of the source's labels; ``None`` if they are in the same order.
        only_mapped: only these outputs compete; otherwise all that the classifier has.
        references: function that returns an image's right labels if there may be several, or raises ``BadSample``.
    """

    outputs: Sequence[int] | None = None
    only_mapped: bool = False
    references: Callable[[LabelledImage], Sequence[int]] | None = None


@dataclass
class Predicted:
    """A classifier's answers to a source, the same on every rank but for ``logits``.

    Attributes:
        scores: as :func:`vision.metrics.summarise`, with ``skipped``, reason to number.
        problems: the images that were left out.
        logits: this rank's, if they were kept: float32 ``[K]`` of the source's K classes on the CPU, by row.
    """

    scores: dict[str, Any]
    problems: list[Problem]
    logits: dict[int, Tensor]
    _source: LabelledImages
    _answers: Answers
    _facts: Mapping[int, _Fact]
    _spoken: Mapping[int, str]

    def predictions(self) -> list[Prediction]:
        """Return the answers in the order of the source's rows, without the images that were left out."""
        names = imagenet.readable(self._source.classes)
        answers = self._answers
        found = []
        for k, row in enumerate(answers.rows.tolist()):
            fact = self._facts[row]
            prediction = Prediction(
                index=row,
                source=self._source.name,
                line=self._source.line(row),
                question="",
                references=[names[label] for label in fact.right],
                answer=self._spoken[int(answers.answers[k])],
                probability=float(answers.confidence[k]),
                exact=float(answers.right[k]),
                soft=float(answers.right[k]),
                image=fact.key,
            )
            found.append(prediction)
        return found

    def write(self, folder: Path) -> None:
        """Write ``predictions.jsonl`` and ``scores.json`` into a folder, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / "predictions.jsonl", self.predictions())
        text = json.dumps(self.scores, indent=2, ensure_ascii=False)
        (folder / "scores.json").write_text(text + "\n", "utf-8")

    def write_gallery(self, folder: Path, load: Callable[[ImageSource], Image.Image] = load_image) -> None:
        """Write small copies of pictures that are not files of their own, mostly of wrong answers."""
        predictions = self.predictions()
        wrong = [prediction for prediction in predictions if not prediction.exact]
        right = [prediction for prediction in predictions if prediction.exact]
        shown = [wrong[i] for i in evenly_spaced(len(wrong), _WRONG_PICTURES)]
        shown += [right[i] for i in evenly_spaced(len(right), _RIGHT_PICTURES)]
        write_pictures(folder, shown, lambda row: self._source[row].image, load)


def predict(
    classifier: Classifier,
    source: LabelledImages,
    inference: Inference = Inference(),
    labels: Labels = Labels(),
    *,
    limit: int | None = None,
    ranks: RankShare = RankShare(),  # noqa: B008 - frozen
    keep_logits: bool = False,
    teacher: Mapping[int, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predicted:
    """Score a classifier on a source: timm's evaluation transform, one view, no augmentation.

    Batches are cut once from the source and dealt to the ranks in turn: neither their content nor a score depends on
    the number of ranks. Every rank makes the same number of forward passes. Images that cannot be read are left out.

    Args:
        classifier: a ``vision.classifier.Classifier``, or an object with its ``inputs``, ``classes`` and forward; on
            its device. Its training mode is restored.
        source: labelled images; ImageNet synsets among its class names are written as words.
        inference: how images are read and run.
        labels: how the source's labels and the classifier's outputs belong together.
        limit: ask only about this many images, evenly spaced over the source.
        ranks: this process's share of the work.
        keep_logits: keep this rank's logits.
        teacher: a teacher's logits, kept with the same batches, limit and ranks, to be compared with.
        progress: called with (images done over all ranks, images in all) after each batch.

    Raises:
        UserError: the source has classes that the classifier has no output for.
    """
    outputs = torch.as_tensor(range(len(source.classes)) if labels.outputs is None else labels.outputs)
    rows = evenly_spaced(len(source), limit)
    size = inference.batch_size
    mine = ranks.deal([rows[i : i + size] for i in range(0, len(rows), size)])
    views = _Views(source, mine, classifier.inputs, inference.load, labels.references)
    scorer = _Scorer(classifier, source, inference, outputs, labels.only_mapped, keep_logits, teacher)
    with _evaluating(classifier), torch.no_grad():
        for done, batch in enumerate(make_loader(views, 0, len(mine), min(inference.workers, len(mine))), start=1):
            scorer.add(batch)
            if progress is not None:
                progress(min(done * ranks.world * size, len(rows)), len(rows))

    # Bring together what all ranks have found.
    parts: list[Answers] = []
    facts: dict[int, _Fact] = {}
    problems: list[Problem] = []
    for found in ranks.gather((scorer.parts, scorer.facts, scorer.problems)):
        parts += found[0]
        facts |= found[1]
        problems += found[2]
    problems.sort(key=lambda problem: problem.line)
    answers = together(parts)
    names = imagenet.readable(source.classes)
    scores = summarise(answers, names) | {"skipped": dict(Counter(problem.reason for problem in problems))}
    spoken = dict(enumerate(names))
    if not labels.only_mapped:
        spoken = _output_names(classifier, names, outputs, scorer.width)
    return Predicted(scores, problems, scorer.logits, source, answers, facts, spoken)


class _Scorer:
    """Runs a classifier on batches, and collects the results.

    Attributes:
        parts: answers, batch by batch.
        facts: by row.
        problems: images that could not be read.
        logits: float32 ``[K]`` of the source's classes by row, if they are to be kept.
        width: the classifier's number of outputs.
    """

    def __init__(
        self,
        classifier: Classifier,
        source: LabelledImages,
        inference: Inference,
        outputs: Tensor,
        only_mapped: bool,
        keep_logits: bool,
        teacher: Mapping[int, Tensor] | None,
    ) -> None:
        self.classifier, self.source, self.outputs = classifier, source, outputs
        self.only_mapped, self.keep_logits, self.teacher = only_mapped, keep_logits, teacher
        self.device, self.dtype = torch.device(inference.device), inference.dtype
        self.normalise = _Normalise(classifier.inputs, self.device, inference.channels_last)
        # Ranks may wait for each other inside a forward pass, so an empty batch runs a blank image.
        self.blank = torch.zeros(1, 3, *classifier.inputs.size, dtype=torch.uint8)
        self.parts: list[Answers] = []
        self.facts: dict[int, _Fact] = {}
        self.problems: list[Problem] = []
        self.logits: dict[int, Tensor] = {}
        self.width = 0

    def add(self, batch: _Batch) -> None:
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            raw = self.classifier(self.normalise(batch.pixels if batch.rows else self.blank)).logits
        raw = raw[: len(batch.rows)].float()
        self.width = _width(raw, self.source, self.outputs)
        self.problems += batch.problems
        if not batch.rows:
            return
        known = raw[:, self.outputs.to(raw.device)]
        if self.keep_logits:
            self.logits.update(zip(batch.rows, known.cpu(), strict=True))
        pair = None
        if self.teacher is not None:
            pair = known, _theirs(self.teacher, batch.rows).to(known.device)
        compete = known if self.only_mapped else raw
        right = torch.zeros(compete.shape, dtype=torch.bool)
        for k, labels in enumerate(batch.right):
            right[k, list(labels) if self.only_mapped else self.outputs[list(labels)]] = True
        self.parts.append(measure(batch.rows, batch.labels, compete, right.to(raw.device), pair))
        for row, key, labels in zip(batch.rows, batch.keys, batch.right, strict=True):
            self.facts[row] = _Fact(key, labels)


def in_words(scores: Mapping[str, Any]) -> str:
    """Return the overall scores of :func:`predict` in words."""
    if not scores["n"]:
        return "no image could be read"
    text = f"top-1 {scores['exact']:.2%}, top-5 {scores['top5']:.2%} on {scores['n']:,} images"
    return text + (f", agrees with the teacher on {scores['agreement']:.2%}" if "agreement" in scores else "")


class _Views(Dataset[_Batch]):
    """Batches of images in timm's view of evaluation, not normalised."""

    def __init__(
        self,
        source: LabelledImages,
        batches: Sequence[Sequence[int]],
        inputs: InputSettings,
        load: Callable[[ImageSource], Image.Image],
        references: Callable[[LabelledImage], Sequence[int]] | None,
    ) -> None:
        self.source, self.batches, self.load, self.references = source, batches, load, references
        # Not normalised: bytes are a quarter of the size of floats on their way to the device.
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
    """Normalise uint8 images on the device: ``(x / 255 − mean) / std``."""

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


def _width(raw: Tensor, source: LabelledImages, outputs: Tensor) -> int:
    """Return the classifier's number of outputs; raise ``UserError`` if there are too few."""
    width = raw.shape[-1]
    needed = int(outputs.max()) + 1
    if needed > width:
        raise UserError(
            f"{source.name}: its {len(source.classes)} classes need {needed} outputs, but the classifier has {width}; "
            "name the classifier's classes, or other data"
        )
    return width


def _theirs(teacher: Mapping[int, Tensor], rows: Sequence[int]) -> Tensor:
    try:
        return torch.stack([teacher[row] for row in rows])
    except KeyError as missing:
        raise ValueError(f"no logits of the teacher for row {missing}: ask it the same images, batched alike") from None


def _output_names(classifier: Classifier, names: Sequence[str], outputs: Tensor, width: int) -> dict[int, str]:
    """Return the names of all outputs: the source's if it has the class, else the classifier's own, else numbers."""
    classes = classifier.classes
    own = [f"output {k}" for k in range(width)] if classes is None else imagenet.readable(classes)
    return dict(enumerate(own)) | dict(zip(outputs.tolist(), names, strict=True))
