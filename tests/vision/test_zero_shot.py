"""open_clip's towers as classifiers: against its own logits, saved and read again, probes, mistakes."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from data.errors import UserError
from vision.classifier import load_classifier

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 28, "layers": 3, "width": 16, "head_width": 8, "patch_size": 7},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "timm": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
}


def configuration(tower="vit", **more):
    return {"embed_dim": 8, "vision_cfg": dict(VISION[tower]), "text_cfg": dict(TEXT)} | more


def pixels(classifier):
    return torch.randn(2, 3, *classifier.inputs.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A whole open_clip model on disk, with SigLIP's bias and its own normalisation."""
    config = configuration(init_logit_bias=-3.0)
    known = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bilinear"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(known))
    torch.manual_seed(1)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_logits_are_open_clips_own(folder):
    names = ["cat", "golden_retriever", "n01443537"]
    classifier = load_classifier(str(folder), classes=names, templates=["a photo of a {}.", "art of a {}."]).eval()
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    rows = []
    for word in ("cat", "golden retriever", "goldfish"):
        text = model.encode_text(tokenizer([f"a photo of a {word}.", f"art of a {word}."]), normalize=True).mean(0)
        rows.append(text / text.norm())
    image = model.encode_image(pixels(classifier), normalize=True)
    expected = model.logit_scale.exp() * image @ torch.stack(rows).T + model.logit_bias
    torch.testing.assert_close(classifier(pixels(classifier)).logits, expected)
    assert classifier.classes == tuple(names)
    assert (classifier.inputs.mean, classifier.inputs.interpolation) == ((0.4,) * 3, "bilinear")
    assert not classifier.notes
    assert not any("token_embedding" in k for k in classifier.state_dict())


def test_imagenet_is_what_is_told_apart_by_default():
    classifier = load_classifier("tiny", source="open_clip", config=configuration(), templates=["{}"])
    assert (classifier.num_classes, classifier.classes[1]) == (1000, "n01443537")
    assert "random" in classifier.notes[0]


@pytest.mark.parametrize("tower", VISION)
@pytest.mark.parametrize("probe", [False, True])
def test_features_and_a_round_trip(tower, probe, tmp_path):
    options = {"num_classes": 5} if probe else {"classes": ["cat", "dog"], "templates": "simple"}
    classifier = load_classifier("tiny", source="open_clip", config=configuration(tower), **options).eval()
    if probe:
        classifier.freeze_all_but_head().eval()
    images = pixels(classifier)
    plain, with_features = classifier(images), classifier(images, ["stage1", "stage-1", "pooled"])
    torch.testing.assert_close(plain.logits, with_features.logits)
    assert classifier.feature_shape("pooled") == (8,)
    assert with_features.features["stage1"].dim() == 4
    if probe:
        learning = [n for n, p in classifier.named_parameters() if p.requires_grad]
        assert learning == ["model.head.weight", "model.head.bias"]
    else:
        torch.testing.assert_close(with_features.features["pooled"].norm(dim=-1), torch.ones(2))
    classifier.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path)).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), classifier.parameters(), strict=True))
    torch.testing.assert_close(again(images).logits, plain.logits)
    assert (again.inputs, again.classes) == (classifier.inputs, classifier.classes)
    assert load_classifier(str(tmp_path), num_classes=7)(images).logits.shape == (2, 7)


def test_weights_from_a_file_and_another_size(folder):
    file = str(folder / "open_clip_model.safetensors")
    config = configuration(init_logit_bias=-3.0)
    classifier = load_classifier("tiny", source="open_clip", config=config, weights=file, num_classes=3, image_size=42)
    assert classifier.inputs.size == (42, 42)
    assert classifier(torch.randn(1, 3, 42, 42)).logits.shape == (1, 3)
    whole = open_clip.create_model(f"local-dir:{folder}")
    assert torch.equal(classifier.model.visual.conv1.weight, whole.visual.conv1.weight)


def test_recomputation():
    classifier = load_classifier("tiny", source="open_clip", config=configuration(), num_classes=3)
    images = pixels(classifier)
    expected = torch.autograd.grad(classifier(images).logits.square().sum(), classifier.model.visual.conv1.weight)
    classifier.checkpoint_activations()
    again = torch.autograd.grad(classifier(images).logits.square().sum(), classifier.model.visual.conv1.weight)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ViT-no-such", {}, "knows no model called 'ViT-no-such'"),
        ("tiny", {"config": configuration(), "templates": "no"}, "'no' is neither one of openai, simple"),
        ("tiny", {"config": configuration(), "templates": ["a photo"]}, "no {} for the class name"),
        ("tiny", {"config": configuration(), "weights": "no.pt"}, "no file no.pt"),
        ("tiny", {"config": {"embed_dim": 8, "vision_cfg": {"depth": 3}, "text_cfg": {}}}, "cannot build 'tiny'"),
        ("ViT-B-32", {"pretrained": "no such tag"}, "cannot build 'ViT-B-32'.*no such tag"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(UserError, match=message):
        load_classifier(name, source="open_clip", **options)
