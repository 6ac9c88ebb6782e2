"""The papers' networks: sizes as published, against a plain reading of the architectures, timm's methods."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters

from vision import cifar

# Millions of parameters with 100 classes, as papers on distillation print them.
PUBLISHED = {
    "cifar_resnet20": 0.28,
    "cifar_resnet32": 0.47,
    "cifar_resnet56": 0.86,
    "cifar_resnet110": 1.74,
    "cifar_resnet8x4": 1.23,
    "cifar_resnet32x4": 7.43,
    "cifar_wrn_16_1": 0.18,
    "cifar_wrn_16_2": 0.70,
    "cifar_wrn_40_1": 0.57,
    "cifar_wrn_40_2": 2.26,
    "cifar_vgg8": 3.97,
    "cifar_vgg13": 9.46,
    "mobilenet_v1": 4.23,
}
# Those of mdistiller's classes, counted; each of these networks gave mdistiller's logits and features from its weights.
COUNTED = {
    "cifar_resnet50": 23_705_252,
    "cifar_shufflenet_v1": 949_258,
    "cifar_shufflenet_v2": 1_355_528,
    "cifar_mobilenet_v2": 812_836,
}
MOBILE = ["cifar_shufflenet_v1", "cifar_shufflenet_v2", "cifar_mobilenet_v2"]
SMALL = ["cifar_resnet8", "cifar_wrn_16_1", "cifar_vgg8", *MOBILE]


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PUBLISHED[name]
    assert model.num_classes == (1000 if name == "mobilenet_v1" else 100)
    assert model.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_parameters_as_in_the_papers_code(name):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == COUNTED[name]


def test_names_are_new_to_timm():
    for name in [*cifar.ARCHITECTURES, "mobilenet_v1"]:
        assert timm.model_entrypoint(name).__module__ == "vision.cifar"


def test_normalisation_and_size():
    data = timm.data.resolve_model_data_config(timm.create_model("cifar_resnet8"))
    assert data["input_size"] == (3, 32, 32)
    assert data["mean"] == cifar.CIFAR100_MEAN
    assert data["crop_pct"] == 1.0


def norm(x, state, name):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{n}"] for n in names))


def resnet8(x, w):
    """Depth 8: one basic block a stage, written out."""
    x = F.relu(norm(F.conv2d(x, w["conv1.weight"], padding=1), w, "bn1"))
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        at = f"layer{stage}.0"
        y = F.relu(norm(F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1), w, f"{at}.bn1"))
        y = norm(F.conv2d(y, w[f"{at}.conv2.weight"], padding=1), w, f"{at}.bn2")
        if stage > 1:
            x = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride), w, f"{at}.downsample.1")
        x = F.relu(x + y)
    return F.linear(F.avg_pool2d(x, 8).flatten(1), w["fc.weight"], w["fc.bias"])


def wrn(x, w, blocks):
    """Norm, ReLU, convolution, twice; a block that changes the width projects the activated input."""
    x = F.conv2d(x, w["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            a = F.relu(norm(x, w, f"{at}.bn1"))
            y = F.relu(norm(F.conv2d(a, w[f"{at}.conv1.weight"], stride=stride, padding=1), w, f"{at}.bn2"))
            y = F.conv2d(y, w[f"{at}.conv2.weight"], padding=1)
            short = w.get(f"{at}.shortcut.weight")
            x = y + (x if short is None else F.conv2d(a, short, stride=stride))
    x = F.relu(norm(x, w, "bn1"))
    return F.linear(F.avg_pool2d(x, 8).flatten(1), w["fc.weight"], w["fc.bias"])


def vgg8(x, w):
    for group in range(5):
        at = f"block{group}"
        x = F.relu(norm(F.conv2d(x, w[f"{at}.0.weight"], w[f"{at}.0.bias"], padding=1), w, f"{at}.1"))
        x = F.max_pool2d(x, 2) if group < 3 else x
    return F.linear(x.mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


def conv_norm(x, w, conv, norm_name, stride=1, groups=1):
    weight = w[f"{conv}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    return norm(x, w, norm_name)


def shuffled(x, groups):
    """Channel ``i`` of the result is the ``i // groups``-th of group ``i % groups``."""
    size = x.shape[1] // groups
    return x[:, [(i % groups) * size + i // groups for i in range(x.shape[1])]]


def resnet50(x, w):
    x = F.relu(conv_norm(x, w, "conv1", "bn1"))
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for block in range(depth):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(conv_norm(x, w, f"{at}.conv1", f"{at}.bn1"))
            y = F.relu(conv_norm(y, w, f"{at}.conv2", f"{at}.bn2", stride))
            y = conv_norm(y, w, f"{at}.conv3", f"{at}.bn3")
            x = F.relu(y + (x if block else conv_norm(x, w, f"{at}.shortcut.0", f"{at}.shortcut.1", stride)))
    return F.linear(x.mean((2, 3)), w["linear.weight"], w["linear.bias"])


def shufflenet_v1(x, w):
    """Three groups, but one in the first convolution of the first block; a pooled shortcut is concatenated."""
    x = F.relu(conv_norm(x, w, "conv1", "bn1"))
    for stage, depth in enumerate((4, 8, 4), 1):
        for block in range(depth):
            at, groups = f"layer{stage}.{block}", 1 if (stage, block) == (1, 0) else 3
            stride, middle = 1 if block else 2, len(w[f"{at}.conv2.weight"])
            y = shuffled(F.relu(conv_norm(x, w, f"{at}.conv1", f"{at}.bn1", groups=groups)), groups)
            y = F.relu(conv_norm(y, w, f"{at}.conv2", f"{at}.bn2", stride, middle))
            y = conv_norm(y, w, f"{at}.conv3", f"{at}.bn3", groups=3)
            x = F.relu(y + x if block else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))
    return F.linear(x.mean((2, 3)), w["linear.weight"], w["linear.bias"])


def shufflenet_v2(x, w):
    """Two branches that both see all channels, then blocks that pass half of them."""
    x = F.relu(conv_norm(x, w, "conv1", "bn1"))
    for stage, (depth, width) in enumerate(((4, 116), (8, 232), (4, 464)), 1):
        at, half = f"layer{stage}.0", width // 2
        short = conv_norm(x, w, f"{at}.conv1", f"{at}.bn1", 2, x.shape[1])
        short = F.relu(conv_norm(short, w, f"{at}.conv2", f"{at}.bn2"))
        long = F.relu(conv_norm(x, w, f"{at}.conv3", f"{at}.bn3"))
        long = conv_norm(long, w, f"{at}.conv4", f"{at}.bn4", 2, half)
        x = shuffled(torch.cat([short, F.relu(conv_norm(long, w, f"{at}.conv5", f"{at}.bn5"))], 1), 2)
        for block in range(1, depth):
            at = f"layer{stage}.{block}"
            y = F.relu(conv_norm(x[:, half:], w, f"{at}.conv1", f"{at}.bn1"))
            y = conv_norm(y, w, f"{at}.conv2", f"{at}.bn2", groups=half)
            x = shuffled(torch.cat([x[:, :half], F.relu(conv_norm(y, w, f"{at}.conv3", f"{at}.bn3"))], 1), 2)
    x = F.relu(conv_norm(x, w, "conv2", "bn2"))
    return F.linear(x.mean((2, 3)), w["linear.weight"], w["linear.bias"])


def mobilenet_v2(x, w):
    """Width 0.5; a block adds its input if it changes neither size nor width."""
    x = F.relu(conv_norm(x, w, "conv1.0", "conv1.1", 2))
    for group, (depth, first) in enumerate(((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))):
        for block in range(depth):
            at, stride = f"blocks.{group}.{block}.conv", 1 if block else first
            inner = len(w[f"{at}.3.weight"])
            y = F.relu(conv_norm(x, w, f"{at}.0", f"{at}.1"))
            y = F.relu(conv_norm(y, w, f"{at}.3", f"{at}.4", stride, inner))
            y = conv_norm(y, w, f"{at}.6", f"{at}.7")
            x = y + x if y.shape == x.shape and stride == 1 else y
    x = F.relu(conv_norm(x, w, "conv2.0", "conv2.1"))
    return F.linear(x.mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


PLAIN = {
    "cifar_resnet50": resnet50,
    "cifar_shufflenet_v1": shufflenet_v1,
    "cifar_shufflenet_v2": shufflenet_v2,
    "cifar_mobilenet_v2": mobilenet_v2,
    "cifar_resnet8": resnet8,
    "cifar_wrn_16_1": lambda x, w: wrn(x, w, 2),
    "cifar_wrn_16_2": lambda x, w: wrn(x, w, 2),
    "cifar_vgg8": vgg8,
}


def settled(name):
    """In evaluation mode, with running statistics that are not those of a new network."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("name", PLAIN)
def test_forward_is_the_architecture(name):
    model = settled(name)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), PLAIN[name](x, model.state_dict()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn_16_2", "cifar_vgg8", "cifar_mobilenet_v2"])
def test_convolutions_start_by_fan_out(name):
    torch.manual_seed(0)
    for key, module in timm.create_model(name).named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06), key


@pytest.mark.parametrize("name", SMALL)
def test_timms_methods(name):
    model = settled(name)
    x = torch.randn(2, 3, 32, 32)
    final, levels = model.forward_intermediates(x)
    assert [tuple(v.shape[1:2]) for v in levels] == [(info["num_chs"],) for info in model.feature_info]
    assert [32 // v.shape[2] for v in levels] == [info["reduction"] for info in model.feature_info]
    torch.testing.assert_close(model.forward_head(final), model(x))
    torch.testing.assert_close(model.forward_features(x), final)
    pooled = model.forward_head(final, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    last = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(last[0], levels[1])
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((2, 7), 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    bare = timm.create_model(name, num_classes=0, in_chans=1, global_pool="")
    assert bare(torch.randn(1, 1, 32, 32)).dim() == 4


@pytest.mark.parametrize("name", SMALL)
def test_layers_can_have_learning_rates_of_their_own(name):
    model = timm.create_model(name)
    for coarse in (False, True):
        groups = list(group_parameters(model, model.group_matcher(coarse)).values())
        assert groups[0][0].startswith(model.stem_name)
        assert groups[-1] == [f"{model.head_name}.weight", f"{model.head_name}.bias"]
        assert len(groups) > len(model.feature_info)


@pytest.mark.parametrize("name", SMALL)
def test_recomputed_gradients_are_the_same(name):
    model = settled(name).train()
    x = torch.randn(4, 3, 32, 32)

    def gradients():
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    expected = gradients()
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)


def test_vgg_at_64_pixels_ends_at_the_same_grid():
    model = settled("cifar_vgg8")
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (4, 4)


def test_mobilenet_has_relu():
    model = timm.create_model("mobilenet_v1", num_classes=5)
    assert not any(isinstance(m, torch.nn.ReLU6) for m in model.modules())
    assert any(isinstance(m, torch.nn.ReLU) for m in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
