"""Vision encoders: towers of timm, open_clip and Transformers as images in, feature sequence out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import UserError

from .common import built_whole, check_attention, checkpoint_layers, choose, first_line, read_settings
from .folder import check_settings, timm_loader_options
from .loading import Report, check_finite, check_report, check_size, read_config, with_report
from .weightless import weightless

INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class VisionEncoderSettings:
    """What names a vision encoder.

    Attributes:
        source: ``timm``, ``open_clip`` or ``transformers``.
        name: a model of that library (or, for Transformers, a folder); may be left out when ``config`` says it all.
        pretrained: load weights; for open_clip it may be the tag of the weights.
        config: keyword arguments of ``timm.create_model``, an open_clip model configuration (``vision_cfg`` …), or a
            Transformers vision configuration with its ``model_type``.
        layer: which hidden state is used, with LLaVA's meaning: 0 is the embedding, k the output of the k-th layer, −1
            that of the last and −2 that of the last but one, all without the final norm. ``None``: the final output,
            after the final norm if the tower has one there. For a convolutional tower: its k-th feature level.
        select: ``patch`` leaves the class and register tokens out, ``cls_patch`` keeps them.
        image_size: pixels a side; ``None``: the encoder's own.
        resize: how an image of any shape becomes a square: ``squash`` (the whole image, its shape not kept), ``pad``
            (to a square with the mean colour, then resized, as LLaVA-1.5 does) or ``crop`` (shorter side resized,
            centre cut out, as CLIP's own processor does: what is cut off cannot be asked about).
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


#: The most pixels a side that an encoder is built for.
MOST_PIXELS = 16_384

# Pixels. The square around a longer image would take gigabytes, so that it is made smaller first.
_LONGEST_PADDED = 8192


@dataclass(frozen=True)
class ImageTransform:
    """A PIL image to a normalised tensor; holds no module, so that worker processes can have it."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize: str = "squash"

    def __call__(self, image: Image.Image) -> Tensor:
        """Float32 ``[3, H, W]`` of an RGB image."""
        height, width = self.size
        if self.resize == "pad" and image.width != image.height:
            if max(image.size) > _LONGEST_PADDED:
                image = image.copy()
                image.thumbnail((_LONGEST_PADDED, _LONGEST_PADDED))
            side = max(image.size)
            colour = tuple(int(255 * m) for m in self.mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        resample = INTERPOLATION[self.interpolation]
        if self.resize == "crop":
            scale = max(height / image.height, width / image.width)
            size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            image = image if size == image.size else image.resize(size, resample)
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        elif image.size != (width, height):
            image = image.resize((width, height), resample)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def blank(self) -> Image.Image:
        """A black image of the size that the encoder takes."""
        height, width = self.size
        return Image.new("RGB", (width, height))


class VisionEncoder(nn.Module):
    """Pixels ``[n, 3, H, W]`` to features ``[n, tokens, width]``.

    Attributes:
        width: of a feature.
        tokens: number of features an image has.
        positions: at which each layer computes for an image, class and register tokens included; ``None`` where they
            differ from layer to layer, as in convolutional and hierarchical towers.
        grid: rows and columns, when the features are a grid in row-major order, else ``None``.
        transform: images to pixels.
        settings: what builds this encoder again without a network, weights aside.
    """

    def __init__(self, tower: _Tower, settings: VisionEncoderSettings) -> None:
        super().__init__()
        self.tower = tower.module
        self._extract = tower.extract
        self._channels_last = tower.channels_last
        self._checkpoint = tower.checkpoint
        size = tower.size
        self.transform = ImageTransform(size, tower.mean, tower.std, tower.interpolation, settings.resize)
        self._prefix = 0
        self.grid: tuple[int, int] | None = None
        self._measure(tower, settings.select)
        self.settings = asdict(settings) | {
            "pretrained": False,
            "config": tower.config,
            "image_size": list(size),
            "mean": list(tower.mean),
            "std": list(tower.std),
            "interpolation": tower.interpolation,
        }

    def _measure(self, tower: _Tower, select: str) -> None:
        """One image through the tower: its features' shape, and which parameters take part in them."""
        named = dict(self.tower.named_parameters())
        self.tower.eval()
        with torch.enable_grad():
            output = self._extract(self.tower, torch.zeros(1, 3, *self.transform.size))
            features = self._flatten(output)
            used = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        self.tower.train()
        count = features.shape[1]
        self.width = features.shape[2]
        patches = None
        if tower.patch:
            patches = self.transform.size[0] // tower.patch[0], self.transform.size[1] // tower.patch[1]
        self.positions = count if patches and count >= patches[0] * patches[1] else None
        if output.dim() == 4:
            rows, cols = output.shape[1:3] if self._channels_last else output.shape[2:]
            self.grid = (rows, cols)
        elif patches:
            rows, cols = patches
            prefix = count - rows * cols
            if 0 <= prefix < rows * cols or prefix == 1:
                self.grid = (rows, cols)
                self._prefix = prefix
        if select == "cls_patch" and self._prefix:
            self.grid, self._prefix = None, 0
        self.tokens = count - self._prefix
        # What never reaches the features (poolers, heads, mask tokens) would wait for gradients that never come:
        # whole modules are taken out, single parameters stay frozen.
        idle = {name for (name, _), grad in zip(named.items(), used, strict=True) if grad is None}
        for name, child in list(self.tower.named_children()):
            own = {f"{name}.{k}" for k, _ in child.named_parameters()}
            if own and own <= idle:
                setattr(self.tower, name, nn.Identity())
                idle -= own
        self._idle = idle
        self.requires_grad_(True)

    @property
    def seeing(self) -> set[str]:
        """Names of the tower's weights that reach the features, in its state dict."""
        return set(self.tower.state_dict()) - self._idle

    def _flatten(self, output: Tensor) -> Tensor:
        if output.dim() == 4:
            output = output.flatten(1, 2) if self._channels_last else output.flatten(2).transpose(1, 2)
        return output

    def requires_grad_(self, requires_grad: bool = True) -> VisionEncoder:
        """As in torch, except that parameters which cannot influence the features stay frozen."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.tower.named_parameters():
            if name in self._idle:
                parameter.requires_grad_(False)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.tower.parameters()).dtype
        return self._flatten(self._extract(self.tower, pixel_values.to(dtype)))[:, self._prefix :]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Float32 ``[3, H, W]`` of an RGB image."""
        return self.transform(image)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.transform.size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.transform.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.transform.std

    @property
    def interpolation(self) -> str:
        return self.transform.interpolation

    def checkpoint_activations(self) -> None:
        """Recompute the tower's layers in the backward; towers that cannot keep their activations."""
        self._checkpoint(self.tower)


@dataclass
class _Tower:
    """A library's model with its head off and what is needed to use it."""

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
    missing: frozenset[str] = frozenset()  # names of weights that the files lack


@built_whole()
def build_vision_encoder(settings: Mapping[str, Any], attn_implementation: str | None = None) -> VisionEncoder:
    """The vision encoder that ``settings`` name (see :class:`VisionEncoderSettings`), in float32.

    Args:
        settings: a mapping with the keys of :class:`VisionEncoderSettings`.
        attn_implementation: for Transformers towers; timm and open_clip choose their own.

    Raises:
        UserError: a wrong setting, or a tower that its library cannot build.
    """
    s = read_settings(VisionEncoderSettings, "vision_encoder", settings)
    choose("vision_encoder.source", s.source, BUILDERS)
    choose("vision_encoder.select", s.select, ("patch", "cls_patch"))
    choose("vision_encoder.resize", s.resize, ("squash", "pad", "crop"))
    if s.interpolation is not None:
        choose("vision_encoder.interpolation", s.interpolation, INTERPOLATION)
    if s.name is None and s.config is None:
        raise UserError("vision_encoder: give 'name', 'config' or both")
    if s.pretrained and s.name is None:
        raise UserError("vision_encoder: 'pretrained' needs a 'name'")
    if s.image_size is not None and max(_pair(s.image_size)) > MOST_PIXELS:
        raise UserError(f"vision_encoder.image_size: {s.image_size} is more than {MOST_PIXELS} pixels a side")
    check_attention(attn_implementation)
    try:
        if s.config is not None:
            check_settings(s.config, "vision_encoder.config")
        tower = BUILDERS[s.source](s, attn_implementation)
        encoder = VisionEncoder(tower, s)
        if s.pretrained and not weightless():
            name = s.name or "vision_encoder"
            check_report(name, Report(tower.missing & encoder.seeing))
            check_finite(name, encoder)
        return encoder
    except UserError:
        raise
    except Exception as error:  # whatever the library raises for names, options and files it does not know
        raise UserError(
            f"vision_encoder: {s.source} cannot build '{s.name or 'config'}': {first_line(error)}; "
            "check source, name, config and image_size"
        ) from error


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _keep(layer: int, count: int) -> int:
    """How many of ``count`` layers give hidden state ``layer`` (0 is the embedding)."""
    kept = layer if layer >= 0 else count + 1 + layer
    if not 0 <= kept <= count:
        raise UserError(f"vision_encoder.layer: {layer} is outside the {count} layers of this encoder")
    return kept


def _timm(s: VisionEncoderSettings, attn_implementation: str | None) -> _Tower:
    import timm
    from timm.data import resolve_model_data_config

    name, config = s.name, dict(s.config or {})
    if name is None:
        raise UserError("vision_encoder.name: timm needs the name of an architecture")
    size = None if s.image_size is None else _pair(s.image_size)

    def create(**options: Any) -> nn.Module:
        return timm.create_model(
            name, pretrained=bool(s.pretrained) and not weightless(), num_classes=0, global_pool="", **options
        )

    def create_sized() -> nn.Module:
        if size is None or "img_size" in config:
            return create(**config)
        try:  # transformers need the size for their position embeddings, convolutional nets do not know the option
            return create(**config, img_size=size)
        except TypeError:
            return create(**config)

    _check_size(s, create_sized, pretrained=bool(s.pretrained))
    module = create_sized()
    data = resolve_model_data_config(module)
    return _timm_tower(module, s, config, data, size)


def _check_size(s: VisionEncoderSettings, create: Callable[[], nn.Module], pretrained: bool = False) -> None:
    """Refuse a tower with new weights that is larger than this machine; published ones are not."""
    if pretrained or weightless():
        return
    with torch.device("meta"):
        check_size(f"vision_encoder {s.name or 'config'}", create())


def _timm_tower(
    module: nn.Module, s: VisionEncoderSettings, config: dict[str, Any], data: dict[str, Any], size: Any
) -> _Tower:
    embed: Any = getattr(module, "patch_embed", None)
    built: Any = getattr(embed, "img_size", None)
    levels = len(getattr(module, "feature_info", ()))
    trim: Any = getattr(module, "prune_intermediate_layers", None)
    if s.layer is not None:
        if trim is None:
            raise UserError(f"vision_encoder.layer: timm's '{s.name}' gives its final features only; leave 'layer' out")
        kept = _keep(s.layer, levels)
        if kept == 0:
            raise UserError("vision_encoder.layer: timm towers give no hidden state 0")
        trim([kept - 1], prune_norm=True, prune_head=True)
    return _Tower(
        module=module,
        extract=_call,
        checkpoint=_set_grad_checkpointing,
        # What told timm where to find weights is no part of what builds the tower again.
        config={key: value for key, value in config.items() if key not in timm_loader_options()},
        size=size or (tuple(built) if built else tuple(data["input_size"][1:])),
        mean=tuple(s.mean or data["mean"]),
        std=tuple(s.std or data["std"]),
        interpolation=s.interpolation
        or (data["interpolation"] if data["interpolation"] in INTERPOLATION else "bicubic"),
        patch=_pair(embed.patch_size) if hasattr(embed, "patch_size") else None,
        channels_last=getattr(module, "output_fmt", "NCHW") == "NHWC",
    )


def _open_clip(s: VisionEncoderSettings, attn_implementation: str | None) -> _Tower:
    import open_clip
    from open_clip.model import _build_vision_tower
    from open_clip.transformer import QuickGELU

    config = dict(s.config or {})
    if s.pretrained and not weightless():
        tag = s.pretrained if isinstance(s.pretrained, str) else None
        size = None if s.image_size is None else _pair(s.image_size)
        whole = open_clip.create_model(s.name, pretrained=tag, force_image_size=size, require_pretrained=True)
        visual: Any = whole.visual
        named = open_clip.factory.get_model_config(s.name) or {}
        config = {"embed_dim": named.get("embed_dim", 0), "vision_cfg": dict(named.get("vision_cfg", {}))}
        if not config["vision_cfg"]:
            raise UserError(f"vision_encoder.name: open_clip knows no architecture called '{s.name}'")
        config["quick_gelu"] = any(isinstance(m, QuickGELU) for m in visual.modules())
    else:
        if not config:
            named = open_clip.factory.get_model_config(s.name)
            if named is None:
                raise UserError(f"vision_encoder.name: open_clip knows no architecture called '{s.name}'")
            config = {k: v for k, v in named.items() if k in ("embed_dim", "vision_cfg", "quick_gelu")}
        config = {"embed_dim": 16, "quick_gelu": False} | config
        vision = dict(config["vision_cfg"])
        if s.image_size is not None:
            vision["image_size"] = _pair(s.image_size)
        build = partial(_build_vision_tower, config["embed_dim"], vision, config["quick_gelu"])
        _check_size(s, build)
        visual = build()
    size = _pair(visual.image_size)
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
            del blocks[_keep(s.layer, len(blocks)) :]
        if s.layer is not None or visual.attn_pool is not None:
            visual.ln_post = nn.Identity()
        # With these off, the tower's own forward gives all of its tokens: parameters that the tower itself holds
        # (class embedding, positions) are only whole under ZeRO-3 while its forward runs.
        visual.attn_pool = visual.proj = None
        visual.pool_type, visual.final_ln_after_pool, visual.output_tokens = "none", False, False
    return _Tower(
        module=visual,
        extract=_call,
        checkpoint=_set_grad_checkpointing,
        config=config,
        size=size,
        mean=tuple(s.mean or data["mean"]),
        std=tuple(s.std or data["std"]),
        interpolation=s.interpolation or data["interpolation"],
        patch=_pair(visual.patch_size) if hasattr(visual, "patch_size") else None,
    )


#: Normalisation of Transformers towers that come without an image processor, by the start of their model type.
NORMALISATION = {"clip": CLIP, "siglip": HALF, "vit": HALF}


def _transformers(s: VisionEncoderSettings, attn_implementation: str | None) -> _Tower:
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
        # The tower may be a part of what is there, and have a pooler that is not: what is missing is asked once it is
        # known which weights reach the features.
        module, report = with_report(AutoModel, name, config=config, dtype=torch.float32, **extra)
    else:
        _check_size(s, lambda: AutoModel.from_config(config, trust_remote_code=False, **extra))
        module = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **extra)
    own = getattr(config, "image_size", None)
    wanted = s.image_size if s.image_size is not None else own
    if wanted is None:
        raise UserError("vision_encoder.image_size: this encoder takes any size; choose one")
    size = _pair(wanted)
    if s.layer is not None:
        _truncate(module, _keep(s.layer, config.num_hidden_layers), config.num_hidden_layers)
    mean, std = next((v for k, v in NORMALISATION.items() if config.model_type.startswith(k)), IMAGENET)
    interpolation = "bicubic"
    if processor is not None:
        mean = getattr(processor, "image_mean", None) or mean
        std = getattr(processor, "image_std", None) or std
        resample = getattr(processor, "resample", None)
        interpolation = next((k for k, v in INTERPOLATION.items() if v == resample), interpolation)
    patch = getattr(config, "patch_size", None)
    # Towers with a position for each patch stretch them to another size only when told to.
    stretch = own is not None and size != _pair(own) and config.model_type.startswith(("clip", "siglip", "vit"))
    return _Tower(
        module=module,
        extract=_last_hidden_state_stretched if stretch else _last_hidden_state,
        checkpoint=checkpoint_layers,
        config=config.to_dict(),
        size=size,
        mean=tuple(s.mean or mean),
        std=tuple(s.std or std),
        interpolation=s.interpolation or interpolation,
        patch=None if patch is None else _pair(patch),
        missing=report.missing,
    )


def _truncate(module: Any, kept: int, count: int) -> None:
    """Drops the layers after the ``kept``-th and the final norm."""
    layers = next((m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    norm = next((n for n in ("post_layernorm", "layernorm", "norm") if hasattr(module, n)), None)
    if layers is None or norm is None:
        raise UserError(f"vision_encoder.layer: not known where {type(module).__name__} keeps its layers; leave it out")
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


BUILDERS: dict[str, Callable[[VisionEncoderSettings, str | None], _Tower]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    "transformers": _transformers,
}
