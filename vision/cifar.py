"""Networks of the distillation papers that timm lacks, registered with timm by name.

``cifar_resnet20`` … are for images of 32×32: ResNets of three stages (arXiv:1512.03385, section 4.2), ResNet-50, wide
ResNets (arXiv:1605.07146), VGGs with BatchNorm, ShuffleNets and MobileNet-V2 (:mod:`vision.cifar_mobile`), in the
variants that distillation papers compare on CIFAR-100.
Modules are named so that these papers' published weights load (:mod:`vision.weights`).
``mobilenet_v1`` (arXiv:1704.04861) is their ImageNet student: timm's, with ReLU where timm has ReLU6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.efficientnet import mobilenetv1_100
from torch import Tensor, nn

from .cifar_mobile import CifarMobileNetV2, CifarShuffleNetV1, CifarShuffleNetV2
from .cifar_net import CifarNet

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut, which a 1×1 convolution projects if shapes differ."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class CifarResNet(CifarNet):
    """Depth ``6n + 2``: a 3×3 convolution and three stages of ``n`` basic blocks."""

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(num_classes, widths[-1], global_pool)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "bn1"}]
        for stage in (1, 2, 3):
            steps = [(widths[stage - 1], 1 if stage == 1 else 2)] + [(widths[stage], 1)] * ((depth - 2) // 6 - 1)
            blocks = [BasicBlock(width_in, widths[stage], stride) for width_in, stride in steps]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append(
                {"num_chs": widths[stage], "reduction": 2 ** (stage - 1), "module": f"layer{stage}"}
            )
        self.fc = self.make_head(num_classes)
        self.initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            return F.relu(self.bn1(self.conv1(x)), inplace=True)
        return getattr(self, f"layer{index}")(x)


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, the last one four times as wide; a 1×1 convolution projects the shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class CifarBottleneckResNet(CifarNet):
    """ImageNet's ResNet of four stages with a 3×3 stem and no pooling before them, as the papers' ResNet-50."""

    head_name = "linear"

    def __init__(
        self, depths: tuple[int, ...], num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg"
    ) -> None:
        super().__init__(num_classes, 2048, global_pool)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.feature_info = [{"num_chs": 64, "reduction": 1, "module": "bn1"}]
        width_in = 64
        for stage, depth in enumerate(depths, 1):
            width, blocks = 32 * 2**stage, list[nn.Module]()
            for number in range(depth):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(BottleneckBlock(width_in, width, stride))
                width_in = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width_in, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.linear = self.make_head(num_classes)
        self.initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            return F.relu(self.bn1(self.conv1(x)), inplace=True)
        return getattr(self, f"layer{index}")(x)


class PreActivationBlock(nn.Module):
    """Norm and ReLU before each of two 3×3 convolutions; the shortcut is projected if widths differ."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class _Stage(nn.Module):
    """Consecutive blocks under the name ``layer``, as in published weights."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CifarWideResNet(CifarNet):
    """Depth ``6n + 4``, ``factor`` times as wide; features are taken before the norm that follows a level."""

    def __init__(
        self, depth: int, factor: int, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg"
    ) -> None:
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        super().__init__(num_classes, widths[-1], global_pool)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.feature_info = [{"num_chs": 16, "reduction": 1, "module": "conv1"}]
        for stage in (1, 2, 3):
            steps = [(widths[stage - 1], 1 if stage == 1 else 2)] + [(widths[stage], 1)] * ((depth - 4) // 6 - 1)
            blocks: list[nn.Module] = [PreActivationBlock(width, widths[stage], stride) for width, stride in steps]
            setattr(self, f"block{stage}", _Stage(blocks))
            self.feature_info.append(
                {"num_chs": widths[stage], "reduction": 2 ** (stage - 1), "module": f"block{stage}"}
            )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = self.make_head(num_classes)
        self.initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        return self.conv1(x) if index == 0 else getattr(self, f"block{index}")(x)

    def finish(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))

    def make_head(self, num_classes: int) -> nn.Module:
        head = super().make_head(num_classes)
        if isinstance(head, nn.Linear):
            nn.init.zeros_(head.bias)
        return head


class CifarVGG(CifarNet):
    """Five groups of 3×3 convolutions with BatchNorm, with max-pooling before groups two to four."""

    head_name, stem_name = "classifier", "block0.0"
    head_std = 0.01
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(
        self, depths: tuple[int, ...], num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg"
    ) -> None:
        super().__init__(num_classes, self.WIDTHS[-1], global_pool)
        self.feature_info = []
        width_in = in_chans
        for group, (width, depth) in enumerate(zip(self.WIDTHS, depths, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                width_in = width
            setattr(self, f"block{group}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** min(group, 3), "module": f"block{group}"})
        self.classifier = self.make_head(num_classes)
        self.initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        # Images of 64×64 are pooled once more before the last group.
        if 1 <= index <= 3 or (index == 4 and x.shape[-1] >= 8):
            x = F.max_pool2d(x, 2)
        return getattr(self, f"block{index}")(x)


WIDE = (32, 64, 128, 256)
ARCHITECTURES: dict[str, tuple[type[CifarNet], dict[str, Any]]] = {
    **{f"cifar_resnet{depth}": (CifarResNet, {"depth": depth}) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": (CifarResNet, {"depth": depth, "widths": WIDE}) for depth in (8, 32)},
    "cifar_wrn_16_1": (CifarWideResNet, {"depth": 16, "factor": 1}),
    "cifar_wrn_16_2": (CifarWideResNet, {"depth": 16, "factor": 2}),
    "cifar_wrn_40_1": (CifarWideResNet, {"depth": 40, "factor": 1}),
    "cifar_wrn_40_2": (CifarWideResNet, {"depth": 40, "factor": 2}),
    "cifar_resnet50": (CifarBottleneckResNet, {"depths": (3, 4, 6, 3)}),
    "cifar_shufflenet_v1": (CifarShuffleNetV1, {}),
    "cifar_shufflenet_v2": (CifarShuffleNetV2, {}),
    "cifar_mobilenet_v2": (CifarMobileNetV2, {}),
    "cifar_vgg8": (CifarVGG, {"depths": (1, 1, 1, 1, 1)}),
    "cifar_vgg11": (CifarVGG, {"depths": (1, 1, 2, 2, 2)}),
    "cifar_vgg13": (CifarVGG, {"depths": (2, 2, 2, 2, 2)}),
    "cifar_vgg16": (CifarVGG, {"depths": (2, 2, 3, 3, 3)}),
    "cifar_vgg19": (CifarVGG, {"depths": (2, 2, 4, 4, 4)}),
}

_COMMON = {"url": "", "interpolation": "bicubic"}
_CIFAR = {
    **_COMMON,
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "mean": CIFAR100_MEAN,
    "std": CIFAR100_STD,
    "crop_pct": 1.0,
}
_MOBILENET = {
    **_COMMON,
    "architecture": "mobilenet_v1",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "crop_pct": 0.875,
    "first_conv": "conv_stem",
    "classifier": "classifier",
}
default_cfgs = generate_default_cfgs(
    {
        **{
            f"{name}.untrained": {
                **_CIFAR,
                "first_conv": net.stem_name,
                "classifier": net.head_name,
            }
            for name, (net, _) in ARCHITECTURES.items()
        },
        "mobilenet_v1.untrained": _MOBILENET,
    }
)


def _entry(name: str, net: type[CifarNet], options: dict[str, Any]) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(net, name, pretrained, **{**options, **kwargs})

    build.__name__ = name
    build.__doc__ = f"{net.__name__} with {options}."
    return build


for _name, (_net, _options) in ARCHITECTURES.items():
    register_model(_entry(_name, _net, _options))


@register_model
def mobilenet_v1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNet-V1 of width 1 with ReLU, 4.2 million parameters."""
    cfg = kwargs.pop("pretrained_cfg", None)
    cfg = cfg if isinstance(cfg, dict) else _MOBILENET
    return mobilenetv1_100(pretrained, pretrained_cfg=cfg, **{"act_layer": "relu", **kwargs})
