"""Prune models: copies with some of the layers, MLP neurons, attention heads and channels of the hidden size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError, first_line

from .common import built_whole
from .composed import ComposedVLM
from .composed_processor import ComposedProcessor
from .families import CHANNELS_FIRST, DECODER_WIDTHS
from .interface import VisionLanguageModel
from .plain_layers import PlainStack, find_stack
from .pretrained import PretrainedVLM
from .projectors import Resampler, build_projector
from .vision_encoders import build_vision_encoder
from .weightless import weightless

#: Makes sharded parameters whole while it is entered; see ``LMHead.gather``.
Gather = Callable[[list[nn.Parameter]], Any]
#: For some dimensions of a weight, the indices that are kept.
Axes = dict[int, list[int]]


@dataclass(frozen=True)
class Kept:
    """What a pruned decoder or vision encoder keeps, as indices into the whole one; ``None`` keeps everything.

    Attributes:
        layers: ascending.
        neurons: of the MLP, for each kept layer.
        groups: key-value heads, each with all of its query heads, for each kept layer.
        channels: of the hidden size, the same in all layers.
    """

    layers: list[int] | None = None
    neurons: list[list[int]] | None = None
    groups: list[list[int]] | None = None
    channels: list[int] | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything inside a layer is left out."""
        return any(found is not None for found in (self.neurons, self.groups, self.channels))


