"""Call a Transformers processor: for several samples at once where each receives what it would receive alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from data.attempts import attempt
from data.errors import BadSample, first_line

from .answer_spans import Span
from .common import integers
from .video_inputs import Video


@dataclass(frozen=True)
class RenderedSample:
    """What a processor is called with.

    Attributes:
        text: the rendered conversation, with the images' placeholders.
        spans: of the answers in it.
        images: RGB, one for each placeholder.
        options: of the call. A list has one entry for each sample.
        videos: one for each placeholder of a video; ``options`` hold them as the processor takes them.
    """

    text: str
    spans: Sequence[Span]
    images: Sequence[Image.Image]
    options: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Video] = ()


@dataclass(frozen=True)
class ProcessedSample:
    """What a processor makes of a sample.

    Attributes:
        tensors: the model's inputs but the token ids.
        ids: token ids.
        offsets: start and stop of each token in the text with its images expanded.
        replaced: for each image its placeholder (``text``), its position (``span``) and its ``replacement``.
    """

    tensors: dict[str, Tensor]
    ids: list[int]
    offsets: list[tuple[int, int]]
    replaced: list[dict[str, Any]]


def process_all(processor: Any, samples: Sequence[RenderedSample]) -> list[ProcessedSample | BadSample]:
    """Call a Transformers processor. Return what it makes of each sample, or why it refuses the sample.

    Samples whose images have the same sizes share a call: then each of them gets an equal share of every tensor, and
    nothing is padded to another's size. If such a call fails, each of its samples gets a call of its own.
    """
    groups: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault(_likeness(sample), []).append(number)
    found: dict[int, ProcessedSample | BadSample] = {}
    for numbers in groups.values():
        found |= zip(numbers, _attempted(processor, [samples[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(samples))]


def _attempted(processor: Any, samples: Sequence[RenderedSample]) -> Sequence[ProcessedSample | BadSample]:
    """Call a processor once for samples that are alike, or once for each of them if that fails."""
    results = attempt(_processed, processor, samples)
    if not isinstance(results, BadSample):
        return results
    if len(samples) == 1:
        return [results]
    return [_attempted(processor, [sample])[0] for sample in samples]


def _likeness(sample: RenderedSample) -> tuple[Any, ...]:
    """Return what samples must have in common to share a call. A sample with a video has one of its own."""
    if sample.videos:
        return (id(sample),)
    options = tuple((name, None if isinstance(value, list) else value) for name, value in sample.options.items())
    return options, *(image.size for image in sample.images)


def _processed(processor: Any, samples: Sequence[RenderedSample]) -> list[ProcessedSample]:
    """Call a processor once for samples that are alike. Raise ``BadSample`` if it refuses one of them."""
    options = dict(samples[0].options)
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = [entry for sample in samples for entry in sample.options[name]]
    try:
        inputs = processor(
            text=[sample.text for sample in samples],
            # One list for each sample: some families take a flat list of images for several samples.
            images=[list(sample.images) for sample in samples] if samples[0].images else None,
            padding=False,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **options,
        )
        return [_as_sample(own) for own in _divided(inputs, len(samples))]
    except Exception as error:  # processors raise almost anything for images of odd shapes
        raise BadSample("processor refuses the sample", first_line(error)[:120]) from error


def _divided(inputs: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Divide a processor's lists and tensors equally among samples. Raise ``ValueError`` if they do not divide."""
    divided: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in inputs.items():
        each, rest = divmod(len(value), count)
        if rest:
            raise ValueError(f"{name}: {len(value)} entries for {count} samples")
        for number, own in enumerate(divided):
            own[name] = value[number * each : (number + 1) * each]
    return divided


def _as_sample(inputs: dict[str, Any]) -> ProcessedSample:
    """Return one sample's share of what a processor returned."""
    # Not converted by the processor: InternVL's would turn the replacements into a tensor, too.
    (replaced,) = inputs.pop("text_replacement_offsets", None) or [[]]
    # Ids and offsets stay lists: they are read one by one, and may be as long as the images are large.
    ids, offsets = _listed(inputs.pop("input_ids")), _listed(inputs.pop("offset_mapping"))
    return ProcessedSample(_as_tensors(inputs), ids, offsets, replaced)


def _listed(batch: Any) -> list[Any]:
    """Return the only row of a batch as a list; Pixtral's processor makes tensors by itself."""
    row = batch[0]
    return row.tolist() if isinstance(row, Tensor) else row


def _as_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a processor's lists to tensors, as it would itself, but without copying the pixels of a single image."""
    tensors, lists = {}, {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor):
            tensors[name] = value[0].unsqueeze(0)
        elif isinstance(value, list) and len(value) == 1 and _are_integers(value[0]):
            tensors[name] = integers(value[0]).unsqueeze(0)
        else:
            lists[name] = value
    return tensors | dict(BatchFeature(lists, tensor_type="pt")) if lists else tensors


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is int for value in values)
