"""Weights that are missing, left over, of other shapes or not finite are refused by name, wherever they are loaded."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from data.errors import UserError, first_line
from vlm_distill.models import build_vlm, load_vlm, loading
from vlm_distill.models.fingerprint import fingerprint
from vlm_distill.models.folder import ADAPTER_CONFIG
from vlm_distill.models.lora import ADAPTER_WEIGHTS, add_lora, save_adapter

FILE = "model.safetensors"
EMBEDDINGS = {"language": "model.embed_tokens.weight", "llava": "language_model.model.embed_tokens.weight"}
EMBEDDINGS |= {"assembled": "decoder.model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of each kind of model."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.write_language_model(folder / "language")
    tiny.write_llava(folder / "llava", layers=2)
    tiny.write_teacher(folder / "assembled")
    return folder


def without(weights, part):
    return {name: tensor for name, tensor in weights.items() if part not in name}


def one_more_layer(weights, embeddings):
    """Repeat the decoder's second layer as its eighth."""
    start = embeddings.replace("embed_tokens.weight", "layers.1.")
    more = {name.replace("layers.1.", "layers.7."): t.clone() for name, t in weights.items() if name.startswith(start)}
    return weights | more


#: Changes to a file's weights, given the name of the embeddings; and what the refusal says.
DAMAGES = {
    "empty": (lambda w, e: {}, r"lacks \d+ weights that its configuration asks for \(.*, …\)"),
    "no output layer": (lambda w, e: without(w, "lm_head"), r"lacks 1 weight .*lm_head\.weight\)"),
    "no second layer": (lambda w, e: without(w, "layers.1."), r"lacks \d+ weights .*layers\.1\."),
    "one layer more": (one_more_layer, r"holds \d+ weights that its configuration has no place for \(.*layers\.7\."),
    "another model's": (
        lambda w, e: {"other.weight": torch.ones(2)},
        r"lacks .*, and holds 1 others \(other\.weight\)",
    ),
    "another shape": (lambda w, e: w | {e: w[e][:-1].clone()}, r"of other shapes .*embed_tokens.*: \[\d+, \d+\] in"),
    "NaN": (lambda w, e: w | {e: w[e] * float("nan")}, r"NaN or infinite numbers in 1 weight \(.*embed_tokens"),
    "integers": (lambda w, e: w | {e: (100 * w[e]).to(torch.int8)}, r"stores .*embed_tokens\.weight as I8, and its"),
    "infinite": (lambda w, e: w | {e: w[e] + float("inf")}, r"NaN or infinite numbers in 1 weight \(.*embed_tokens"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_damaged_weights_are_refused_by_name(whole, kind, damage, tmp_path):
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    change, expected = DAMAGES[damage]
    weights = load_file(folder / FILE)
    save_file(change(weights, EMBEDDINGS[kind]), folder / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected) as caught:
        load_vlm(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["language", "llava"])
def test_an_index_of_files_that_are_not_there_is_named(whole, kind, tmp_path):
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    places = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(load_file(folder / FILE))}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_vlm(folder)  # the whole file is there
    (folder / FILE).rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"index\.json: 1 of 2 files are not there, first model-00002-of-00002"):
        load_vlm(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=r"index\.json: metadata is missing"):
        load_vlm(folder)


def test_a_processor_that_transformers_does_not_know_is_named(whole, tmp_path):
    folder = shutil.copytree(whole / "llava", tmp_path / "llava")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "Unknown"}))
    with pytest.raises(UserError, match="has no processor of images and text, only a Tokenizers"):
        load_vlm(folder)


