"""Towers of three libraries: their own features, LLaVA's layer and select, images, idle parameters."""

import pytest
import torch
from PIL import Image

from data.errors import UserError
from vlm_distill.models.common import cast_parameters
from vlm_distill.models.families import CLIP, HALF, IMAGENET
from vlm_distill.models.image_transform import ImageTransform
from vlm_distill.models.vision_encoders import build_vision_encoder

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT |= {"image_size": 28, "patch_size": 7}
TOWERS = {
    "clip": {"source": "transformers", "config": {"model_type": "clip_vision_model", **VIT}},
    "siglip": {"source": "transformers", "config": {"model_type": "siglip_vision_model", **VIT}},
    "dinov2": {"source": "transformers", "config": {"model_type": "dinov2", **VIT}},
    "dinov2 registers": {
        "source": "transformers",
        "config": {"model_type": "dinov2_with_registers", **VIT, "num_register_tokens": 3},
    },
    "dinov3": {"source": "transformers", "config": {"model_type": "dinov3_vit", **VIT, "num_register_tokens": 4}},
    "timm vit": {
        "source": "timm",
        "name": "vit_tiny_patch16_224",
        "image_size": 28,
        "config": {"patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2},
    },
    "timm vit registers": {
        "source": "timm",
        "name": "vit_base_patch16_224",
        "image_size": 28,
        "config": {"patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2, "reg_tokens": 4},
    },
    "open_clip": {
        "source": "open_clip",
        "image_size": 28,
        "config": {"embed_dim": 8, "vision_cfg": {"layers": 3, "width": 16, "head_width": 8, "patch_size": 7}},
    },
}
# (class tokens, register tokens) of each tower
PREFIX = {"siglip": 0, "dinov2 registers": 4, "dinov3": 5, "timm vit registers": 5}


def build(tower, **options):
    torch.manual_seed(0)
    return build_vision_encoder(TOWERS[tower] | options).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_patches_form_the_grid_and_cls_patch_keeps_the_rest(name):
    pixels = torch.randn(2, 3, 28, 28)
    patches, everything = build(name), build(name, select="cls_patch")
    prefix = PREFIX.get(name, 1)
    assert patches.grid == (4, 4)
    assert (patches.tokens, patches.width) == (16, 16)
    assert everything.tokens == 16 + prefix
    assert everything.grid == (None if prefix else (4, 4))
    torch.testing.assert_close(patches(pixels), everything(pixels)[:, prefix:])


@pytest.mark.parametrize("name", [n for n in TOWERS if TOWERS[n]["source"] == "transformers"])
@pytest.mark.parametrize("layer", [1, -1, -2])
def test_layer_is_llavas_hidden_state(name, layer):
    from transformers import AutoConfig, AutoModel

    encoder = build(name, layer=layer, select="cls_patch")
    config = dict(TOWERS[name]["config"])
    torch.manual_seed(0)
    whole = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    pixels = torch.randn(1, 3, 28, 28)
    expected = whole(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(encoder(pixels), expected)
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", ["timm vit", "open_clip"])
@pytest.mark.parametrize("layer", [1, -1, -2])
def test_layer_is_the_output_of_that_block(name, layer):
    encoder, whole = build(name, layer=layer, select="cls_patch"), build(name, select="cls_patch")
    blocks = whole.tower.blocks if name == "timm vit" else whole.tower.transformer.resblocks
    seen = {}
    blocks[layer - 1 if layer > 0 else layer].register_forward_hook(lambda m, i, out: seen.update(out=out))
    pixels = torch.randn(2, 3, 28, 28)
    whole(pixels)
    torch.testing.assert_close(encoder(pixels), seen["out"])


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("layer", [None, -2])
def test_every_trainable_parameter_gets_a_gradient(name, layer):
    encoder = build(name, layer=layer)
    encoder.requires_grad_(False).requires_grad_(True)
    encoder.train()(torch.randn(2, 3, 28, 28)).square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    # Only single parameters inside used modules may stay frozen (DINO's mask token).
    assert all("mask_token" in key for key, p in encoder.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", TOWERS)
def test_built_again_from_its_settings(name):
    encoder = build(name, layer=-2, resize="pad")
    again = build_vision_encoder(encoder.settings)
    again.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(again.eval()(pixels), encoder(pixels))
    assert again.transform == encoder.transform
    assert again.settings == encoder.settings


@pytest.mark.parametrize("name", TOWERS)
def test_bfloat16_and_recomputation(name):
    encoder = build(name)
    pixels = torch.randn(2, 3, 28, 28)
    expected = encoder(pixels)
    encoder.checkpoint_activations()
    encoder.train()(pixels).sum().backward()
    torch.testing.assert_close(encoder.eval()(pixels), expected)  # DINOv3 jitters its positions while training
    cast_parameters(encoder, torch.bfloat16)
    assert encoder(pixels).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3", "timm vit", "open_clip"])
def test_another_image_size(name):
    encoder = build(name, image_size=42)
    assert (encoder.image_size, encoder.grid) == ((42, 42), (6, 6))
    assert encoder(torch.randn(1, 3, 42, 42)).shape == (1, 36, 16)


def test_normalisation_is_the_encoders_own_unless_given():
    assert (build("clip").mean, build("clip").std) == CLIP
    assert (build("open_clip").mean, build("open_clip").std) == CLIP
    assert (build("siglip").mean, build("siglip").std) == HALF
    assert (build("dinov2").mean, build("dinov2").std) == IMAGENET
    own = build("dinov2", mean=[0.1, 0.2, 0.3], std=[1, 1, 1], interpolation="nearest")
    assert (own.mean, own.std, own.interpolation) == ((0.1, 0.2, 0.3), (1, 1, 1), "nearest")


def test_pretrained_tower_of_a_whole_clip_model(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=VIT, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.4, 0.4, 0.4], resample=2, size={"shortest_edge": 28}).save_pretrained(tmp_path)
    encoder = build_vision_encoder({"source": "transformers", "name": str(tmp_path), "pretrained": True, "layer": -2})
    pixels = torch.randn(1, 3, 28, 28)
    expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(encoder.eval()(pixels), expected)
    assert encoder.mean == (0.4, 0.4, 0.4)
    assert encoder.interpolation == "bilinear"
    again = build_vision_encoder(encoder.settings)  # needs neither the folder nor a network
    assert again.state_dict().keys() == encoder.state_dict().keys()


def test_pretrained_tower_of_a_whole_open_clip_model(tmp_path):
    import json

    import open_clip
    from safetensors.torch import save_file

    model = TOWERS["open_clip"]["config"] | {"text_cfg": {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1}}
    model["vision_cfg"] = model["vision_cfg"] | {"image_size": 28}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    whole = open_clip.create_model(name, load_weights=False)
    save_file(whole.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = build_vision_encoder({"source": "open_clip", "name": name, "pretrained": True, "layer": -2})
    assert torch.equal(encoder.tower.conv1.weight, whole.visual.conv1.weight)
    assert encoder.mean == (0.4,) * 3
    again = build_vision_encoder(encoder.settings | {"name": None})
    again.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(again.eval()(pixels), encoder.eval()(pixels))


# Nets without running statistics, so that ranks agree; a small and a larger one for 64×64.
CONVNEXT = {"source": "timm", "name": "convnext_atto", "image_size": 64}
SMALL = CONVNEXT | {"config": {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 96], "patch_size": 2}, "layer": -2}
LARGE = CONVNEXT | {"config": {"depths": [2, 2, 4, 1], "dims": [32, 64, 128, 192], "patch_size": 2}, "layer": -2}
RESNET = {"source": "timm", "name": "resnet10t", "image_size": 64, "layer": -2}
RESNET["config"] = {"channels": [32, 64, 96, 128], "stem_width": 16, "norm_layer": "groupnorm1"}


@pytest.mark.parametrize(
    ("settings", "grid", "most"),
    [
        (SMALL, (4, 4), 150_000),
        (SMALL | {"layer": -3}, (8, 8), 150_000),
        (LARGE, (4, 4), 800_000),
        (RESNET, (4, 4), 800_000),
        (RESNET | {"layer": -3}, (8, 8), 150_000),
    ],
)
def test_small_convolutional_towers(settings, grid, most):
    encoder = build_vision_encoder(settings)
    assert encoder.grid == grid
    assert encoder.tokens == grid[0] * grid[1]
    assert sum(p.numel() for p in encoder.parameters()) < most
    assert not list(encoder.buffers())
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, encoder.tokens, encoder.width)
    assert all(p.requires_grad for p in encoder.parameters())


def test_grid_features_are_row_major():
    encoder = build_vision_encoder(SMALL | {"layer": -3}).eval()
    blank = torch.zeros(1, 3, 64, 64)
    spot = blank.clone()
    spot[..., 0:4, 60:64] = 5.0  # the upper right corner
    change = (encoder(spot) - encoder(blank)).abs().sum(-1).reshape(8, 8)
    assert change.argmax() == 7


def test_channels_last_towers():
    settings = {"source": "timm", "name": "swin_tiny_patch4_window7_224", "image_size": 32}
    settings["config"] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    encoder = build_vision_encoder(settings)
    assert (encoder.grid, encoder.width) == ((4, 4), 16)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 16, 16)


def bars(width, height, size):
    """A white image with a black band of ``size`` pixels at its left and right ends."""
    image = Image.new("RGB", (width, height), "white")
    for left in (0, width - size):
        image.paste("black", (left, 0, left + size, height))
    return image


@pytest.mark.parametrize(("resize", "first", "corner"), [("squash", 0.0, 0.0), ("crop", 1.0, 1.0), ("pad", 0.0, 0.5)])
def test_resize(resize, first, corner):
    transform = ImageTransform((8, 8), (0.0,) * 3, (1.0,) * 3, "nearest", resize)
    transform_mean = ImageTransform((8, 8), (0.5,) * 3, (1.0,) * 3, "nearest", resize)
    pixels = transform(bars(32, 16, 8))
    assert pixels.shape == (3, 8, 8)
    assert pixels[0, 4, 0] == first
    assert transform_mean(bars(32, 16, 8))[0, 0, 0] + 0.5 == pytest.approx(corner, abs=0.01)


def test_normalised_pixels():
    pixels = ImageTransform((1, 1), (0.5, 0.0, 0.0), (0.5, 1.0, 2.0))(Image.new("RGB", (1, 1), (255, 51, 102)))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([1.0, 0.2, 0.2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 9}, "9 is outside the 3 layers"),
        ({"select": "cls"}, "'cls' is not one of patch, cls_patch"),
        ({"config": {"hidden_size": 16}}, "'model_type' is missing"),
        ({"config": None}, "give 'name', 'config' or both"),
        ({"pretrained": True}, "'pretrained' needs a 'name'"),
        ({"pretrained": True, "name": "no/such"}, "cannot build 'no/such'"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        build("clip", **change)
