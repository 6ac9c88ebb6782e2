"""Features by name: the model's own activations, returned by its forward without a second run."""

import pytest
import tiny
import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from data.batch import Encoded, ModelInputs
from data.errors import BadSample, UserError
from vlm_distill.models import PretrainedVLM, build_vlm, load_vlm

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "pad_token_id": 0,
}
# How they compute queries, keys and values: norms before or after, biases, one matrix or three, wide heads.
ATTENTION = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "exaone4": {},
    "cohere2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "smollm3": {},
    "stablelm": {},
    "mixtral": {},
}
UNKNOWN = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_next": {"head_dim": 16, "layer_types": ["full_attention"] * 3},
}


@pytest.fixture
def llava(tmp_path):
    return load_vlm(tiny.write_llava(tmp_path / "llava", layers=3)).eval()


def batch(model, talk, picture):
    talks = [
        (talk([None, "What?"], "is red"), [picture(1)]),
        (talk([None, "it", None], "no"), [picture(2), picture(3)]),
    ]
    samples = [model.processor.encode(*one) for one in talks]
    inputs = model.processor.collate(samples)
    length = inputs["input_ids"].shape[1]
    return inputs, torch.cat([i * length + s.supervised.nonzero().flatten() - 1 for i, s in enumerate(samples)])


def seen(module, run):
    """Return a module's output while ``run`` runs, by a hook of the test's own."""
    outputs = []
    handle = module.register_forward_hook(lambda _, args, output: outputs.append(output))
    run()
    handle.remove()
    return outputs


@pytest.mark.parametrize("model_type", ATTENTION)
def test_a_decoders_features_are_its_own_activations(model_type, tokenizer, talk):
    torch.manual_seed(0)
    config = {"model_type": model_type, **TINY, **ATTENTION[model_type]}
    model = build_vlm({"decoder": {"config": config}}, tokenizer).eval()
    rows = [talk("What colour is the circle?", "red"), talk("How many?", "three blue triangles")]
    inputs = model.processor.collate([model.processor.encode(c, []) for c in rows])
    positions = inputs["attention_mask"].flatten().nonzero().flatten()[::2]
    names = ["hidden.0", "hidden.1", "hidden.-2", "hidden.3", "hidden.-1", "queries", "keys", "values"]
    attention = model.decoder.base_model.layers[-1].self_attn
    with torch.no_grad():
        got = model(inputs, positions, names)
        plain = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        own = model.decoder(**plain, output_hidden_states=True).hidden_states
        if hasattr(attention, "qkv_proj"):
            (fused,) = seen(attention.qkv_proj, lambda: model.decoder(**plain))
            expected = fused.split([32, 16, 16], -1)
        else:
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            expected = [seen(part, lambda: model.decoder(**plain))[0] for part in parts]
    assert list(got.features) == names
    for name, index in (("hidden.0", 0), ("hidden.1", 1), ("hidden.-2", 2), ("hidden.3", 3), ("hidden.-1", 3)):
        torch.testing.assert_close(got.features[name], own[index].flatten(0, 1)[positions], rtol=1e-5, atol=1e-5)
    assert got.features["hidden.-1"] is got.hidden
    for name, whole in zip(names[-3:], expected, strict=True):
        torch.testing.assert_close(got.features[name], whole.flatten(0, 1)[positions], rtol=1e-5, atol=1e-5)
        assert model.feature_shape(name) == (None, whole.shape[-1])
    assert model.feature_shape("hidden.2") == (None, 32)


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_attention_that_is_not_understood_is_refused(model_type, tokenizer):
    config = {"model_type": model_type, **TINY, **UNKNOWN[model_type]}
    model = build_vlm({"decoder": {"config": config}}, tokenizer)
    with pytest.raises(UserError, match=r"cannot tell how .* makes them in its last layer") as caught:
        model.feature_shape("keys")
    assert "\n" not in str(caught.value)


def test_a_composed_models_image_features(settings, tokenizer, talk, picture):
    model = build_vlm(settings, tokenizer).eval()
    inputs, positions = batch(model, talk, picture)
    names = ["projector", "vision", "hidden.0"]
    got = {}
    runs = seen(model.vision_encoder, lambda: got.update(model(inputs, positions, names).features))
    assert len(runs) == 1
    assert torch.equal(got["vision"], runs[0])
    assert torch.equal(got["projector"], model.projector(runs[0]))
    assert model.feature_shape("vision") == got["vision"].shape[1:] == (16, 16)
    assert model.feature_shape("projector") == got["projector"].shape[1:] == (16, 32)
    # Images are among the embeddings: hidden state 0 is the first layer's input.
    places = inputs["image_mask"].flatten().nonzero().flatten()
    assert torch.equal(model(inputs, places, ["hidden.0"]).features["hidden.0"], got["projector"].flatten(0, 1))


def test_a_pretrained_models_image_features(llava, talk, picture):
    inputs, positions = batch(llava, talk, picture)
    base = llava.model.base_model
    names = ["vision", "projector", "hidden.1", "queries", "values"]
    got = {}
    runs = seen(base.vision_tower, lambda: got.update(outputs=llava(inputs, positions, names)))
    features = got["outputs"].features
    assert len(runs) == 1
    assert set(features) == set(names)
    assert torch.equal(got["outputs"].hidden, llava(inputs, positions).hidden)
    own = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(features["vision"], own)
    assert torch.equal(features["projector"], base.multi_modal_projector(own))
    state = base(**inputs, output_hidden_states=True).hidden_states[1]
    assert torch.equal(features["hidden.1"], state.flatten(0, 1)[positions])
    assert features["vision"].shape[2] == llava.feature_shape("vision")[1]
    assert features["projector"].shape[1:] == llava.feature_shape("projector")


