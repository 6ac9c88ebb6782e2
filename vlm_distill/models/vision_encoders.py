"""VisionEncoder: a tower of timm, open_clip or Transformers; images in, features out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import UserError, first_line

from .common import built_whole, check_attention, choose, read_settings
from .folder import check_settings
from .image_transform import INTERPOLATION, ImageTransform
from .loading import Report, check_finite, check_report
from .vision_towers import BUILDERS, Tower, VisionEncoderSettings, as_pair

#: The largest image side, in pixels, that an encoder is built for.
MOST_PIXELS = 16_384


class VisionEncoder(nn.Module):
    """Turns pixels ``[n, 3, H, W]`` into features ``[n, tokens, width]``.

    Attributes:
        width: width of a feature.
        tokens: number of features of an image.
        positions: number of positions that each layer computes for an image, class and register tokens included;
            ``None`` if it differs from layer to layer, as in convolutional and hierarchical towers.
        grid: rows and columns, if the features are a grid in row-major order.
        transform: turns images into pixels.
        settings: build this encoder again without a network, except for its weights.
    """

    def __init__(self, tower: Tower, settings: VisionEncoderSettings) -> None:
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

    def _measure(self, tower: Tower, select: str) -> None:
        """Run one image through the tower to find its features' shape and which parameters reach them."""
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
        # remove whole modules, freeze single parameters.
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
        """As in torch, except that parameters that cannot influence the features stay frozen."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.tower.named_parameters():
            if name in self._idle:
                parameter.requires_grad_(False)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.tower.parameters()).dtype
        return self._flatten(self._extract(self.tower, pixel_values.to(dtype)))[:, self._prefix :]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return an RGB image as float32 ``[3, H, W]``."""
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
        """Recompute the tower's layers in the backward; towers without support keep their activations."""
        self._checkpoint(self.tower)


@built_whole()
def build_vision_encoder(settings: Mapping[str, Any], attn_implementation: str | None = None) -> VisionEncoder:
    """Build the vision encoder described by ``settings`` (see :class:`VisionEncoderSettings`), in float32.

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
    if s.image_size is not None and max(as_pair(s.image_size)) > MOST_PIXELS:
        raise UserError(f"vision_encoder.image_size: {s.image_size} is more than {MOST_PIXELS} pixels a side")
    check_attention(attn_implementation)
    try:
        if s.config is not None:
            check_settings(s.config, "vision_encoder.config")
        tower = BUILDERS[s.source](s, attn_implementation)
        encoder = VisionEncoder(tower, s)
        if s.pretrained:
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
