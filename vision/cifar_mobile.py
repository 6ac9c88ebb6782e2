"""ShuffleNets and MobileNet-V2 for images of 32×32, in the variants that distillation papers compare on CIFAR-100.

They differ from their papers in a stem that keeps the image's size (MobileNet-V2: halves it) without pooling after it,
and in ReLU where MobileNet-V2 has ReLU6. Modules are named as mdistiller and RepDistiller save them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cifar_net import CifarNet


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels, so that the next grouped convolution mixes them. ``[N, C, H, W]`` → the same."""
    count, channels, height, width = x.shape
    return x.view(count, groups, channels // groups, height, width).transpose(1, 2).reshape_as(x)


def _depthwise(width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)


class ShuffleV1Block(nn.Module):
    """1×1 convolutions in groups around a 3×3 depthwise one, channels shuffled after the first.

    A block that halves the size puts its pooled input beside its output; others add it.
    """

    def __init__(self, width_in: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        made = width - width_in if stride == 2 else width
        # The stem's few channels are not grouped.
        self.groups = 1 if width_in == CifarShuffleNetV1.STEM else groups
        self.stride = stride
        self.conv1 = nn.Conv2d(width_in, made // 4, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(made // 4)
        self.conv2 = _depthwise(made // 4, stride)
        self.bn2 = nn.BatchNorm2d(made // 4)
        self.conv3 = nn.Conv2d(made // 4, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle_channels(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(y + x)


class CifarShuffleNetV1(CifarNet):
    """ShuffleNet (arXiv:1707.01083) with three groups."""

    head_name = "linear"
    STEM, WIDTHS, DEPTHS, GROUPS = 24, (240, 480, 960), (4, 8, 4), 3

    def __init__(self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__(num_classes, self.WIDTHS[-1], global_pool)
        self.conv1 = nn.Conv2d(in_chans, self.STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.STEM)
        self.feature_info = [{"num_chs": self.STEM, "reduction": 1, "module": "bn1"}]
        width_in = self.STEM
        for stage, (width, depth) in enumerate(zip(self.WIDTHS, self.DEPTHS, strict=True), 1):
            blocks = [ShuffleV1Block(width_in, width, 2, self.GROUPS)]
            blocks += [ShuffleV1Block(width, width, 1, self.GROUPS) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 2**stage, "module": f"layer{stage}"})
            width_in = width
        self.linear = self.make_head(num_classes)

    def level(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) if index == 0 else getattr(self, f"layer{index}")(x)


class ShuffleV2Block(nn.Module):
    """Convolves half of the channels (1×1, depthwise 3×3, 1×1), passes the others, then shuffles all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = x.chunk(2, 1)
        y = F.relu(self.bn1(self.conv1(y)))
        y = self.bn2(self.conv2(y))
        y = F.relu(self.bn3(self.conv3(y)))
        return shuffle_channels(torch.cat([passed, y], 1), 2)


class ShuffleV2DownBlock(nn.Module):
    """Halves the size in two branches that both see all channels."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        # The short branch.
        self.conv1 = _depthwise(width_in, 2)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        # The long branch.
        self.conv3 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn1(self.conv1(x))
        short = F.relu(self.bn2(self.conv2(short)))
        long = F.relu(self.bn3(self.conv3(x)))
        long = self.bn4(self.conv4(long))
        long = F.relu(self.bn5(self.conv5(long)))
        return shuffle_channels(torch.cat([short, long], 1), 2)


class CifarShuffleNetV2(CifarNet):
    """ShuffleNet-V2 (arXiv:1807.11164) of width 1."""

    head_name = "linear"
    STEM, WIDTHS, DEPTHS, LAST = 24, (116, 232, 464), (4, 8, 4), 1024

    def __init__(self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__(num_classes, self.LAST, global_pool)
        self.conv1 = nn.Conv2d(in_chans, self.STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.STEM)
        self.feature_info = [{"num_chs": self.STEM, "reduction": 1, "module": "bn1"}]
        width_in = self.STEM
        for stage, (width, depth) in enumerate(zip(self.WIDTHS, self.DEPTHS, strict=True), 1):
            blocks: list[nn.Module] = [ShuffleV2DownBlock(width_in, width)]
            blocks += [ShuffleV2Block(width) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 2**stage, "module": f"layer{stage}"})
            width_in = width
        self.conv2 = nn.Conv2d(width_in, self.LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(self.LAST)
        self.linear = self.make_head(num_classes)

    def level(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) if index == 0 else getattr(self, f"layer{index}")(x)

    def finish(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))


class InvertedResidual(nn.Module):
    """1×1 convolution to more channels, depthwise 3×3, 1×1 to fewer, linear; added to its input if shapes agree."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * width_in
        self.adds = stride == 1 and width_in == width
        self.conv = nn.Sequential(
            nn.Conv2d(width_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            _depthwise(inner, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _convolution(width_in: int, width: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class CifarMobileNetV2(CifarNet):
    """MobileNet-V2 (arXiv:1801.04381) of width 0.5."""

    head_name, stem_name = "classifier", "conv1.0"
    head_std = 0.01
    #: Width, depth, first stride and expansion of each group of blocks.
    GROUPS = ((8, 1, 1, 1), (12, 2, 1, 6), (16, 3, 2, 6), (32, 4, 2, 6), (48, 3, 1, 6), (80, 3, 2, 6), (160, 1, 1, 6))
    #: The groups of each level: those between two halvings of the size, the first two apart as in the papers' code.
    LEVELS = ((0, 1), (2,), (3, 4), (5, 6))
    STEM, LAST = 16, 1280

    def __init__(self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__(num_classes, self.LAST, global_pool)
        self.conv1 = _convolution(in_chans, self.STEM, 3, 2)
        self.feature_info = [{"num_chs": self.STEM, "reduction": 2, "module": "conv1"}]
        groups, width_in = [], self.STEM
        for width, depth, stride, expansion in self.GROUPS:
            blocks = [InvertedResidual(width_in, width, stride, expansion)]
            blocks += [InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1)]
            groups.append(nn.Sequential(*blocks))
            width_in = width
        self.blocks = nn.ModuleList(groups)
        for number, level in enumerate(self.LEVELS, 1):
            last = level[-1]
            self.feature_info.append(
                {"num_chs": self.GROUPS[last][0], "reduction": 2**number, "module": f"blocks.{last}"}
            )
        self.conv2 = _convolution(width_in, self.LAST, 1, 1)
        self.classifier = self.make_head(num_classes)
        self.initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            return self.conv1(x)
        for group in self.LEVELS[index - 1]:
            x = self.blocks[group](x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        return self.conv2(x)
