"""Ulysses: split the decoder's tokens over ranks, and its heads during attention (Jacobs et al. 2023).

All ranks of a group have the same samples. Outside attention each holds a share of every row's tokens; for attention an
all-to-all gives it all tokens of a share of the heads, and a second one reverses that.
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

from data.errors import UserError, first_line

from .interface import VisionLanguageModel
from .weightless import weightless

NAME = "ulysses"


class SequenceParallel:
    """A group of ranks that divide each sequence among them inside :meth:`shared`.

    Args:
        group: the process group; ``None``: there are no other ranks, and one rank's share is only planned.
        rank: this rank's number in the group.
        size: number of ranks in the group.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Context manager: inside it, the group shards each sequence. Backwards belong inside, too."""
        global _active
        _active = self
        try:
            yield
        finally:
            _active = None

    def share(self, rows: int) -> slice:
        """Return this rank's slice of ``rows`` rows that all ranks have."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    @torch.no_grad()
    def divide(self, model: VisionLanguageModel, role: str, longest: int) -> None:
        """Prepare a model's decoder for sharding. All ranks of the group call this.

        Args:
            model: its decoder is prepared.
            role: ``student`` or ``teacher``, for messages.
            longest: the most tokens that a row can have.

        Raises:
            UserError: sharding changes the decoder's hidden states (not checked without weights).
        """
        inputs = model.processor.collate([model.processor.dummy()])
        body: Any = model.body
        parameter = next(body.parameters())  # WithoutAdapters has no parameters of its own
        inputs = inputs.to(parameter.device, model.dtype)
        positions = torch.arange(inputs["input_ids"].numel(), device=parameter.device)
        training = model.training
        model.eval()
        try:
            whole = model(inputs, positions).hidden
            others = set(getattr(body.config, "layer_types", None) or ()) - {"full_attention"}
            if others:
                raise ValueError(f"it has layers of {', '.join(sorted(others))}")
            if reason := _changes_with_length(body.config, longest):
                raise ValueError(reason)
            prepare(model)
            with self.shared():
                divided = model(inputs, positions).hidden
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
    """Hook a model's decoder, so that it is sharded while ranks share sequences."""
    body: Any = model.body
    if body.config._attn_implementation != NAME:  # already done if the teacher is the student's base
        body.register_forward_pre_hook(_own_tokens, with_kwargs=True)
        body.config._attn_implementation = NAME


def _changes_with_length(config: Any, longest: int) -> str | None:
    """Describe what a decoder does to rows of ``longest`` tokens but not to the short row of the trial."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and not getattr(config, "layer_types", None):
        return f"it has a sliding window of {window} tokens, and data.max_length is {longest}"
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in rope.values() if "rope_type" not in rope else [rope]:
        kind = settings.get("rope_type", "") if isinstance(settings, dict) else ""
        # Its frequencies depend on the largest position in a row, which a rank with another share does not know.
        if kind != "longrope" and "dynamic" not in kind:
            continue
        limit = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        if limit < longest:
            return f"its rotary positions ({kind}) change after {limit} tokens, and data.max_length is {longest}"
    return None


_active: SequenceParallel | None = None


def at_positions(hidden: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return hidden states ``[N, H]`` at positions of the flattened ``[B·length]``, on every rank.

    Args:
        hidden: ``[B, length, H]``; if ranks share tokens, this rank's ``[B, ceil(length / size), H]``.
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
    """Cut a decoder's arguments to this rank's tokens; the last token pads rows to a multiple of the ranks."""
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
    # No mask: rows are padded on the right, and attention is causal.
    return args, {
        **given,
        "inputs_embeds": embeddings[:, own],
        "position_ids": positions[..., own],
        "attention_mask": None,
        "cache_position": None,
    }


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """Attention in Transformers' interface: ``[B, heads, tokens, width]`` to ``[B, tokens, heads, width]``."""
    core = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if _active is None:
        return core(module, query, key, value, mask, **more)
    heads, shared = query.shape[1], key.shape[1]
    if heads % _active.size:
        raise ValueError(f"its {heads} heads are not a multiple of {_active.size} ranks")
    reader: Any = module
    if shared % _active.size:
        # Fewer key heads than ranks: repeat them for each query, and pass a module that does not repeat them again.
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
    """An all-to-all: split one dimension over ranks and make another one, so far split, whole."""

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
    """All-reduce in forward and in backward: each rank computes the losses of a part, so gradients add up, too."""

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
