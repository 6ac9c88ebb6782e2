"""Projectors: from the vision encoder's features to the decoder's embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.errors import UserError

from .common import check_keys, choose, read_settings
from .folder import MOST_LAYERS


class Projector(nn.Module, ABC):
    """Image features ``[n, T, D]`` to embeddings ``[n, tokens(T), H]``."""

    @abstractmethod
    def tokens(self, count: int) -> int:
        """Return the number of embeddings that ``count`` features become."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor: ...

    def uses(self) -> dict[int, float]:
        """Return how often parameters (by id) multiply for each output embedding, if not once."""
        return {}


class MLPProjector(Projector):
    """``depth`` linear layers with GELU between them; depth 1 is one linear layer, depth 2 is LLaVA-1.5's."""

    def __init__(self, in_width: int, out_width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def tokens(self, count: int) -> int:
        return count

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class PixelShuffleMLP(Projector):
    """Each square of ``factor × factor`` neighbours becomes one token: norm and two linear layers (InternVL)."""

    def __init__(self, in_width: int, out_width: int, factor: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.grid = grid
        joined = in_width * factor**2
        self.layers = nn.Sequential(
            nn.LayerNorm(joined), nn.Linear(joined, out_width), nn.GELU(), nn.Linear(out_width, out_width)
        )

    def tokens(self, count: int) -> int:
        return count // self.factor**2

    def forward(self, features: Tensor) -> Tensor:
        n, _, width = features.shape
        (rows, cols), f = self.grid, self.factor
        squares = features.reshape(n, rows // f, f, cols // f, f, width).transpose(2, 3)
        return self.layers(squares.reshape(n, rows * cols // f**2, f * f * width))


class Resampler(Projector):
    """Learned queries that read the image features through cross-attention: a fixed number of tokens an image.

    Keys and values are the queries and the features together, as in the perceiver resampler of Flamingo (Alayrac et
    al. 2022, section 3.1.1). Each feature gets a learned position, since a convolutional encoder's have none.
    """

    def __init__(self, in_width: int, out_width: int, count: int, tokens: int, layers: int, heads: int) -> None:
        super().__init__()
        self.entry = nn.Linear(in_width, out_width)
        self.positions = nn.Parameter(torch.randn(count, out_width) * 0.02)
        self.queries = nn.Parameter(torch.randn(tokens, out_width) * 0.02)
        self.layers = nn.ModuleList(_ResamplerLayer(out_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(out_width)

    def tokens(self, count: int) -> int:
        return self.queries.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        context = self.entry(features) + self.positions
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, context)
        return self.norm(queries)

    def uses(self) -> dict[int, float]:
        features = len(self.positions) / len(self.queries)
        joined = {id(p): 1 + features for name, p in self.named_parameters() if ".key_value." in name}
        return dict.fromkeys(map(id, self.entry.parameters()), features) | joined


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        normed = self.query_norm(queries)
        key, value = self.key_value(torch.cat([normed, self.context_norm(context)], 1)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(normed), key, value))
        queries = queries + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return queries + self.mlp(queries)


class AdaptedProjector(Projector):
    """Another model's projector, and an MLP to this decoder's width if they differ (CompoDistill, 2025).

    Attributes:
        keep_inner: whether the other model's projector stays frozen when this one is trained.
    """

    def __init__(self, inner: Projector, width: int, out_width: int, depth: int) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = nn.Identity() if width == out_width else MLPProjector(width, out_width, depth)
        self.keep_inner = False

    def tokens(self, count: int) -> int:
        return self.inner.tokens(count)

    def forward(self, features: Tensor) -> Tensor:
        return self.adapter(self.inner(features))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        super().requires_grad_(requires_grad)
        if self.keep_inner:
            self.inner.requires_grad_(False)
        return self

    def uses(self) -> dict[int, float]:
        return self.inner.uses()


@dataclass(frozen=True)
class MLPSettings:
    depth: int = 2


@dataclass(frozen=True)
class PixelShuffleSettings:
    factor: int = 2


@dataclass(frozen=True)
class ResamplerSettings:
    tokens: int = 64
    layers: int = 2
    heads: int = 8


@dataclass(frozen=True)
class AdaptedSettings:
    inner: Mapping[str, Any]
    width: int
    depth: int = 2


PROJECTORS = ("linear", "mlp", "pixel_shuffle_mlp", "resampler")


def build_projector(
    settings: Mapping[str, Any], in_width: int, out_width: int, count: int, grid: tuple[int, int] | None
) -> Projector:
    """Build the projector described by ``settings``.

    Args:
        settings: ``type`` (``linear``, ``mlp``, ``pixel_shuffle_mlp``, ``resampler``; of a student that took its
            teacher's, ``adapted``) and that type's own keys.
        in_width: width of the image features.
        out_width: width of the decoder.
        count: number of features of an image.
        grid: rows and columns of the features; ``None`` if they are not a grid.

    Raises:
        UserError: an unknown type or key, or a value that does not fit the widths or the grid.
    """
    where = "projector"
    options = {k: v for k, v in settings.items() if k != "type"}
    kind = settings.get("type", "mlp")
    if kind == "adapted":
        adapted = read_settings(AdaptedSettings, where, options)
        for name in ("width", "depth"):
            _positive(where, name, getattr(adapted, name))
        choose(f"{where}.inner.type", adapted.inner.get("type"), PROJECTORS)
        inner = build_projector(adapted.inner, in_width, adapted.width, count, grid)
        return AdaptedProjector(inner, adapted.width, out_width, adapted.depth)
    choose(f"{where}.type", kind, PROJECTORS)
    if kind == "linear":
        check_keys(where, options, [])
        return MLPProjector(in_width, out_width, depth=1)
    if kind == "mlp":
        mlp = read_settings(MLPSettings, where, options)
        _positive(where, "depth", mlp.depth)
        return MLPProjector(in_width, out_width, mlp.depth)
    if kind == "pixel_shuffle_mlp":
        shuffle = read_settings(PixelShuffleSettings, where, options)
        _positive(where, "factor", shuffle.factor)
        if grid is None:
            raise UserError(f"{where}: pixel_shuffle_mlp needs features on a grid; set vision_encoder.select: patch")
        if grid[0] % shuffle.factor or grid[1] % shuffle.factor:
            raise UserError(
                f"{where}: factor {shuffle.factor} does not divide the grid of {grid[0]}×{grid[1]} image features; "
                "change projector.factor or vision_encoder.image_size"
            )
        return PixelShuffleMLP(in_width, out_width, shuffle.factor, grid)
    resampler = read_settings(ResamplerSettings, where, options)
    for name in ("tokens", "layers", "heads"):
        _positive(where, name, getattr(resampler, name))
    if out_width % resampler.heads:
        raise UserError(f"{where}: {resampler.heads} heads do not divide the decoder's width {out_width}")
    return Resampler(in_width, out_width, count, resampler.tokens, resampler.layers, resampler.heads)


def _positive(where: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_LAYERS:
        raise UserError(f"{where}.{name}: expected a whole number from 1 to {MOST_LAYERS:,}, got {value!r}")
