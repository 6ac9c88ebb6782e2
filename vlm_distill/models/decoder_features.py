"""Decoder activations by name: hidden states, the last layer's queries, keys and values, and which layers attend.

Hidden states come from Transformers' own ``output_hidden_states``, given the wanted indices; it is off again when the
forward ends, so that a recomputed layer adds nothing. Queries, keys and values are computed again from the last layer's
input by its own norm and projections: these act position by position, so only the wanted positions are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from data.errors import UserError
from vlm_distill.losses import IMAGE_HIDDEN, TEXT_HIDDEN, TEXT_SAMPLES, AttentionFeature

from .families import family

#: Features of the last decoder layer's attention, and of images; ``hidden.K`` is the third kind. No loss reads the
#: features that can stand in the images' place.
ATTENTION = ("queries", "keys", "values")
IMAGES = ("vision", "projector")
VISION_FEATURES = "vision_features"
#: Kinds of features that are the last hidden states at tokens other than the predicting ones.
_AT_TOKENS = (IMAGE_HIDDEN, TEXT_HIDDEN, TEXT_SAMPLES)


def decoder_layers(body: Any) -> tuple[nn.ModuleList, str] | None:
    """Return a decoder's layers and their name in it; ``None`` if they are not found."""
    for name, module in body.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == body.config.num_hidden_layers:
            return module, name
    return None


def hidden_index(name: str, layers: int) -> int | None:
    """Return K of ``hidden.K``, from 0 (the embeddings) to ``layers``; ``None`` for another kind of name.

    Raises:
        UserError: no feature has this name, or the decoder has no such layer.
    """
    kind, _, text = name.partition(".")
    if name in (*ATTENTION, *IMAGES, VISION_FEATURES) or _at_tokens(name) or AttentionFeature.parse(name) is not None:
        return None
    if kind != "hidden" or not text.removeprefix("-").isdecimal():
        raise UserError(f"no feature is called {name!r}; there are hidden.K, {', '.join(IMAGES + ATTENTION)}")
    index = int(text)
    if not -layers - 1 <= index <= layers:
        raise UserError(f"feature {name}: the decoder has {layers} layers; give {-layers - 1} to {layers}")
    return index % (layers + 1)


def _at_tokens(name: str) -> bool:
    return name.partition(":")[0] in _AT_TOKENS


def wanted_states(features: Iterable[str], body: Any) -> list[int]:
    """Return the indices of the hidden states that the decoder must return for ``features``, ascending.

    The last one is not among them: every forward returns it.
    """
    layers = body.config.num_hidden_layers
    wanted = {layers - 1 if name in ATTENTION else hidden_index(name, layers) for name in features}
    return sorted(index for index in wanted if index is not None and index != layers)


def decoder_features(
    features: Sequence[str], body: Any, hidden: Tensor, states: Sequence[Tensor | None] | None, positions: Tensor
) -> dict[str, Tensor]:
    """Return the decoder's features by name, at ``positions`` only.

    Args:
        features: names of any kind; those of images are skipped.
        body: the decoder without its output layer.
        hidden: ``[N, H]``, the last hidden states.
        states: the decoder's hidden states ``[B, L, H]``, those of :func:`wanted_states` at least.
        positions: int64 ``[N]``.
    """
    layers = body.config.num_hidden_layers
    if wanted_states(features, body) and (states is None or len(states) != layers + 1):
        raise UserError(f"feature {features[0]}: {type(body).__name__} does not return its hidden states")

    def at(index: int) -> Tensor:
        if index == layers:
            return hidden
        state = None if states is None else states[index]
        assert state is not None
        return state.flatten(0, 1)[positions]

    found = {name: at(i) for name in features if (i := hidden_index(name, layers)) is not None}
    if any(name in ATTENTION for name in features):
        made = dict(zip(ATTENTION, _queries_keys_values(body, at(layers - 1)), strict=True))
        found |= {name: made[name] for name in features if name in ATTENTION}
    return found


def decoder_width(name: str, body: Any) -> int:
    """Return the width of a decoder's feature; of attention to images, the number of layers.

    Raises:
        UserError: it has no such feature.
    """
    if (attention := AttentionFeature.parse(name)) is not None:
        return len(attention_layers(body, attention))
    if hidden_index(name, body.config.num_hidden_layers) is None and not _at_tokens(name):
        return attention_widths(body)[name]
    return body.config.hidden_size


def attention_layers(body: Any, feature: AttentionFeature) -> list[Any]:
    """Return the attention modules of the layers that a feature names.

    Layers without attention, such as those of linear attention, are left out.

    Raises:
        UserError: it is not known how this decoder attends.
    """
    found = decoder_layers(body)
    layers = [] if found is None else list(found[0])
    chosen = layers[math.floor(feature.start * len(layers)) : math.ceil(feature.stop * len(layers))]
    modules = [layer.self_attn for layer in chosen if hasattr(layer, "self_attn")]
    if not modules:
        raise UserError(
            f"attention to images: cannot tell how {type(body).__name__} attends in these layers; leave that loss out"
        )
    return modules


def attention_widths(body: Any) -> dict[str, int]:
    """Return the widths of the last layer's queries, keys and values, all heads together.

    Raises:
        UserError: it is not known how this decoder computes them.
    """
    layer, attention = _last_attention(body)
    heads, width = getattr(body.config, "num_attention_heads", 0), getattr(attention, "head_dim", 0)
    queries = heads * width
    if hasattr(attention, "qkv_proj"):
        others = [(attention.qkv_proj.out_features - queries) // 2] * 2
        whole = sum(others) + queries == attention.qkv_proj.out_features
    else:
        others = [attention.k_proj.out_features, attention.v_proj.out_features]
        whole = attention.q_proj.out_features == queries  # some models put a gate into it too
    known = hasattr(layer, "input_layernorm") or family(body.config.model_type).norm_after
    if not (queries and whole and known) or any(not n or n % width for n in others):
        raise _unknown(body)
    return dict(zip(ATTENTION, [queries, *others], strict=True))


def _queries_keys_values(body: Any, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the last layer's queries, keys and values ``[N, heads · head width]`` from its input ``state [N, H]``.

    These are the projections' outputs: before rotary positions, and before any norms of single heads.
    """
    layer, attention = _last_attention(body)
    widths = attention_widths(body)
    # Call the layer's own modules, never read their weights: a call makes sharded parameters whole, and again in the
    # backward.
    normed = layer.input_layernorm(state) if hasattr(layer, "input_layernorm") else state
    if hasattr(attention, "qkv_proj"):
        queries, keys, values = attention.qkv_proj(normed).split([widths[name] for name in ATTENTION], -1)
        return queries, keys, values
    return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)


def _last_attention(body: Any) -> tuple[Any, Any]:
    found = decoder_layers(body)
    layer = None if found is None else found[0][-1]
    attention = getattr(layer, "self_attn", None)
    separate = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
    # Falcon-H1 scales what its attention reads: the projections alone would not be its queries.
    if not (separate or hasattr(attention, "qkv_proj")) or hasattr(layer, "attention_in_multiplier"):
        raise _unknown(body)
    return layer, attention


def _unknown(body: Any) -> UserError:
    return UserError(
        f"queries, keys and values: cannot tell how {type(body).__name__} makes them in its last layer; "
        "leave out the loss on its attention"
    )
