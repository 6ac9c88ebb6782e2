"""Ulysses: the decoder's tokens divided among ranks, its heads while they attend (Jacobs et al. 2023).

Every rank of a group has the same samples. Between attentions it holds a share of each row's tokens; for attention an
all-to-all gives it all tokens of a share of the heads, and another one takes that back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data.errors import UserError

from .common import first_line
from .interface import VisionLanguageModel
from .weightless import weightless

NAME = "ulysses"


class SequenceParallel:
    """A group of ranks that share their samples' tokens, while it is entered; outside of that each has its own.

    Args:
        group: the process group; ``None``: the others are not there, and a rank's part is only planned.
        rank: this one's number in it.
        size: how many they are.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, decoders that were :meth:`divided <divide>` work together; backwards belong inside as well."""
        global _active
        _active = self
        try:
            yield
        finally:
            _active = None

    def share(self, rows: int) -> slice:
        """This rank's part of so many rows, which all ranks have."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    @torch.no_grad()
    def divide(self, model: VisionLanguageModel, role: str, longest: int) -> None:
        """Prepares a model's decoder. All ranks of the group call it.

        Args:
            model: of which the decoder is to be divided.
            role: its name in messages.
            longest: the most tokens that a row may have.

        Raises:
            UserError: its hidden states are not the same when it is divided; without weights, which tell nothing, they
                are taken to be.
        """
        inputs = model.processor.collate([model.processor.dummy()])
        body: Any = model.body
        parameter = next(body.parameters())  # a student's base, its adapters off, has none of its own
        inputs = inputs.to(parameter.device, model.dtype)
        places = torch.arange(inputs["input_ids"].numel(), device=parameter.device)
        training = model.training
        model.eval()
        try:
            whole = model(inputs, places).hidden
            others = set(getattr(body.config, "layer_types", None) or ()) - {"full_attention"}
            if others:
                raise ValueError(f"it has layers of {', '.join(sorted(others))}")
            if reason := _changes_with_length(body.config, longest):
                raise ValueError(reason)
            prepare(model)
            with self.shared():
                divided = model(inputs, places).hidden
        except Exception as error:
            raise UserError(
                f"training.sequence_parallel: the {role}'s decoder cannot be divided: {first_line(error)}"
            ) from error
        finally:
            model.train(training)
        if weightless():
            return
        tolerance = 1e-3 if parameter.dtype is torch.float32 else 0.1
        if (whole - divided).abs().max() > tolerance * whole.abs().max():
            raise UserError(
                f"training.sequence_parallel: the {role}'s decoder does more than plain causal attention and cannot be "
                "divided; leave it out"
            )


def prepare(model: VisionLanguageModel) -> None:
    """Makes a model's decoder one that is divided while ranks share sequences."""
    body: Any = model.body
    if body.config._attn_implementation != NAME:  # as a teacher does that is its student's base
        body.register_forward_pre_hook(_own_tokens, with_kwargs=True)
        body.config._attn_implementation = NAME


def _changes_with_length(config: Any, longest: int) -> str | None:
    """What a decoder does to rows of so many tokens and not to the short one that it is tried with, in words."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and not getattr(config, "layer_types", None):
        return f"it has a sliding window of {window} tokens, and data.max_length is {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in rope.values() if "rope_type" not in rope else [rope]:
        kind = settings.get("rope_type", "") if isinstance(settings, dict) else ""
        # Its frequencies go by the largest position in a row, which ranks with other parts of it do not know.
        if kind != "longrope" and "dynamic" not in kind:
            continue
        limit = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        if limit < longest:
            return f"its rotary positions ({kind}) change after {limit} tokens, and data.max_length is {longest}"
    return None


_active: SequenceParallel | None = None


def at_positions(hidden: Tensor, positions: Tensor, length: int) -> Tensor:
    """Hidden states ``[N, H]`` at positions of the flattened ``[B·length]``, on every rank.

    Args:
        hidden: ``[B, length, H]``; where ranks share tokens, this one's ``[B, ceil(length / size), H]``.
        positions: int64 ``[N]``.
        length: L.
    """
    if _active is None:
        return hidden.flatten(0, 1)[positions]
    rows, columns = positions // length, positions % length
    share = hidden.shape[1]
    own = columns // share == _active.rank
    found = hidden.new_zeros(len(positions), hidden.shape[-1])
    found = found.index_put((own.nonzero().flatten(),), hidden[rows[own], columns[own] % share])
    return _Sum.apply(found, _active)


def _own_tokens(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """A decoder's arguments, of this rank's tokens; those that pad rows to a multiple of the ranks repeat the last."""
    if _active is None:
        return args, given
    unknown = {name for name, value in given.items() if isinstance(value, Tensor)}
    unknown -= {"inputs_embeds", "position_ids", "attention_mask", "cache_position"}
    if args or unknown or given.get("inputs_embeds") is None:
        raise ValueError(f"it takes {', '.join(sorted(unknown)) or 'more'} beside embeddings and positions")
    embeddings = given["inputs_embeds"]
    length = embeddings.shape[1]
    share = -(-length // _active.size)
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=embeddings.device).unsqueeze(0)
    own = torch.arange(_active.rank * share, (_active.rank + 1) * share, device=embeddings.device).clamp_max(length - 1)
    # No mask: rows are padded on the right, where nothing that counts looks.
    return args, {
        **given,
        "inputs_embeds": embeddings[:, own],
        "position_ids": positions[..., own],
        "attention_mask": None,
        "cache_position": None,
    }


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """Attention of Transformers' interface: ``[B, heads, tokens, width]`` to ``[B, tokens, heads, width]``."""
    core = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if _active is None:
        return core(module, query, key, value, mask, **more)
    heads, shared = query.shape[1], key.shape[1]
    if heads % _active.size:
        raise ValueError(f"its {heads} heads are no multiple of {_active.size} ranks")
    reader: Any = module
    if shared % _active.size:
        # Fewer keys than ranks: each query gets its own, and the core no module that would have it repeat them.
        key, value = (x.repeat_interleave(heads // shared, dim=1) for x in (key, value))
        reader = SimpleNamespace(is_causal=True)
    query, key, value = (_Exchange.apply(x, 1, 2, _active) for x in (query, key, value))
    output, weights = core(reader, query, key, value, None, **{**more, "is_causal": True})
    return _Exchange.apply(output, 1, 2, _active), weights


def _mask(*args: Any, **more: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **more) if _active is None else None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


class _Exchange(torch.autograd.Function):
    """An all-to-all: a dimension is divided among ranks, and another one, so far divided, made whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divided: int, whole: int, ranks: SequenceParallel) -> Tensor:
        ctx.settings = divided, whole, ranks
        return _exchange(tensor, divided, whole, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        divided, whole, ranks = ctx.settings
        return _exchange(gradient, whole, divided, ranks), None, None, None


def _exchange(tensor: Tensor, divided: int, whole: int, ranks: SequenceParallel) -> Tensor:
    sent = torch.stack(tensor.chunk(ranks.size, divided))
    received = torch.empty_like(sent)
    if ranks.group is not None:
        dist.all_to_all_single(received, sent, group=ranks.group)
    return torch.cat(list(received), whole)


class _Sum(torch.autograd.Function):
    """The sum over ranks, on all of them; and of its gradients, since each of them learns from a part of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: SequenceParallel) -> Tensor:
        ctx.ranks = ranks
        return _summed(tensor, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _summed(gradient, ctx.ranks), None


def _summed(tensor: Tensor, ranks: SequenceParallel) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if ranks.group is not None:
        dist.all_reduce(tensor, group=ranks.group)
    return tensor