def spaced_layers(count: int, total: int) -> list[int]:
    """Return ``count`` of ``total`` layers, maximally spaced, first and last included (Shleifer & Rush 2020)."""
    if count == 1:
        return [0]
    steps = count - 1
    return [(2 * i * (total - 1) + steps) // (2 * steps) for i in range(count)]


def pruned(model: VisionLanguageModel, kept: Mapping[str, Kept]) -> VisionLanguageModel:
    """Return a pruned copy of ``model`` in float32: a model as its configuration builds it, with some of the weights.

    Args:
        model: unchanged; its parameters may be sharded over ranks, which then all call this.
        kept: for ``decoder`` and ``vision_encoder``; a part that is missing here is copied whole.

    Raises:
        UserError: this family's layers cannot be pruned in this way, or its sizes depend on each other.
    """
    stacks = {part: find_stack(model, part) for part, what in kept.items() if what != Kept()}
    cuts = {part: _Cut(stack, kept[part]) for part, stack in stacks.items()}
    if isinstance(model, ComposedVLM):
        return _pruned_composed(model, cuts)
    assert isinstance(model, PretrainedVLM)
    whole = _pruned_module(model.model, list(cuts.values()), model.head.gather)
    return type(model)(whole, copy.copy(model.processor))


class _Cut:
    """What is kept of a stack, and what follows for the weights around it."""

    def __init__(self, stack: PlainStack, kept: Kept) -> None:
        self.stack, self.kept = stack, kept
        self.layers = list(range(len(stack))) if kept.layers is None else kept.layers
        self.plain = stack.plain if kept.narrows else None

    def old_name(self, name: str) -> str:
        """Return the name that a weight of the pruned model has in the whole one."""
        index, rest = self._split(name)
        return name if index is None else f"{self.stack.prefix}{self.layers[index]}.{rest}"

    def _split(self, name: str) -> tuple[int | None, str]:
        if not name.startswith(self.stack.prefix):
            return None, name
        index, _, rest = name.removeprefix(self.stack.prefix).partition(".")
        return int(index), rest

    def narrow(self, config: Any) -> None:
        """Set the part's sizes inside a layer in the whole model's configuration."""
        stack, keys, own, kept = self.stack, self.stack.keys, self.stack.of(config), self.kept
        if kept.channels is not None:
            width = len(kept.channels)
            setattr(own, keys.width, width)
            if stack.part == "decoder":
                _set_decoder_widths(config, width)
        if kept.groups is not None:
            groups = len(kept.groups[0])
            setattr(own, keys.heads, groups * (stack.heads // stack.groups))
            if keys.groups is not None:
                setattr(own, keys.groups, groups)
        if stack.part == "decoder":
            own.head_dim = stack.head_width
        neurons = stack.neurons if kept.neurons is None else len(kept.neurons[0])
        if keys.ratio:
            width = getattr(own, keys.width)
            if neurons % width:
                raise self._refused(f"its neurons are a multiple of its width, which {neurons:,} is not of {width:,}")
            neurons //= width
        setattr(own, keys.neurons, neurons)

    def shorten(self, config: Any) -> None:
        """Set the number of layers, and cut lists with an entry a layer, if layers are left out."""
        if self.kept.layers is None:
            return
        own, total = self.stack.of(config), len(self.stack)
        if self.stack.part == "vision_encoder":
            _check_feature_layers(config, own)
        for name, value in list(vars(own).items()):
            if isinstance(value, list) and name.endswith("_indexes"):
                setattr(own, name, [self.layers.index(i) for i in value if i in self.layers])
            elif isinstance(value, list) and len(value) == total and ("layer" in name or "block" in name):
                setattr(own, name, [value[i] for i in self.layers])
        setattr(own, self.stack.keys.layers, len(self.layers))

    def axes(self, name: str, before: Sequence[int], after: Sequence[int]) -> Axes:
        """Return which indices a weight of the whole model keeps, where narrowing changes its shape."""
        index, _ = self._split(name)
        if index is not None and index not in self.layers:
            return {}
        found = {}
        for dim, (old, new) in enumerate(zip(before, after, strict=True)):
            if old != new or self._inside(name, dim) is not None:
                found[dim] = self._indices(name, dim, old)
                if len(found[dim]) != new:
                    raise self._refused(f"{name} would have {new:,} in place of {old:,} numbers")
        return found

    def _indices(self, name: str, dim: int, size: int) -> list[int]:
        inside = self._inside(name, dim)
        if inside is not None:
            return inside
        channels, width = self.kept.channels, self.stack.width
        if channels is None or size % width:
            raise self._refused(f"{name} does not follow from the sizes that it knows")
        copies = size // width
        if name.endswith(CHANNELS_FIRST):
            return [channel * copies + one for channel in channels for one in range(copies)]
        return [one * width + channel for one in range(copies) for channel in channels]

    def _inside(self, name: str, dim: int) -> list[int] | None:
        """Return what is kept of a layer's neurons or heads in a dimension that counts them; else ``None``."""
        index, rest = self._split(name)
        if index is None or self.plain is None:
            return None
        kept, plain, place = self.kept, self.plain, self.layers.index(index)
        linear = rest.rpartition(".")[0]
        if kept.neurons is not None and (linear, dim) in {*((one, 0) for one in plain.mlp_in), (plain.mlp_out, 1)}:
            return kept.neurons[place]
        if kept.groups is None:
            return None
        queries = self._head_channels(kept.groups[place], self.stack.heads // self.stack.groups)
        if dim == 0 and linear in plain.queries:
            width = self.stack.heads * self.stack.head_width
            return [one * width + i for one in range(3) for i in queries] if plain.joint else queries
        if dim == 0 and linear in plain.keys_values:
            return self._head_channels(kept.groups[place], 1)
        return queries if (linear, dim) == (plain.attention_out, 1) else None

    def _head_channels(self, groups: Sequence[int], heads: int) -> list[int]:
        """Return the channels of all heads of some groups, ``heads`` to a group."""
        width = heads * self.stack.head_width
        return [group * width + i for group in groups for i in range(width)]

    def _refused(self, reason: str) -> UserError:
        return UserError(f"student.from_teacher: {self.stack.kind} cannot be narrowed in this way: {reason}")


def _set_decoder_widths(config: Any, width: int) -> None:
    for name in DECODER_WIDTHS.get(config.model_type, ()):
        owner, _, key = name.rpartition(".")
        setattr(getattr(config, owner) if owner else config, key, width)


def _check_feature_layers(config: Any, own: Any) -> None:
    """Refuse to leave out a vision encoder's layers that others read by number."""
    layers = getattr(config, "vision_feature_layer", None)
    read = layers if isinstance(layers, list | tuple) else [layers]
    if any(layer is not None and layer >= 0 for layer in read) or getattr(own, "deepstack_visual_indexes", None):
        raise UserError(
            "student.from_teacher.vision_encoder.layers: the decoder reads some of this vision encoder's layers by "
            "number; leave layers out"
        )


def _pruned_module(module: Any, cuts: Sequence[_Cut], gather: Gather) -> Any:
    """Return a pruned copy of a model of Transformers."""
    before = {name: _shape(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    config = copy.deepcopy(module.config)
    axes: dict[str, Axes] = {}
    for cut in cuts:
        if cut.kept.narrows:
            # One part at a time, since their sizes may be equal numbers.
            after = _narrowed_shapes(module, cut)
            for name, shape in before.items():
                axes[name] = axes.get(name, {}) | cut.axes(name, shape, after[name])
            cut.narrow(config)
        cut.shorten(config)
    student = _build(type(module), config)
    _fill(student, module, cuts, axes, gather)
    student.generation_config = copy.deepcopy(getattr(module, "generation_config", None))
    return student


def _shape(tensor: Any) -> tuple[int, ...]:
    """Return a weight's shape before ZeRO-3 sharded it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _narrowed_shapes(module: Any, cut: _Cut) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the weights have with one part narrowed; none is made."""
    config = copy.deepcopy(module.config)
    cut.narrow(config)
    stack = cut.stack
    try:
        with torch.device("meta"):
            shell = _build(type(module), config)
        # Transformers itself does this only when it reads or writes a configuration.
        for one in (config, stack.of(config)):
            getattr(one, "validate", lambda: None)()
    except Exception as error:  # the configuration's and the layers' own checks, of many kinds
        raise UserError(
            f"student.from_teacher: no {stack.kind} has these sizes: {first_line(error)}; change width or heads"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    groups = stack.groups if cut.kept.groups is None else len(cut.kept.groups[0])
    heads = groups * (stack.heads // stack.groups)
    out = shapes[f"{stack.prefix}0.{stack.plain.attention_out}.weight"]
    if out[1] != heads * stack.head_width:
        raise UserError(
            f"student.from_teacher: {stack.kind}: the {stack.part}'s width is its heads × {stack.head_width}; give "
            "width and heads that agree"
        )
    return shapes


@built_whole()
def _build(kind: Any, config: Any) -> Any:
    """Build a model of Transformers from its configuration, in float32, its weights yet to be filled."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = kind._from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


@torch.no_grad()
def _fill(student: nn.Module, whole: nn.Module, cuts: Sequence[_Cut], axes: Mapping[str, Axes], gather: Gather) -> None:
    """Copy the kept weights into the student. Collective if the whole model's are sharded."""
    if weightless():
        return
    sources = whole.state_dict(keep_vars=True)
    for name, tensor in _once(student.state_dict(keep_vars=True)):
        old = name
        for cut in cuts:
            old = cut.old_name(old)
        source = sources[old]
        with gather([source] if isinstance(source, nn.Parameter) else []):
            value = source.detach()
            for dim, indices in axes.get(old, {}).items():
                value = value.index_select(dim, torch.tensor(indices, device=value.device))
            tensor.copy_(value)


def _once(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under the first of its names."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _pruned_composed(model: ComposedVLM, cuts: Mapping[str, _Cut]) -> ComposedVLM:
    """Prune an assembled model part by part."""
    assert isinstance(model.processor, ComposedProcessor)
    gather, processor = model.head.gather, copy.copy(model.processor)
    decoder = _pruned_module(model.decoder, [cuts["decoder"]] if "decoder" in cuts else [], gather)
    if model.vision_encoder is None:
        student = ComposedVLM(decoder, processor)
    else:
        encoder = _pruned_encoder(model.vision_encoder, cuts.get("vision_encoder"), gather)
        student = ComposedVLM(
            decoder, processor, encoder, _pruned_projector(model, cuts, gather), model.projector_settings
        )
    student._ends = set(model._ends)
    return student


def _pruned_encoder(encoder: Any, cut: _Cut | None, gather: Gather) -> Any:
    """Return a copy of an assembled model's vision encoder, pruned if there is a cut."""
    settings = dict(encoder.settings)
    attention = getattr(getattr(encoder.tower, "config", None), "_attn_implementation", None)
    axes: dict[str, Axes] = {}
    if cut is not None:
        before = {name: _shape(tensor) for name, tensor in encoder.tower.state_dict(keep_vars=True).items()}
        config = copy.deepcopy(encoder.tower.config)
        if cut.kept.narrows:
            after = _narrowed_shapes(encoder.tower, cut)
            axes = {name: cut.axes(name, shape, after[name]) for name, shape in before.items() if name in after}
            cut.narrow(config)
        # A hidden state counted from the start is the last one; one counted from the end leaves as many layers out.
        left_out = getattr(config, cut.stack.keys.layers) - len(cut.stack)
        cut.shorten(config)
        setattr(config, cut.stack.keys.layers, len(cut.layers) + left_out)
        if settings["layer"] is not None and settings["layer"] >= 0:
            settings["layer"] = len(cut.layers)
        settings["config"] = config.to_dict()
    student = build_vision_encoder(settings, attention if settings["source"] == "transformers" else None)
    _fill(student.tower, encoder.tower, [] if cut is None else [cut], axes, gather)
    return student


def _pruned_projector(model: ComposedVLM, cuts: Mapping[str, _Cut], gather: Gather) -> Any:
    """Return a copy of an assembled model's projector that fits the pruned parts around it."""
    old, encoder = model.projector, model.vision_encoder
    assert old is not None
    assert encoder is not None
    widths = {"vision_encoder": encoder.width, "decoder": model.decoder.get_input_embeddings().embedding_dim}
    before = {name: _shape(tensor) for name, tensor in old.state_dict(keep_vars=True).items()}

    def build(sizes: Mapping[str, int]) -> Any:
        return build_projector(
            model.projector_settings, sizes["vision_encoder"], sizes["decoder"], encoder.tokens, encoder.grid
        )

    axes: dict[str, Axes] = {}
    new = dict(widths)
    for part, cut in cuts.items():
        if cut.kept.channels is None:
            continue
        if part == "decoder" and isinstance(old, Resampler):
            raise UserError("student.from_teacher.width: a resampler cannot be narrowed; leave width out")
        new[part] = len(cut.kept.channels)
        after = {name: tuple(tensor.shape) for name, tensor in build({**widths, part: new[part]}).state_dict().items()}
        for name, shape in before.items():
            axes[name] = axes.get(name, {}) | cut.axes(name, shape, after[name])
    student = build(new)
    _fill(student, old, [], axes, gather)
    return student
