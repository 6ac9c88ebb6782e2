"""Classifiers of timm: features, heads, probes, folders, mistakes."""

import json

import pytest
import timm
import torch
from torch import nn

from data.errors import UserError
from vision.classifier import Classifier, class_names, load_classifier
from vision.inputs import InputSettings

# One of each kind of head and of features: BatchNorm, a convolution as head, two heads, tokens, channels last.
KINDS = {
    "resnet10t": {"num_classes": 4, "config": {"channels": [8, 8, 16, 16], "stem_width": 8}},
    "vit_tiny_patch16_224": {
        "num_classes": 4,
        "image_size": 32,
        "config": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    },
    "deit_tiny_distilled_patch16_224": {"num_classes": 4, "image_size": 32, "config": {"depth": 2, "embed_dim": 24}},
    "swin_tiny_patch4_window7_224": {
        "num_classes": 4,
        "image_size": 32,
        "config": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    },
    "dla46_c": {"num_classes": 4, "image_size": 64},
    "levit_128s": {"num_classes": 4},
    "mobilenetv3_small_050": {"num_classes": 4, "image_size": 32},
    "cifar_resnet8": {"num_classes": 4},
}


def build(name, **options):
    torch.manual_seed(0)
    return load_classifier(name, **KINDS[name] | options)


def images(classifier, count=3):
    return torch.randn(count, 3, *classifier.inputs.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_features_do_not_change_the_logits(name):
    classifier = build(name).eval()
    names = classifier.feature_names()
    plain = classifier(images(classifier))
    assert plain.features == {}
    for asked in (names, ["stage1"], ["pooled"], ["stage-1", "stage2"]):
        found = classifier(images(classifier), asked)
        torch.testing.assert_close(found.logits, plain.logits)
        assert set(found.features) == set(asked)
        assert found.distilled is None
    whole = classifier(images(classifier), names).features
    for key, value in whole.items():
        assert value.shape == (3, *classifier.feature_shape(key))
        assert value.dim() == (2 if key == "pooled" else 4)
    last = classifier(images(classifier), ["stage-1"]).features["stage-1"]
    assert torch.equal(last, whole[names[-2]])
    assert classifier.feature_shape("stage-1") == classifier.feature_shape(names[-2])


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_gives_the_same_classifier(name, tmp_path):
    classifier = build(name, classes=["a", "b", "c", "d"], mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    classifier(images(classifier))  # BatchNorm's statistics move
    classifier.eval().save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    assert again.training
    assert (again.inputs, again.classes, again.notes) == (classifier.inputs, classifier.classes, ())
    state, expected = again.state_dict(), classifier.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)
    torch.testing.assert_close(again.eval()(images(again)).logits, classifier(images(classifier)).logits)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(bare(images(again)), classifier(images(classifier)).logits)


def test_a_gathered_state_is_what_is_saved(tmp_path):
    classifier = build("cifar_resnet8")
    gathered = {k: torch.zeros_like(v) for k, v in classifier.state_dict().items()}
    classifier.save_pretrained(tmp_path, gathered)
    assert not any(p.any() for p in load_classifier(f"local-dir:{tmp_path}").parameters())


def test_stages_are_counted_after_the_stem():
    resnet = load_classifier("resnet18", num_classes=2)
    assert resnet.feature_names() == ["stem", "stage1", "stage2", "stage3", "stage4", "pooled"]
    seen = {}
    resnet.model.layer3.register_forward_hook(lambda m, i, out: seen.update(out=out))
    found = resnet.eval()(torch.randn(1, 3, 64, 64), ["stage3"]).features["stage3"]
    assert torch.equal(found, seen["out"])
    assert build("mobilenetv3_small_050").feature_names()[0] == "stem"
    assert build("vit_tiny_patch16_224").feature_names() == ["stage1", "stage2", "pooled"]


def test_tokens_are_laid_out_as_the_image():
    classifier = build("deit_tiny_distilled_patch16_224", image_size=64, config={"depth": 1, "embed_dim": 24}).eval()
    blank = torch.zeros(1, 3, 64, 64)
    classifier.model.blocks[0] = nn.Identity()  # so that a patch tells only of itself
    spot = blank.clone()
    spot[..., 0:16, 48:64] = 5.0
    change = classifier(spot, ["stage1"]).features["stage1"] - classifier(blank, ["stage1"]).features["stage1"]
    assert change.abs().sum(1).flatten().nonzero().tolist() == [[3]]


def test_pooled_is_what_the_layer_is_given():
    classifier = build("mobilenetv3_small_050").eval()
    seen = {}
    classifier.model.classifier.register_forward_hook(lambda m, given, out: seen.update(given=given[0]))
    found = classifier(images(classifier), ["pooled"]).features["pooled"]
    assert torch.equal(found, seen["given"])


def test_statistics_move_once_a_forward():
    plain, asked = build("mobilenetv3_small_050"), build("mobilenetv3_small_050")
    plain(images(plain))
    asked(images(asked), ["stage1", "pooled"])
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), asked.buffers(), strict=True))
    asked.feature_shape("pooled")  # measuring leaves no trace
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), asked.buffers(), strict=True))
    assert all(m.training for m in asked.modules())


def test_a_distilled_transformer_has_both_heads_in_training():
    classifier = build("deit_tiny_distilled_patch16_224")
    for asked in ((), ("stage1", "pooled")):
        found = classifier.train()(images(classifier), asked)
        assert not torch.equal(found.logits, found.distilled)
        mean = classifier.eval()(images(classifier), asked)
        assert mean.distilled is None
        torch.testing.assert_close(mean.logits, (found.logits + found.distilled) / 2)


