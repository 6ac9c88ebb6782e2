"""Build towers of timm, open_clip and Transformers, headless, with what is needed to use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError

from .common import checkpoint_layers
from .families import CLIP, IMAGENET, tower_normalisation
from .folder import timm_loader_options
from .image_transform import INTERPOLATION
from .loading import Report, check_new_size, read_config, with_report
from .weightless import weightless


@dataclass(frozen=True)
class VisionEncoderSettings:
    """Settings of a vision encoder.

    Attributes:
        source: ``timm``, ``open_clip`` or ``transformers``.
        name: a model of that library (or, for Transformers, a folder); optional if ``config`` is complete.
        pretrained: load weights; for open_clip it can be the tag of the weights.
        config: keyword arguments of ``timm.create_model``, an open_clip model configuration (``vision_cfg`` …), or a
            Transformers vision configuration with its ``model_type``.
        layer: which hidden state is used, with LLaVA's meaning: 0 is the embedding, k the output of the k-th layer, −1
            of the last and −2 of the last but one, all without the final norm. ``None``: the final output, after the
            final norm if the tower has one. For a convolutional tower: its k-th feature level.
        select: ``patch`` leaves out class and register tokens, ``cls_patch`` keeps them.
        image_size: pixels a side; ``None``: the encoder's own.
        resize: how an image of any shape becomes a square: ``squash`` (the whole image, its shape not kept), ``pad``
            (to a square with the mean colour, then resized, as in LLaVA-1.5) or ``crop`` (shorter side resized, centre
            cut out, as in CLIP's own processor; what is cut off cannot be asked about).
        mean, std: normalisation in 0..1; ``None``: the encoder's own.
        interpolation: ``None``: the encoder's own.
    """

    source: str
    name: str | None = None
    pretrained: bool | str = False
    config: Mapping[str, Any] | None = None
    layer: int | None = None
    select: str = "patch"
    image_size: int | Sequence[int] | None = None
    resize: str = "squash"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None


@dataclass
class Tower:
    """A library's model without its head, and what is needed to use it."""

    module: nn.Module
    extract: Callable[[nn.Module, Tensor], Tensor]
    checkpoint: Callable[[nn.Module], None]
    config: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    patch: tuple[int, int] | None
    channels_last: bool = False
    missing: frozenset[str] = frozenset()  # names of weights missing in the files


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def layers_kept(layer: int, count: int) -> int:
    """Return how many of ``count`` layers are needed for hidden state ``layer`` (0 is the embedding)."""
    kept = layer if layer >= 0 else count + 1 + layer
    if not 0 <= kept <= count:
        raise UserError(f"vision_encoder.layer: {layer} is outside the {count} layers of this encoder")
    return kept


def _timm(s: VisionEncoderSettings, attn_implementation: str | None) -> Tower:
    import timm
    from timm.data import resolve_model_data_config

    name, config = s.name, dict(s.config or {})
    if name is None:
        raise UserError("vision_encoder.name: timm needs the name of an architecture")
    size = None if s.image_size is None else as_pair(s.image_size)

    def create(**options: Any) -> nn.Module:
        return timm.create_model(name, pretrained=_loads(s), num_classes=0, global_pool="", **options)

    def create_sized() -> nn.Module:
        if size is None or "img_size" in config:
            return create(**config)
        try:  # transformers need the size for their position embeddings; convolutional nets do not take it
            return create(**config, img_size=size)
        except TypeError:
            return create(**config)

    if not s.pretrained:
        check_new_size(_what(s), create_sized)
    module = create_sized()
    data = resolve_model_data_config(module)
    return _timm_tower(module, s, config, data, size)


def _what(s: VisionEncoderSettings) -> str:
    return f"vision_encoder {s.name or 'config'}"


def _loads(s: VisionEncoderSettings) -> bool:
    """Return whether published weights are loaded; in a plan without weights, the tower is built like a new one."""
    return bool(s.pretrained) and not weightless()


def _timm_tower(
    module: nn.Module, s: VisionEncoderSettings, config: dict[str, Any], data: dict[str, Any], size: Any
) -> Tower:
    embed: Any = getattr(module, "patch_embed", None)
    built: Any = getattr(embed, "img_size", None)
    levels = len(getattr(module, "feature_info", ()))
    trim: Any = getattr(module, "prune_intermediate_layers", None)
    if s.layer is not None:
        if trim is None:
            raise UserError(f"vision_encoder.layer: timm's '{s.name}' gives its final features only; leave 'layer' out")
        kept = layers_kept(s.layer, levels)
        if kept == 0:
            raise UserError("vision_encoder.layer: timm towers give no hidden state 0")
        trim([kept - 1], prune_norm=True, prune_head=True)
    return Tower(
        module=module,
        extract=_call,
        checkpoint=_set_grad_checkpointing,
        # Where timm found the weights is not part of what builds the tower again.
        config={key: value for key, value in config.items() if key not in timm_loader_options()},
        size=size or (tuple(built) if built else tuple(data["input_size"][1:])),
        mean=tuple(s.mean or data["mean"]),
        std=tuple(s.std or data["std"]),
        interpolation=s.interpolation
        or (data["interpolation"] if data["interpolation"] in INTERPOLATION else "bicubic"),
        patch=as_pair(embed.patch_size) if hasattr(embed, "patch_size") else None,
        channels_last=getattr(module, "output_fmt", "NCHW") == "NHWC",
    )


def _load_open_clip(s: VisionEncoderSettings) -> tuple[Any, dict[str, Any]]:
    """Load a published tower; return it and the configuration that builds it again."""
    import open_clip
    from open_clip.transformer import QuickGELU

    tag = s.pretrained if isinstance(s.pretrained, str) else None
    size = None if s.image_size is None else as_pair(s.image_size)
    whole: Any = open_clip.create_model(s.name, pretrained=tag, force_image_size=size, require_pretrained=True)
    named = open_clip.factory.get_model_config(s.name) or {}
    config = {"embed_dim": named.get("embed_dim", 0), "vision_cfg": dict(named.get("vision_cfg", {}))}
    if not config["vision_cfg"]:
        raise UserError(f"vision_encoder.name: open_clip knows no architecture called '{s.name}'")
    config["quick_gelu"] = any(isinstance(m, QuickGELU) for m in whole.visual.modules())
    return whole.visual, config


def _new_open_clip(s: VisionEncoderSettings) -> tuple[Any, dict[str, Any]]:
    """Build a tower with new weights; return it and the configuration that builds it again."""
    import open_clip
    from open_clip.model import _build_vision_tower

    config = dict(s.config or {})
    if not config:
        named = open_clip.factory.get_model_config(s.name)
        if named is None:
            raise UserError(f"vision_encoder.name: open_clip knows no architecture called '{s.name}'")
        config = {k: v for k, v in named.items() if k in ("embed_dim", "vision_cfg", "quick_gelu")}
    config = {"embed_dim": 16, "quick_gelu": False} | config
    vision = dict(config["vision_cfg"])
    if s.image_size is not None:
        vision["image_size"] = as_pair(s.image_size)
    build = partial(_build_vision_tower, config["embed_dim"], vision, config["quick_gelu"])
    check_new_size(_what(s), build)
    return build(), config


def _open_clip(s: VisionEncoderSettings, attn_implementation: str | None) -> Tower:
    visual, config = _load_open_clip(s) if _loads(s) else _new_open_clip(s)
    size = as_pair(visual.image_size)
    config["vision_cfg"] = config["vision_cfg"] | {"image_size": list(size), "timm_model_pretrained": False}
    own = getattr(visual, "preprocess_cfg", None) or {}
    data = {
        "mean": own.get("mean", CLIP[0]),
        "std": own.get("std", CLIP[1]),
        "interpolation": own.get("interpolation", "bicubic"),
        "input_size": (3, *size),
    }
    if hasattr(visual, "trunk"):
        visual.trunk.reset_classifier(0, "")
        return _timm_tower(visual.trunk, s, config, data, size)
    if hasattr(visual, "attnpool"):
        if s.layer is not None:
            raise UserError("vision_encoder.layer: open_clip's ResNets give their final features only; leave it out")
        visual.attnpool = nn.Identity()
    else:
        if s.layer is not None:
            blocks = visual.transformer.resblocks
            del blocks[layers_kept(s.layer, len(blocks)) :]
        if s.layer is not None or visual.attn_pool is not None:
            visual.ln_post = nn.Identity()
        # With these off, the tower's own forward returns all of its tokens. It must be that forward: under ZeRO-3 the
        # tower's own parameters (class embedding, positions) are whole only while it runs.
        visual.attn_pool = visual.proj = None
        visual.pool_type, visual.final_ln_after_pool, visual.output_tokens = "none", False, False
    return Tower(
        module=visual,
        extract=_call,
        checkpoint=_set_grad_checkpointing,
        config=config,
        size=size,
        mean=tuple(s.mean or data["mean"]),
        std=tuple(s.std or data["std"]),
        interpolation=s.interpolation or data["interpolation"],
        patch=as_pair(visual.patch_size) if hasattr(visual, "patch_size") else None,
    )


def _transformers(s: VisionEncoderSettings, attn_implementation: str | None) -> Tower:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    processor: Any = None
    report = Report()
    name = s.name or ""
    if s.config is not None:
        options = dict(s.config)
        if "model_type" not in options:
            raise UserError("vision_encoder.config: 'model_type' is missing (clip_vision_model, siglip_vision_model …)")
        config = AutoConfig.for_model(options.pop("model_type"), **options)
    else:
        config = read_config(name)
        config = getattr(config, "vision_config", config)
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if s.pretrained:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        # The tower may be part of a larger model, and its pooler may be missing: missing weights are checked once it is
        # known which of them reach the features.
        module, report = with_report(AutoModel, name, config=config, dtype=torch.float32, **extra)
    else:
        check_new_size(_what(s), lambda: AutoModel.from_config(config, trust_remote_code=False, **extra))
        module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **extra)
    own = getattr(config, "image_size", None)
    wanted = s.image_size if s.image_size is not None else own
    if wanted is None:
        raise UserError("vision_encoder.image_size: this encoder takes images of any size; set one")
    size = as_pair(wanted)
    if s.layer is not None:
        _truncate(module, layers_kept(s.layer, config.num_hidden_layers), config.num_hidden_layers)
    by_patch = tower_normalisation(config.model_type)
    mean, std = by_patch or IMAGENET
    interpolation = "bicubic"
    if processor is not None:
        mean = getattr(processor, "image_mean", None) or mean
        std = getattr(processor, "image_std", None) or std
        resample = getattr(processor, "resample", None)
        interpolation = next((k for k, v in INTERPOLATION.items() if v == resample), interpolation)
    patch = getattr(config, "patch_size", None)
    stretch = own is not None and size != as_pair(own) and by_patch is not None
    return Tower(
        module=module,
        extract=_last_hidden_state_stretched if stretch else _last_hidden_state,
        checkpoint=checkpoint_layers,
        config=config.to_dict(),
        size=size,
        mean=tuple(s.mean or mean),
        std=tuple(s.std or std),
        interpolation=s.interpolation or interpolation,
        patch=None if patch is None else as_pair(patch),
        missing=report.missing,
    )


def _truncate(module: Any, kept: int, count: int) -> None:
    """Drop the layers after the ``kept``-th and the final norm."""
    layers = next((m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    norm = next((n for n in ("post_layernorm", "layernorm", "norm") if hasattr(module, n)), None)
    if layers is None or norm is None:
        raise UserError(f"vision_encoder.layer: cannot find the layers of {type(module).__name__}; leave it out")
    del layers[kept:]
    setattr(module, norm, nn.Identity())


def _call(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels)


def _last_hidden_state(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels).last_hidden_state


def _last_hidden_state_stretched(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels, interpolate_pos_encoding=True).last_hidden_state


def _set_grad_checkpointing(module: Any) -> None:
    if hasattr(module, "set_grad_checkpointing"):
        module.set_grad_checkpointing(True)


BUILDERS: dict[str, Callable[[VisionEncoderSettings, str | None], Tower]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    "transformers": _transformers,
}
