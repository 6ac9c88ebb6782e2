"""Several samples in one row: how they are joined and told apart, and whether a model keeps them apart.

A row's ``position_ids`` start again with each sample, and there is no attention mask. Transformers makes one for each
kind of attention from that: a block for each sample, or the lengths that a variable-length kernel takes. Some classes
do not, silently, so that each model is tried before it trains (:func:`keeps_apart`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data.batch import Encoded
from data.conversation import Conversation
from data.errors import BadSample

from .weightless import weightless

if TYPE_CHECKING:
    from .interface import Processor, VisionLanguageModel


def is_by_token(sample: Encoded, name: str) -> bool:
    """Whether a tensor of a sample, ``[L]`` or ``[1, L]``, has a value for each of its tokens."""
    shape, length = sample.tensors[name].shape, len(sample.input_ids)
    return shape in ((length,), (1, length))


def join(samples: Sequence[Encoded], positions: Sequence[Tensor]) -> Encoded:
    """Samples one after the other in one row, their images in the same order.

    Args:
        samples: at least one.
        positions: of each sample's tokens, from 0: ``[L]``, or ``[4, L]`` with those of M-RoPE behind the text's.

    Returns:
        A row with ``position_ids`` and without ``attention_mask`` among its tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name in {name: None for sample in samples for name in sample.tensors if name != "attention_mask"}:
        owners = [sample for sample in samples if name in sample.tensors]
        if all(is_by_token(sample, name) for sample in owners):
            like = owners[0].tensors[name]
            tensors[name] = torch.cat(
                [
                    s.tensors[name] if name in s.tensors else like.new_zeros(*like.shape[:-1], len(s.input_ids))
                    for s in samples
                ],
                -1,
            )
        else:
            tensors[name] = joined([sample.tensors[name] for sample in owners])
    return Encoded(
        torch.cat([sample.input_ids for sample in samples]),
        torch.cat([sample.supervised for sample in samples]),
        torch.cat([sample.ends for sample in samples]),
        sum(sample.images for sample in samples),
        tensors | {"position_ids": torch.cat(list(positions), -1)},
    )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first dimension, the others padded with zeros at their end to the largest."""
    sizes = [max(size) for size in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def grown(tensor: Tensor) -> Tensor:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        return nn.functional.pad(tensor, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else tensor

    return torch.cat([grown(tensor) for tensor in tensors])


def row_positions(rows: Sequence[Encoded], length: int) -> Tensor:
    """``position_ids`` ``[B, length]`` or ``[4, B, length]`` of rows, packed or not; padding is one more sample."""

    def grown(row: Encoded) -> Tensor:
        own = row.tensors.get("position_ids", torch.arange(len(row.input_ids)))
        return torch.cat([own, torch.arange(length - own.shape[-1]).expand(*own.shape[:-1], -1)], -1)

    return torch.stack([grown(row) for row in rows], -2)


def wants_one_row(config: Any) -> bool:
    """Whether a decoder's attention takes samples apart in a single row alone: FlashAttention's variable lengths."""
    return str(config._attn_implementation).startswith("flash")


@torch.no_grad()
def keeps_apart(model: VisionLanguageModel) -> bool:
    """Whether samples in one row see nothing of each other, found by trying.

    Two rows hold the same samples in the middle, between others: pictures in one row, as many tokens of text in the
    other. The hidden states in the middle must be the same. Layers with a state or a convolution run on from one
    sample into the next, and some masks take places in the row for places in the sample. Without weights, which tell
    nothing, the model is taken to do it.
    """
    samples = _trial(model.processor)
    if samples is None or weightless():
        return samples is not None
    picture, text, *middle = samples
    rows = [model.processor.join([edge, *middle, edge]) for edge in (picture, text)]
    device, training = next(model.parameters()).device, model.training
    length, first = len(rows[0].input_ids), len(picture.input_ids)
    places = torch.arange(first, length - first)
    batches = [([row], places) for row in rows]
    if not model.processor.one_row:
        batches = [(rows, torch.cat([places, length + places]))]
    model.eval()
    try:
        # FlashAttention takes 16 bits alone.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = [
                model(model.processor.collate(batch).to(device, model.dtype), where.to(device)).hidden
                for batch, where in batches
            ]
        one, two = torch.cat(found).float().chunk(2)
    finally:
        model.train(training)
    return bool((one - two).abs().max() <= 1e-4 * one.abs().max())


def _trial(processor: Processor) -> list[Encoded] | None:
    """Two rows of one length, the first with an image where the model takes any, and samples to stand between them."""
    if not processor.has_vision:
        rows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [4, 5, 6, 7]])
        nothing = torch.zeros(4, dtype=torch.bool)
        return [Encoded(row, nothing, nothing) for row in rows]
    image, word = {"type": "image"}, {"type": "text", "text": "a"}
    try:
        picture, text = (
            processor.encode(
                Conversation(({"role": "user", "content": content}, {"role": "assistant", "content": [word]})),
                images,
            )
            for content, images in (([image, word], [_picture()]), ([word], []))
        )
    except BadSample:  # it takes no conversation without an image, or no conversation at all
        return None
    return [picture, _repeated(text, len(picture.input_ids)), picture, text]


def _picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def _repeated(sample: Encoded, length: int) -> Encoded:
    """A sample's tokens over and over, up to so many."""

    def grown(tensor: Tensor) -> Tensor:
        times = -(-length // tensor.shape[-1])
        return torch.cat([tensor] * times, -1)[..., :length]

    tensors = {name: grown(x) if is_by_token(sample, name) else x for name, x in sample.tensors.items()}
    return Encoded(grown(sample.input_ids), grown(sample.supervised), grown(sample.ends), 0, tensors)
