"""Answer prompts token by token with a cache of keys and values, faster than Transformers' ``generate``.

Prompts of like length run together, rows that have ended are dropped, and keys and values are written in place. Models
whose cache is more than keys and values of every token, or whose positions are not 0, 1, 2 …, are left to ``generate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from data.batch import Encoded, ModelInputs

from .answers import TokenChoice
from .common import takes_cache, with_cache
from .lm_head import LMHead
from .processor import Processor

# Columns by which a full cache grows.
_ROOM = 64
# Prompts at least this long, relative to the longest beside them, share a forward.
_LIKE = 0.75


class Answering(Protocol):
    """What :func:`decode` needs of a model; :class:`~.interface.VisionLanguageModel` has it."""

    processor: Processor
    head: LMHead

    @property
    def body(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def end_tokens(self) -> set[int]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def __call__(self, inputs: ModelInputs, positions: Tensor, *, cache: Cache) -> Any: ...


def decodes_plainly(body: Any) -> bool:
    """Return whether :func:`decode` answers as ``generate`` does, for a decoder without its lm head."""
    config = body.config
    if not takes_cache(body) or not {"position_ids", "input_ids"} <= set(signature(body.forward).parameters):
        return False
    # M-RoPE counts positions in images its own way; layers that share keys have none in the cache.
    if "mrope" in str(getattr(config, "rope_parameters", None)) or getattr(config, "num_kv_shared_layers", None):
        return False
    # Parameters that DeepSpeed shards are whole only while all ranks run the same layer.
    if hasattr(next(body.parameters()), "ds_id"):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def decode(
    model: Answering, rows: Sequence[Encoded], choice: TokenChoice, max_new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return each prompt's new tokens, up to the first end token, and their log-probabilities.

    Args:
        model: in evaluation mode; :func:`decodes_plainly`.
        rows: the encoded prompts, at least one.
        choice: chooses the tokens.
        max_new_tokens: length of the longest answer, at least 1.
    """
    ends = model.end_tokens
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in rows]
    cache, hidden = _run_prompts(model, rows)
    lengths = torch.tensor([len(row.input_ids) for row in rows], device=hidden.device)
    mask = torch.arange(cache.get_seq_length(), device=hidden.device) >= cache.get_seq_length() - lengths.unsqueeze(-1)
    arguments = with_cache(model.body, cache)
    live, going = list(range(len(rows))), set(range(len(rows)))
    for number in range(max_new_tokens):
        chosen, logprobs = choice.choose(model.head.own_logits(hidden), live)
        for row, token, logprob in zip(live, chosen.tolist(), logprobs.tolist(), strict=True):
            if row in going:
                found[row][0].append(token)
                found[row][1].append(logprob)
                if token in ends:
                    going.remove(row)
        if not going or number == max_new_tokens - 1:
            break

        # Drop rows that have ended, once they are half: copying the cache costs time, too.
        if 2 * len(going) <= len(live):
            kept = torch.tensor([i for i, row in enumerate(live) if row in going], device=hidden.device)
            live = [row for row in live if row in going]
            cache.batch_select_indices(kept)
            chosen, lengths, mask = chosen[kept], lengths[kept], mask[kept]

        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        output = model.body(
            input_ids=chosen.unsqueeze(-1),
            attention_mask=mask.long(),
            position_ids=(lengths + number).unsqueeze(-1),
            **arguments,
        )
        hidden = output.last_hidden_state[:, -1]
    return found


def _run_prompts(model: Answering, rows: Sequence[Encoded]) -> tuple[DynamicCache, Tensor]:
    """Run the prompts. Return their keys and values, aligned on the right, and the last hidden states ``[B, H]``."""
    device, longest = next(model.parameters()).device, max(len(row.input_ids) for row in rows)
    layers: list[_Layer] = []
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in _groups([len(row.input_ids) for row in rows]):
        inputs = model.processor.collate([rows[i] for i in group]).to(device, model.dtype)
        width = inputs["input_ids"].shape[1]
        lengths = [len(rows[i].input_ids) for i in group]
        last = torch.tensor([line * width + length - 1 for line, length in enumerate(lengths)], device=device)
        part = DynamicCache(config=model.body.config)
        hidden = model(inputs, last, cache=part).hidden
        filled: list[Any] = [*part.layers]
        layers = layers or [_Layer(layer, len(rows), longest) for layer in filled]
        for line, (row, length) in enumerate(zip(group, lengths, strict=True)):
            states[row] = hidden[line]
            for layer, own in zip(layers, filled, strict=True):
                layer.fill(row, own.keys[line, :, :length], own.values[line, :, :length])
    cache = DynamicCache(config=model.body.config)
    cache.layers = list(layers)
    return cache, torch.stack(states)


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Group prompts of like length, the longest first: padding costs as much as tokens do."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and lengths[row] >= _LIKE * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class _Layer(DynamicLayer):
    """Keys and values of a layer, ``[B, heads, columns, width]``, with the first ``used`` columns filled.

    Args:
        like: a layer after a forward.
        rows: B.
        columns: of the longest prompt.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, like: Any, rows: int, columns: int) -> None:
        super().__init__()
        self.dtype, self.device = like.keys.dtype, like.keys.device
        heads = like.keys.shape[1]
        # Zeros, because what is masked is multiplied by 0, too.
        self.keys = like.keys.new_zeros(rows, heads, columns + _ROOM, like.keys.shape[-1])
        self.values = like.values.new_zeros(rows, heads, columns + _ROOM, like.values.shape[-1])
        self.used = columns
        self.is_initialized = True

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Write a prompt's keys and values, ``[heads, length, width]``, so that they end with the last column."""
        start = self.used - keys.shape[1]
        self.keys[row, :, start : self.used] = keys
        self.values[row, :, start : self.used] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stop = self.used + key_states.shape[-2]
        if stop > self.keys.shape[-2]:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, _ROOM))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, _ROOM))
        self.keys[:, :, self.used : stop] = key_states
        self.values[:, :, self.used : stop] = value_states
        self.used = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.used
