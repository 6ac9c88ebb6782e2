"""Join several samples in one row, told apart by position ids that restart with each sample.

A packed row has no attention mask: from the position ids, Transformers derives a block-diagonal mask for each kind of
attention, or the lengths that a variable-length kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Encoded


def is_by_token(sample: Encoded, name: str) -> bool:
    """Return whether a sample's tensor has one value a token: ``[L]`` or ``[1, L]``."""
    shape, length = sample.tensors[name].shape, len(sample.input_ids)
    return shape in ((length,), (1, length))


def join(samples: Sequence[Encoded], positions: Sequence[Tensor]) -> Encoded:
    """Join samples one after another in one row, their images in the same order.

    Args:
        samples: at least one.
        positions: of each sample's tokens, from 0: ``[L]``, or ``[4, L]`` with M-RoPE's after the text's.

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
        videos=sum(sample.videos for sample in samples),
    )


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, after padding all others with zeros to their largest size."""
    shapes = torch.tensor([tensor.shape[1:] for tensor in tensors], dtype=torch.long)
    largest = shapes.amax(0).tolist()

    def grown(tensor: Tensor) -> Tensor:
        padding: list[int] = []
        for size, own in zip(reversed(largest), reversed(tensor.shape[1:]), strict=True):
            padding += [0, size - own]
        return nn.functional.pad(tensor, padding) if any(padding) else tensor

    return torch.cat([grown(tensor) for tensor in tensors])


def row_positions(rows: Sequence[Encoded], length: int) -> Tensor:
    """Return ``position_ids`` ``[B, length]`` or ``[4, B, length]`` of rows; padding counts as one more sample."""

    def grown(row: Encoded) -> Tensor:
        own = row.tensors.get("position_ids", torch.arange(len(row.input_ids)))
        return torch.cat([own, torch.arange(length - own.shape[-1]).expand(*own.shape[:-1], -1)], -1)

    return torch.stack([grown(row) for row in rows], -2)


def wants_one_row(config: Any) -> bool:
    """Return whether a decoder's attention separates samples in a single row only (FlashAttention's varlen kernel)."""
    return str(config._attn_implementation).startswith("flash")