@pytest.mark.parametrize("kind", ["composed", "llava"])
def test_recomputation_returns_the_same_once(kind, llava, settings, tokenizer, talk, picture):
    torch.manual_seed(0)
    model = (llava if kind == "llava" else build_vlm(settings, tokenizer)).train()
    inputs, positions = batch(model, talk, picture)
    names = ["hidden.0", "hidden.1", "hidden.-1", "queries", "keys", "values", "vision", "projector"]

    def run():
        model.zero_grad()
        features = model(inputs, positions, names).features
        sum(f.pow(3).sum() for f in features.values()).backward()
        return features, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, gradients = run()
    model.checkpoint_activations()
    again, recomputed = run()
    assert list(plain) == list(again)
    assert all(torch.equal(plain[name], again[name]) for name in names)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_of_what_was_not_asked_for(settings, tokenizer, talk, picture):
    model = build_vlm(settings, tokenizer)
    inputs, positions = batch(model, talk, picture)
    kept = []
    body = model.decoder.base_model
    body.register_forward_hook(lambda _, args, output: kept.append(output.hidden_states))
    assert model(inputs, positions).features == {}
    assert set(model(inputs, positions, ["hidden.2", "projector"]).features) == {"hidden.2", "projector"}
    assert kept[0] is None
    assert [state is not None for state in kept[1]] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden.5", "decoder has 4 layers; give -5 to 4"),
        ("hidden.-6", "decoder has 4 layers"),
        ("hidden.last", "no feature is called 'hidden.last'"),
        ("attention", "no feature is called 'attention'; there are hidden.K, vision"),
    ],
)
def test_unknown_features_are_one_line(name, message, settings, tokenizer, llama, talk, picture):
    model = build_vlm(settings, tokenizer)
    inputs, positions = batch(model, talk, picture)
    for ask in (lambda: model.feature_shape(name), lambda: model(inputs, positions, [name])):
        with pytest.raises(UserError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a language model sees no images"):
        build_vlm({"decoder": {"config": llama}}, tokenizer).feature_shape("vision")


class Stub:
    """A processor with one fixed row of ids and one image; the image token is 5."""

    def __init__(self, inputs):
        tensors = {k: v for k, v in inputs.items() if k != "input_ids"}
        self.row = Encoded(
            inputs["input_ids"][0], None, None, 1, tensors | {"pixel_values": inputs["pixel_values"][:1]}
        )

    def encode(self, *_):
        raise BadSample("none")

    def dummy(self):
        return self.row

    def image_row(self, images):
        return self.row

    def image_tokens(self, sample):
        return sample.input_ids == 5


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 7}
WIDE = {**TINY, "head_dim": 8}


def family(name):
    """Return an untrained model of a family, and the number of tokens of an image."""
    if name == "paligemma":
        vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
        text = Gemma2Config(**WIDE, sliding_window=16)
        config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=5, projection_dim=32)
        return PaliGemmaForConditionalGeneration(config), 16
    if name == "gemma3":
        vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
        text = Gemma3TextConfig(**WIDE)
        config = Gemma3Config(vision_config=vision, text_config=text, image_token_index=5, mm_tokens_per_image=4)
        return Gemma3ForConditionalGeneration(config), 4
    vision = InternVLVisionConfig(**(TOWER | {"image_size": [28, 28], "patch_size": [7, 7]}))
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TINY), image_token_id=5, downsample_ratio=0.5)
    ), 4


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "internvl"])
def test_other_families_that_see_images_whole(name):
    torch.manual_seed(0)
    own, tokens = family(name)
    ids = torch.tensor([[5] * tokens + [7, 8, 9], [5] * tokens + [9, 8, 7]])
    inputs = ModelInputs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(2, 3, 28, 28))
    if name != "internvl":
        inputs["token_type_ids"] = (ids == 5).long()
    model = PretrainedVLM(own.eval(), Stub(inputs))
    positions = torch.arange(ids.numel())
    got = model(inputs, positions, ["vision", "projector", "hidden.1", "queries"])
    assert torch.equal(got.hidden, model(inputs, positions).hidden)
    again = own.base_model(**inputs, output_hidden_states=True)
    assert torch.equal(got.features["hidden.1"], again.hidden_states[1].flatten(0, 1))
    assert torch.equal(got.features["projector"], again.image_hidden_states.reshape(2, tokens, 32))
    assert got.features["vision"].shape == (2, 16, 16)
    assert model.feature_shape("vision") == (None, 16)
    assert model.feature_shape("projector") == (tokens, 32)
    assert model.feature_shape("queries") == (None, 32)


def test_a_family_without_a_way_in_is_named(llava):
    llava.model.base_model.get_image_features = lambda pixel_values, image_sizes: None
    llava.processor.dummy().tensors["image_sizes"] = torch.tensor([[64, 64]])
    with pytest.raises(UserError, match="feature vision: llava gives no features of equally many tokens"):
        llava.feature_shape("vision")
