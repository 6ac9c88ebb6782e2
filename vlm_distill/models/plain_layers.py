"""PlainStack: the layers of a decoder or a vision encoder that can be pruned, and their sizes in its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from data.errors import UserError

from .composed import ComposedVLM
from .decoder_features import decoder_layers
from .families import PLAIN, SizeKeys
from .interface import VisionLanguageModel
from .pretrained import PretrainedVLM

#: Names of linear layers in attention and MLPs. Names in one list are alternatives, or used side by side.
_QUERIES, _KEYS_VALUES, _ALL_THREE = ("q_proj",), ("k_proj", "v_proj"), ("qkv",)
_ATTENTION_OUT = ("o_proj", "out_proj", "proj", "projection_layer")
_MLP_IN = ("gate_proj", "up_proj", "fc1", "linear_fc1")
_MLP_OUT = ("down_proj", "fc2", "linear_fc2")


@dataclass(frozen=True)
class PlainLayer:
    """Where a layer's attention and MLP are: the names of their linear layers in it, such as ``self_attn.q_proj``.

    Attributes:
        queries, keys_values: of the projections; the output of a joint one counts as queries, keys and values.
        joint: whether one projection gives queries, keys and values.
        attention_out, mlp_in, mlp_out: of the other linear layers.
    """

    queries: tuple[str, ...]
    keys_values: tuple[str, ...]
    joint: bool
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str


class PlainStack:
    """A stack of layers within a model of Transformers.

    Args:
        part: ``decoder`` or ``vision_encoder``, for messages.
        module: the model that holds the stack and is built from one configuration.
        stack: the layers.
        of: returns the part's own configuration from that of ``module``, or from a copy of it.

    Attributes:
        kind: the part's model type.
        prefix: of the layers' names in ``module``, such as ``model.layers.``.
        keys: names of the sizes in the part's configuration.
    """

    def __init__(self, part: str, module: Any, stack: nn.ModuleList, of: Callable[[Any], Any]) -> None:
        self.part, self.module, self.layers, self.of = part, module, list(stack), of
        self.kind = of(module.config).model_type
        self.prefix = next(name for name, found in module.named_modules() if found is stack) + "."
        self.keys = PLAIN.get(self.kind) or SizeKeys()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def plain(self) -> PlainLayer:
        """Where a layer's attention and MLP are.

        Raises:
            UserError: this family's layers are of another kind.
        """
        found = _plain_layer(self.layers[0]) if self.kind in PLAIN else None
        if found is None:
            raise UserError(
                f"student.from_teacher: the {self.part} {type(self.module).__name__} ({self.kind}) has no layers that "
                f"can be narrowed or chosen in it; {self._way_out}"
            )
        return found

    @property
    def _way_out(self) -> str:
        return "give layers alone" if self.part == "decoder" else "leave vision_encoder out"

    @property
    def _config(self) -> Any:
        return self.of(self.module.config)

    @property
    def width(self) -> int:
        """The hidden size."""
        return getattr(self._config, self.keys.width)

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return getattr(self._config, self.keys.heads)

    @property
    def groups(self) -> int:
        """The number of key-value heads; each has equally many query heads."""
        return (getattr(self._config, self.keys.groups, None) if self.keys.groups else None) or self.heads

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self._linear(self.plain.attention_out).in_features // self.heads

    @property
    def neurons(self) -> int:
        """The number of neurons of an MLP."""
        return self._linear(self.plain.mlp_out).in_features

    def _linear(self, name: str) -> Any:
        return self.layers[0].get_submodule(name)


def find_stack(model: VisionLanguageModel, part: str) -> PlainStack:
    """Return a model's layers of ``decoder`` or ``vision_encoder``, whether they are plain or not.

    Raises:
        UserError: the model has no such part, or it is not known where the part keeps its layers.
    """
    if part not in model.parts:
        raise UserError(f"student.from_teacher.{part}: the teacher has no {part}; leave it out")
    if part == "decoder":
        module: Any = model.decoder if isinstance(model, ComposedVLM) else _transformers_model(model)
        found = decoder_layers(model.body)
        if found is None:
            name = type(model.body).__name__
            raise UserError(f"from_teacher: cannot find the layers of {name}; choose another teacher")
        return PlainStack(part, module, found[0], lambda config: config.get_text_config())
    return _tower_stack(model)


def _tower_stack(model: VisionLanguageModel) -> PlainStack:
    if isinstance(model, ComposedVLM):
        assert model.vision_encoder is not None
        tower: Any = model.vision_encoder.tower
        module, of = tower, _itself
    else:
        module = _transformers_model(model)
        tower, of = module.get_encoder(modality="image"), _vision_config
    config = getattr(tower, "config", None)
    keys = PLAIN.get(getattr(config, "model_type", ""))
    lists = (found for found in tower.modules() if isinstance(found, nn.ModuleList))
    stack = next((found for found in lists if len(found) and _plain_layer(found[0]) is not None), None)
    if keys is None or stack is None:
        kind = getattr(config, "model_type", type(tower).__name__)
        raise UserError(
            f"student.from_teacher.vision_encoder: {kind} has no layers that can be chosen or narrowed; leave it out"
        )
    return PlainStack("vision_encoder", module, stack, of)


def _itself(config: Any) -> Any:
    return config


def _vision_config(config: Any) -> Any:
    return config.vision_config


def _transformers_model(model: VisionLanguageModel) -> Any:
    assert isinstance(model, PretrainedVLM)
    return model.model


def _plain_layer(layer: nn.Module) -> PlainLayer | None:
    """Return where a layer's attention and MLP are; ``None`` if it is built in another way."""
    attention = dict(_children_with(layer, (*_QUERIES, *_ALL_THREE)))
    mlp = dict(_children_with(layer, _MLP_OUT))
    if len(attention) != 1 or len(mlp) != 1:
        return None
    (name, reads), (mlp_name, neurons) = *attention.items(), *mlp.items()
    joint = hasattr(reads, _ALL_THREE[0])
    queries = _present(name, reads, _ALL_THREE if joint else _QUERIES)
    keys_values = () if joint else _present(name, reads, _KEYS_VALUES)
    out, into = _present(name, reads, _ATTENTION_OUT), _present(mlp_name, neurons, _MLP_IN)
    mlp_out = _present(mlp_name, neurons, _MLP_OUT)
    if len(out) != 1 or not into or not (joint or len(keys_values) == 2):
        return None
    found = PlainLayer(queries, keys_values, joint, out[0], into, mlp_out[0])
    names = chain(queries, keys_values, out, into, mlp_out)
    return found if all(isinstance(layer.get_submodule(one), nn.Linear) for one in names) else None


def _children_with(layer: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in layer.named_children():
        if any(hasattr(child, one) for one in names):
            yield name, child


def _present(where: str, module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{where}.{name}" for name in names if hasattr(module, name))
