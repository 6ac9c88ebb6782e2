"""Attention that a decoder's layers pay to image tokens, computed again from queries and keys, a few queries at a time.

Queries and keys are taken where a layer hands them to its attention function: after norms of single heads and rotary
positions, beside the mask of the very forward. The forward itself keeps its own, fast attention.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.batch import ModelBatch, ModelInputs
from data.errors import UserError
from vlm_distill.losses import AttentionFeature

#: Bytes of the attention of a few queries to all tokens, by all heads.
_CHUNK_BYTES = 1 << 26


@dataclass
class _Seen:
    """What a layer passed to its attention function: ``[B, heads, L, width]``, and how scores become attention."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    window: int | None


@contextmanager
def recording(body: Any, modules: Sequence[nn.Module]) -> Iterator[dict[int, _Seen]]:
    """Context manager: inside it, what these attention modules compute with is kept, by the modules' ids."""
    wanted = {id(module) for module in modules}
    seen: dict[int, _Seen] = {}

    def record(original: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **more: Any
        ) -> Any:
            if id(module) in wanted:
                seen[id(module)] = _read(body, module, query, key, attention_mask, more)
            return original(module, query, key, value, attention_mask, **more)

        return attend

    name = body.config._attn_implementation
    if name == "eager":
        # Each modelling file has its own function, which its layers look up by this name.
        home: Any = sys.modules[type(modules[0]).__module__]
        original = home.eager_attention_forward
        home.eager_attention_forward = record(original)
        try:
            yield seen
        finally:
            home.eager_attention_forward = original
        return
    ALL_ATTENTION_FUNCTIONS[name] = record(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield seen
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _read(body: Any, module: Any, query: Tensor, key: Tensor, mask: Any, more: dict[str, Any]) -> _Seen:
    """Return what an attention function was given. Raise ``UserError`` if it does more than is known here."""
    # Sinks and biases by position change the attention; block masks of flex attention cannot be read.
    unknown = [name for name in ("s_aux", "position_bias") if more.get(name) is not None]
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        unknown.append("attention_mask")
    if unknown:
        raise UserError(
            f"loss on attention: {type(body).__name__} attends by {unknown[0]}, which is not known here; leave it out"
        )
    scaling = more.get("scaling")
    return _Seen(
        query,
        key,
        mask if mask is not None and mask.ndim == 4 else None,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        more.get("softcap"),
        more.get("sliding_window"),
    )


def attention_to_images(
    feature: AttentionFeature, seen: Sequence[_Seen], inputs: ModelInputs, side: ModelBatch
) -> Tensor:
    """Return the attention, a mean over heads, that each image token receives: float32 ``[T, layers, Q]``.

    Args:
        feature: says which tokens attend.
        seen: of each layer.
        inputs: of the forward.
        side: says where the samples' tokens and image tokens are.

    Returns:
        For each of the samples' T image tokens, the attention of the sample's own queries. Q is the largest number of
        queries; samples with fewer have zeros behind them.
    """
    length = inputs["input_ids"].shape[1]
    parts: list[tuple[int, Tensor, Tensor]] = []
    begin = 0
    for number, images in enumerate(side.image_counts.tolist()):
        visual = side.image_positions[begin : begin + images]
        begin += images
        if not images:
            continue
        queries = side.tokens_of(number, feature.queries)
        row = int(side.extents[number, 0]) // length
        parts.append((row, queries - row * length, visual - row * length))
    most = max((len(queries) for _, queries, _ in parts), default=0)

    segments = _segments(inputs)
    layers = []
    for one in seen:
        # In the graph even if there is no image.
        found = [one.query.flatten()[:0].float().view(0, most)] if not most else []
        for row, queries, visual in parts:
            columns = _columns(one, row, queries, visual, segments[row])
            found.append(nn.functional.pad(columns.T, (0, most - len(queries))))
        layers.append(torch.cat(found))
    return torch.stack(layers, 1)


def _segments(inputs: ModelInputs) -> Tensor:
    """Return int64 ``[B, L]``: which sample of its row each token belongs to, if samples share rows."""
    ids = inputs["input_ids"]
    positions = inputs.get("position_ids")
    if positions is None or "attention_mask" in inputs:
        return torch.zeros_like(ids)
    text = positions[0] if positions.ndim == 3 else positions
    return (text == 0).long().cumsum(-1)


def _columns(seen: _Seen, row: int, queries: Tensor, visual: Tensor, segments: Tensor) -> Tensor:
    """Return the attention of some of a row's tokens to others ``[queries, visual]``, a mean over heads."""
    precision = torch.promote_types(seen.query.dtype, torch.float32)
    heads, length = seen.query.shape[1], seen.key.shape[2]
    size = max(1, _CHUNK_BYTES // (heads * length * precision.itemsize))
    found = []
    for chunk in queries.split(size):
        allowed = _allowed(seen, row, chunk, segments)
        arguments = seen.query[row, :, chunk], seen.key[row], allowed, visual, seen.scaling, seen.softcap, precision
        if torch.is_grad_enabled() and seen.query.requires_grad:
            found.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_attend(*arguments))
    return torch.cat(found)


def _allowed(seen: _Seen, row: int, queries: Tensor, segments: Tensor) -> Tensor:
    """Return which tokens these queries see ``[1 or heads, queries, L]``: bool, or numbers to add to the scores."""
    if seen.mask is not None:
        mask = seen.mask[row if len(seen.mask) > 1 else 0]
        return mask[:, queries, : seen.key.shape[2]]
    # Kernels that take no mask are causal, within a sample.
    keys = torch.arange(seen.key.shape[2], device=queries.device)
    distance = queries.unsqueeze(1) - keys
    allowed = (distance >= 0) & (segments[queries].unsqueeze(1) == segments)
    if seen.window is not None:
        allowed &= distance < seen.window
    return allowed.unsqueeze(0)


def _attend(
    query: Tensor,
    key: Tensor,
    allowed: Tensor,
    visual: Tensor,
    scaling: float,
    softcap: float | None,
    precision: torch.dtype,
) -> Tensor:
    """Return the mean over heads of softmax(q kᵀ) at the ``visual`` columns, ``[queries, visual]``.

    Args:
        query: ``[heads, queries, width]``.
        key: ``[key heads, L, width]``; each serves as many heads as there are more of these.
        allowed: as :func:`_allowed` returns it.
        visual: int64, columns.
        scaling: factor on the scores.
        softcap: c of c · tanh(score / c).
        precision: to compute in.
    """
    with torch.autocast(query.device.type, enabled=False):
        shared = query.to(precision).unflatten(0, (len(key), -1))
        scores = (shared @ key.to(precision).unsqueeze(1).transpose(-1, -2)).flatten(0, 1) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, -math.inf)
        else:
            scores = scores + allowed.to(precision)
        return scores.softmax(-1)[..., visual].mean(0)