@pytest.mark.parametrize("name", ["cifar_resnet8", "deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_probe_learns_its_layer_alone(name):
    classifier = build(name).freeze_all_but_head()
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    learning = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    classifier.train()(images(classifier)).logits.square().sum().backward()
    optimizer.step()
    moved = {k for k, v in classifier.state_dict().items() if not torch.equal(v, before[k])}
    layers = classifier.head()
    own = {k for k, m in classifier.named_modules() if any(m is layer or m in layer.modules() for layer in layers)}
    assert moved
    assert all(k.rsplit(".", 1)[0] in own for k in moved)
    assert all(layer.training for layer in layers)
    assert not classifier.model.training


def test_image_size_where_it_is_built_in_and_where_not():
    assert build("vit_tiny_patch16_224").model.patch_embed.img_size == (32, 32)
    assert build("resnet10t", image_size=48).inputs.size == (48, 48)
    assert load_classifier("resnet10t", config=KINDS["resnet10t"]["config"]).inputs.size == (176, 176)


def test_inputs_are_the_models_own_unless_given():
    own = load_classifier("resnet10t", config=KINDS["resnet10t"]["config"])
    data = timm.data.resolve_model_data_config(own.model)
    assert own.inputs == InputSettings((176, 176), data["mean"], data["std"], data["interpolation"], data["crop_pct"])
    assert build("resnet10t", mean=[0.4, 0.5, 0.6]).inputs.mean == (0.4, 0.5, 0.6)
    assert own.classes is None  # nothing has been learnt yet


def test_trained_weights_of_a_thousand_classes_are_imagenets(tmp_path):
    whole = load_classifier("mobilenetv3_small_050")
    whole.save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    assert load_classifier("mobilenetv3_small_050", weights=file).classes[0] == "n01440764"
    assert load_classifier("mobilenetv3_small_050", weights=file, num_classes=10).classes is None


def test_class_names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    assert class_names(str(tmp_path / "names.txt")) == ("cat", "dog")
    assert class_names("imagenet") == class_names("imagenet-1k")
    assert class_names(["a", 1]) == ("a", "1")
    assert class_names(None) is None


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "cifar_resnet8"])
def test_recomputation(name):
    classifier = build(name)
    parameters = list(classifier.parameters())
    for asked in ((), ("stage1",)):
        expected = torch.autograd.grad(classifier(images(classifier), asked).logits.square().sum(), parameters)
        classifier.checkpoint_activations()
        again = torch.autograd.grad(classifier(images(classifier), asked).logits.square().sum(), parameters)
        torch.testing.assert_close(again, expected)
        classifier = build(name)
        parameters = list(classifier.parameters())


class Bare(nn.Module):
    """A model without what newer ones of timm have."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))

    def get_classifier(self):
        return self.fc


def test_a_model_without_features_still_classifies():
    classifier = Classifier(Bare(), InputSettings((8, 8), (0.0,) * 3, (1.0,) * 3))
    assert classifier(torch.randn(2, 3, 8, 8)).logits.shape == (2, 2)
    assert classifier.feature_names() == []
    for ask in (lambda: classifier(torch.randn(2, 3, 8, 8), ["pooled"]), lambda: classifier.feature_shape("pooled")):
        with pytest.raises(UserError, match="Bare of timm gives none"):
            ask()
    with pytest.raises(UserError, match="cannot do it"):
        classifier.checkpoint_activations()


@pytest.mark.parametrize("feature", ["stage9", "stage0", "stage-9", "layer1", "stage"])
def test_unknown_features_are_told_with_those_there_are(feature):
    with pytest.raises(UserError, match=f"no '{feature}' in this classifier; it has stem, stage1, .* pooled"):
        build("cifar_resnet8")(torch.randn(1, 3, 32, 32), [feature])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18x", {}, "did you mean resnet18"),
        ("resnet18", {"source": "torchvision"}, r"source: .*'timm' or 'open_clip' \(found 'torchvision'\)"),
        ("resnet18", {"num_clases": 3}, "num_clases: unknown key; did you mean 'num_classes'"),
        ("resnet18", {"pretrained": True, "weights": "x.pth"}, "'pretrained' or 'weights', not both"),
        ("resnet18", {"config": {"depth": 3}}, "cannot build 'resnet18': .*depth"),
        ("cifar_resnet8", {"classes": ["a"]}, "1 names for a classifier of 100 outputs"),
        ("cifar_resnet8", {"classes": "no-such-file"}, "neither a file of names nor a set"),
        ("cifar_resnet8", {"pretrained": True}, "no weights of 'cifar_resnet8' could be loaded"),
        ("resnet18", {"pretrained": "no_such_tag"}, "no weights of 'resnet18.no_such_tag'"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(name, **options)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3}))
    with pytest.raises(UserError, match="no weights of"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet8x4", "cifar_resnet8x4"),
        ("WRN-40-2", "cifar_wrn_40_2"),
        ("vgg8", "cifar_vgg8"),
        ("resnet-18", "resnet18"),
    ],
)
def test_the_papers_names_are_understood(name, meant):
    with pytest.raises(UserError, match=f"neither a folder nor a model of timm; did you mean {meant}\\?"):
        load_classifier(name)
