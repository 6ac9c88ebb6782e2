"""Networks of the distillation papers that timm lacks, registered with timm by name.

``cifar_resnet20`` … are for images of 32×32: ResNets of three stages (arXiv:1512.03385, section 4.2), wide ResNets
(arXiv:1605.07146) and VGGs with BatchNorm, in the variants that distillation papers compare on CIFAR-100.
Modules are named so that these papers' published weights load (:mod:`vision.weights`).
``mobilenet_v1`` (arXiv:1704.04861) is their ImageNet student: timm's, with ReLU where timm has ReLU6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.efficientnet import mobilenetv1_100
from torch import Tensor, nn

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class _Net(nn.Module):
    """Methods that timm expects, for a network of consecutive levels, pooling and a linear layer."""

    head_name = "fc"
    feature_info: list[dict[str, Any]]

    def __init__(self, num_classes: int, num_features: int, global_pool: str) -> None:
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool is 'avg' or '' here, not '{global_pool}'")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.global_pool = global_pool
        self.grad_checkpointing = False

    def level(self, index: int, x: Tensor) -> Tensor:
        """Return the output of a level of ``feature_info`` from that of the level before."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Apply what comes between the last level and the pooling."""
        return x

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final features and the levels at ``indices``, or only the levels, as timm does."""
        assert output_fmt == "NCHW"
        count = len(self.feature_info)
        wanted, last = feature_take_indices(count, indices)
        found = []
        for index in range(last + 1 if stop_early and intermediates_only else count):
            again = self.grad_checkpointing and self.training
            x = checkpoint(self.level, index, x) if again else self.level(index, x)
            if index in wanted:
                found.append(self.finish(x) if norm and index == count - 1 else x)
        return found if intermediates_only else (self.finish(x), found)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, indices=[0])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.mean((2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        old = next(self.parameters())
        setattr(self, self.head_name, self._make_head(num_classes).to(old.device, old.dtype).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^(conv1|bn1)", "blocks": r"^(?:layer|block)(\d+)" if coarse else r"^\D+(\d+)(?:\D+(\d+))?"}


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


class CifarResNet(_Net):
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
        self.fc = self._make_head(num_classes)
        self._initialise()

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


class CifarWideResNet(_Net):
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
        self.fc = self._make_head(num_classes)
        self._initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        return self.conv1(x) if index == 0 else getattr(self, f"block{index}")(x)

    def finish(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x))

    def _make_head(self, num_classes: int) -> nn.Module:
        head = super()._make_head(num_classes)
        if isinstance(head, nn.Linear):
            nn.init.zeros_(head.bias)
        return head


class CifarVGG(_Net):
    """Five groups of 3×3 convolutions with BatchNorm, with max-pooling before groups two to four."""

    head_name = "classifier"
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
        self.classifier = self._make_head(num_classes)
        self._initialise()

    def level(self, index: int, x: Tensor) -> Tensor:
        # Images of 64×64 are pooled once more before the last group.
        if 1 <= index <= 3 or (index == 4 and x.shape[-1] >= 8):
            x = F.max_pool2d(x, 2)
        return getattr(self, f"block{index}")(x)

    def _make_head(self, num_classes: int) -> nn.Module:
        head = super()._make_head(num_classes)
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, 0.0, 0.01)
            nn.init.zeros_(head.bias)
        return head


WIDE = (32, 64, 128, 256)
ARCHITECTURES: dict[str, tuple[type[_Net], dict[str, Any]]] = {
    **{f"cifar_resnet{depth}": (CifarResNet, {"depth": depth}) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": (CifarResNet, {"depth": depth, "widths": WIDE}) for depth in (8, 32)},
    **{
        f"cifar_wrn_{depth}_{factor}": (CifarWideResNet, {"depth": depth, "factor": factor})
        for depth in (16, 40)
        for factor in (1, 2)
    },
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
                "first_conv": "block0.0" if net is CifarVGG else "conv1",
                "classifier": net.head_name,
            }
            for name, (net, _) in ARCHITECTURES.items()
        },
        "mobilenet_v1.untrained": _MOBILENET,
    }
)


def _entry(name: str, net: type[_Net], options: dict[str, Any]) -> Callable[..., nn.Module]:
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