def test_a_tied_output_layer_is_not_missed(tmp_path):
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    model = loading.from_pretrained(LlamaForCausalLM, str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 7}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: {}, r"lacks \d+ weights"),
        (lambda w: without(w, "layers.0.mlp"), r"lacks 4 weights .*layers\.0\.mlp"),
        (lambda w: without(w, "post_layernorm"), None),  # behind the features that are used
        (lambda w: w | {"text_model.some.weight": torch.ones(3)}, None),  # the other half of a whole CLIP
        (lambda w: {k: v * float("nan") if "layers.0.mlp.fc1.bias" in k else v for k, v in w.items()}, "NaN or infin"),
    ],
)
def test_an_encoder_needs_the_weights_that_reach_its_features(change, expected, tmp_path, llama, tokenizer):
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path)
    save_file(change(load_file(tmp_path / FILE)), tmp_path / FILE, metadata={"format": "pt"})
    images = {"image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    encoder = {"source": "transformers", "name": str(tmp_path), "pretrained": True}
    settings = {"vision_encoder": encoder, "decoder": {"config": llama}}
    if expected is None:
        build_vlm(settings, tokenizer)
        return
    with pytest.raises(UserError, match=expected) as caught:
        build_vlm(settings, tokenizer)
    assert str(tmp_path) in str(caught.value)


@pytest.fixture
def adapter(whole, tmp_path):
    """A folder with a LoRA for the language model."""
    model = load_vlm(whole / "language")
    add_lora(model, rank=2)
    save_adapter(model, tmp_path / "adapter", str(whole / "language"))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: {}, r"lacks \d+ weights, first base_model"),
        (lambda w: without(w, "layers.1.self_attn.q_proj.lora_B"), r"lacks 1 weights, first .*layers\.1.*lora_B"),
        (lambda w: w | {"base_model.model.other.lora_A.weight": torch.ones(2, 2)}, r"1 of its weights have no place"),
        (lambda w: {k: torch.cat([v, v], 1) for k, v in w.items()}, r"has shape \[.*\], the base takes \["),
        (lambda w: {k: v * float("nan") for k, v in w.items()}, r"NaN or infinite numbers in \d+ weights"),
    ],
)
def test_an_adapter_fits_its_base_or_is_refused(change, expected, adapter):
    load_vlm(adapter)
    file = adapter / ADAPTER_WEIGHTS
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected) as caught:
        load_vlm(adapter)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is not supported"),
        ({"target_modules": ["no_such_layer"]}, "does not fit its base: .*no_such_layer"),
        ({"r": "two"}, "does not fit its base"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(keys, expected, adapter):
    file = adapter / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(UserError, match=expected):
        load_vlm(adapter)


def test_an_adapter_is_no_decoder(adapter, tokenizer):
    with pytest.raises(UserError, match="is an adapter"):
        build_vlm({"decoder": str(adapter)}, tokenizer)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_whose_base_is_themselves_are_refused(length, adapter):
    circle = [adapter, *(shutil.copytree(adapter, adapter.parent / str(i)) for i in range(1, length))]
    for here, base in zip(circle, circle[1:] + circle[:1], strict=True):
        settings = json.loads((here / ADAPTER_CONFIG).read_text())
        (here / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    for use in (load_vlm, lambda folder: fingerprint(str(folder))):
        with pytest.raises(UserError, match="an adapter that leads back to itself"):
            use(adapter)


def test_an_adapter_on_an_adapter_is_followed_to_the_base(adapter):
    upper = shutil.copytree(adapter, adapter.parent / "upper")
    settings = json.loads((upper / ADAPTER_CONFIG).read_text())
    (upper / ADAPTER_CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter)}))
    assert load_vlm(upper).dtype == load_vlm(adapter).dtype


def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "machine_memory", lambda: 10_000)
    with pytest.raises(UserError, match=r"has [\d,]+ parameters; they take 0\.0 GB, and this machine has 0\.0 GB"):
        load_vlm(whole / "language")
    with pytest.raises(UserError, match=r"decoder\.config' has"):
        load_vlm(whole / "assembled")


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("language", {"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1,000,000,000; at most 10,000"),
        ("llava", {"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers is 1,000,000,000"),
        ("llava", {"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers is 1,000,000,000"),
        ("assembled", {"decoder": {"num_hidden_layers": 10**9}}, "decoder: num_hidden_layers is 1,000,000,000"),
        (
            "assembled",
            {"vision_encoder": {"config": {"depth": 10**9}}},
            "vision_encoder.config: depth is 1,000,000,000",
        ),
        ("language", {"intermediate_size": 10**12}, "of other shapes|this machine has"),
        ("language", {"vocab_size": 10**12}, "of other shapes|this machine has"),
        ("assembled", {"decoder": {"intermediate_size": 10**12}}, "this machine has"),
        ("assembled", {"vision_encoder": {"config": {"embed_dim": 10**6}}}, "this machine has"),
        ("assembled", {"projector": {"depth": 10**9}}, "projector.depth: expected a whole number from 1 to 10,000"),
        ("assembled", {"vision_encoder": {"image_size": 10**6}}, "more than 16384 pixels a side"),
    ],
)
def test_configurations_of_no_real_size_are_refused(whole, kind, change, expected, tmp_path):
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    file = folder / ("vlm_distill.json" if kind == "assembled" else "config.json")
    content = json.loads(file.read_text())
    merge(content, change)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=expected):
        load_vlm(folder)


def merge(content, change):
    for key, value in change.items():
        if isinstance(value, dict):
            merge(content[key], value)
        else:
            content[key] = value


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Error(s) in A:\n\tsize mismatch for b: c"), "Error(s) in A: size mismatch for b: c"),
        (ValueError("plain\nmore"), "plain"),
        (KeyError("model_type"), "KeyError: 'model_type'"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_the_cause_of_an_error_is_shown(error, told):
    assert first_line(error) == told
