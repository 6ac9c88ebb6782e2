"""InternVL2's checkpoints, written in their own layout: the original's logits, tiles and conversations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    LlamaForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
)
from transformers.integrations import HfDeepSpeedConfig

from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.models import PretrainedVLM, load_vlm
from vlm_distill.models.internvl_chat import TEMPLATES, _processor
from vlm_distill.models.internvl_chat import _tokenizer as load_internvl_tokenizer
from vlm_distill.models.sentencepiece import load_sentencepiece

SENTENCEPIECE = Path(__file__).parents[1] / "golden" / "sentencepiece"
PIECES = 420
# Like InternLM2's: turn marks replace unused pieces, image marks follow the pieces.
ADDED = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_end|>", 4: "<|im_start|>"}
ADDED |= {
    PIECES + i: token
    for i, token in enumerate(
        ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    )
}
IMG, END_IMG, CONTEXT = PIECES, PIECES + 1, PIECES + 2
ROWS = PIECES + 9
SYSTEM = (
    "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。<|im_end|>"
)
SIDE, PATCH = 28, 7  # sixteen patches, shuffled to four tokens a tile
WIDTH, LAYERS, HEADS, KEYS, HEAD = 32, 3, 4, 2, 8
VIT, VIT_LAYERS, VIT_HEADS = 16, 2, 2
THETA, EPS = 1e6, 1e-5

INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEYS,
    "rms_norm_eps": EPS,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": ROWS,
}
CONFIG = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": SIDE,
    "llm_config": INTERNLM2,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": VIT,
        "image_size": SIDE,
        "initializer_factor": 1.0,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": VIT_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VIT_LAYERS,
        "patch_size": PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}


def vision_weights(draw, qk_norm=False):
    weights = {
        "vision_model.embeddings.class_embedding": draw(1, 1, VIT),
        "vision_model.embeddings.position_embedding": draw(1, (SIDE // PATCH) ** 2 + 1, VIT),
        "vision_model.embeddings.patch_embedding.weight": draw(VIT, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": draw(VIT),
        "mlp1.0.weight": draw(4 * VIT),
        "mlp1.0.bias": draw(4 * VIT),
        "mlp1.1.weight": draw(WIDTH, 4 * VIT),
        "mlp1.1.bias": draw(WIDTH),
        "mlp1.3.weight": draw(WIDTH, WIDTH),
        "mlp1.3.bias": draw(WIDTH),
    }
    for i in range(VIT_LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        for name, shape in {
            "attn.qkv": (3 * VIT, VIT),
            "attn.proj": (VIT, VIT),
            "mlp.fc1": (24, VIT),
            "mlp.fc2": (VIT, 24),
        }.items():
            weights |= {f"{layer}{name}.weight": draw(*shape), f"{layer}{name}.bias": draw(shape[0])}
        for name in ("norm1", "norm2"):
            weights |= {f"{layer}{name}.weight": 1 + draw(VIT), f"{layer}{name}.bias": draw(VIT)}
        weights |= {f"{layer}ls1": 0.5 + draw(VIT), f"{layer}ls2": 0.5 + draw(VIT)}
        if qk_norm:
            weights |= {f"{layer}attn.{name}_norm.weight": 1 + draw(VIT) for name in "qk"}
    return weights


def internlm2_weights(draw):
    weights = {
        "language_model.model.tok_embeddings.weight": draw(ROWS, WIDTH),
        "language_model.model.norm.weight": 1 + draw(WIDTH),
        "language_model.output.weight": draw(ROWS, WIDTH),
    }
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        weights |= {
            f"{layer}attention.wqkv.weight": draw((HEADS + 2 * KEYS) * HEAD, WIDTH),
            f"{layer}attention.wo.weight": draw(WIDTH, HEADS * HEAD),
            f"{layer}feed_forward.w1.weight": draw(48, WIDTH),
            f"{layer}feed_forward.w2.weight": draw(WIDTH, 48),
            f"{layer}feed_forward.w3.weight": draw(48, WIDTH),
            f"{layer}attention_norm.weight": 1 + draw(WIDTH),
            f"{layer}ffn_norm.weight": 1 + draw(WIDTH),
        }
    return weights


def write(folder, config=CONFIG, weights=None, qk_norm=False, shards=3):
    """Write a checkpoint as on the hub: sharded weights with an index, a sentencepiece model, remote code named."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.15

    weights = vision_weights(draw, qk_norm) | (internlm2_weights(draw) if weights is None else weights)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    names = list(weights)
    where = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name].contiguous() for name in names[k::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    shutil.copy(SENTENCEPIECE / "plain.model", folder / "tokenizer.model")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in ADDED.items()},
        "additional_special_tokens": [ADDED[i] for i in ADDED if i > 2],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return weights


# The original's computation, written plainly.


def vision_tower(w, pixels, select_layer=-1, qk_norm=False):
    """InternViT's hidden state ``[tiles, 1 + patches, width]``."""
    pre = "vision_model.embeddings."
    x = F.conv2d(pixels, w[pre + "patch_embedding.weight"], w[pre + "patch_embedding.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[pre + "class_embedding"].expand(len(x), -1, -1), x], 1) + w[pre + "position_embedding"]
    states = [x]
    for i in range(VIT_LAYERS):
        p = {k.removeprefix(f"vision_model.encoder.layers.{i}."): v for k, v in w.items()}
        y = F.layer_norm(x, (VIT,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).unflatten(-1, (3, VIT)).unbind(2)
        if qk_norm:
            q, k = rms_norm(q, p["attn.q_norm.weight"], 1e-6), rms_norm(k, p["attn.k_norm.weight"], 1e-6)
        q, k, v = (t.unflatten(-1, (VIT_HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3) / (VIT // VIT_HEADS) ** 0.5).softmax(-1)
        y = (scores @ v).transpose(1, 2).flatten(2) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        x = x + y * p["ls1"]
        y = F.layer_norm(x, (VIT,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]) @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
        x = x + y * p["ls2"]
        states.append(x)
    return states[select_layer]


def image_features(w, hidden):
    """Pixel shuffle v2, by position: token (r, c) holds patches (2r, 2c), (2r, 2c+1), (2r+1, 2c), (2r+1, 2c+1)."""
    side = SIDE // PATCH
    grid = hidden[:, 1:].unflatten(1, (side, side))
    cells = [
        torch.cat([grid[:, 2 * r + a, 2 * c + b] for a in (0, 1) for b in (0, 1)], -1)
        for r in range(side // 2)
        for c in range(side // 2)
    ]
    x = F.layer_norm(torch.stack(cells, 1), (4 * VIT,), w["mlp1.0.weight"], w["mlp1.0.bias"], 1e-5)
    x = F.gelu(x @ w["mlp1.1.weight"].T + w["mlp1.1.bias"])
    return x @ w["mlp1.3.weight"].T + w["mlp1.3.bias"]


def rms_norm(x, weight, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def internlm2(w, x):
    """Hidden states ``[L, width]`` of embeddings ``[L, width]``, head by head."""
    length = len(x)
    angles = torch.arange(length)[:, None] / THETA ** (torch.arange(0, HEAD, 2).to(x.dtype) / HEAD)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def turned(t):
        left, right = t.chunk(2, -1)
        return t * cos + torch.cat([-right, left], -1) * sin

    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(LAYERS):
        p = {k.removeprefix(f"language_model.model.layers.{i}."): v for k, v in w.items()}
        rows = (rms_norm(x, p["attention_norm.weight"]) @ p["attention.wqkv.weight"].T).split(HEAD, -1)
        heads = []
        for group in range(KEYS):  # of each group: two queries, a key, a value
            first, second, key, value = rows[4 * group : 4 * group + 4]
            for query in (first, second):
                scores = turned(query) @ turned(key).T / HEAD**0.5 + mask
                heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, -1) @ p["attention.wo.weight"].T
        y = rms_norm(x, p["ffn_norm.weight"])
        y = F.silu(y @ p["feed_forward.w1.weight"].T) * (y @ p["feed_forward.w3.weight"].T)
        x = x + y @ p["feed_forward.w2.weight"].T
    return rms_norm(x, w["language_model.model.norm.weight"])


def embedded(w, embeddings, ids, pixels, **options):
    x = w[embeddings][ids].clone()
    x[ids == CONTEXT] = image_features(w, vision_tower(w, pixels, **options)).flatten(0, 1)
    return x


def original_logits(weights, ids, pixels, **options):
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = embedded(w, "language_model.model.tok_embeddings.weight", ids, pixels.double(), **options)
    return internlm2(w, x) @ w["language_model.output.weight"].T


def relative(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def logits(model, sample):
    inputs = model.processor.collate([sample])
    with torch.no_grad():
        return model.head.logits(model(inputs, torch.arange(len(sample.input_ids))).hidden)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("internvl2")


@pytest.fixture(scope="module")
def weights(folder):
    return write(folder)


@pytest.fixture(scope="module")
def model(folder, weights):
    return load_vlm(folder, dtype="float32").eval()


@pytest.fixture
def sample(model, talk, picture):
    talked = talk([None, "\nWhat colour?"], "It is red.", ["And ", None, "?"], "three")
    return model.processor.encode(talked, [picture(1, (56, 28)), picture(2, (28, 28))])


def test_logits_are_the_originals(model, weights, sample):
    assert isinstance(model, PretrainedVLM)
    expected = original_logits(weights, sample.input_ids, sample.tensors["pixel_values"])
    assert (sample.input_ids == CONTEXT).sum() == 4 * (3 + 1)
    assert expected.abs().max() > 1
    assert relative(logits(model, sample), expected) < 3e-6


def test_an_earlier_layer_of_the_tower_and_its_norms(tmp_path, talk, picture):
    config = CONFIG | {"select_layer": -2, "vision_config": CONFIG["vision_config"] | {"qk_normalization": True}}
    weights = write(tmp_path, config, qk_norm=True)
    model = load_vlm(tmp_path, dtype="float32").eval()
    sample = model.processor.encode(talk([None, "What?"], "red"), [picture(1, (28, 28))])
    got = logits(model, sample)
    options = {"select_layer": -2, "qk_norm": True}
    expected = original_logits(weights, sample.input_ids, sample.tensors["pixel_values"], **options)
    assert relative(got, expected) < 3e-6
    other = original_logits(weights, sample.input_ids, sample.tensors["pixel_values"], qk_norm=True)
    assert relative(got, other) > 1e-3


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM, Phi3ForCausalLM])
def test_language_models_that_transformers_has(kind, tmp_path, talk, picture):
    text = {k: INTERNLM2[k] for k in ("bos_token_id", "eos_token_id", "hidden_size", "intermediate_size", "vocab_size")}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "rope_theta": 5e5}
    text |= {"pad_token_id": 0, "rms_norm_eps": 1e-4, "tie_word_embeddings": kind is Qwen2ForCausalLM}
    torch.manual_seed(0)
    decoder = kind(kind.config_class(**text)).eval()
    # A tied output matrix is stored once.
    state = {f"language_model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    if kind is Qwen2ForCausalLM:
        del state["language_model.lm_head.weight"]
    # Further keys that Transformers 4 wrote.
    general = {"architectures": [kind.__name__], "torch_dtype": "bfloat16", "temperature": 1.0, "top_k": 50}
    general |= {"return_dict": True, "_name_or_path": "somewhere", "use_cache": True}
    template = "phi3-chat" if kind is Phi3ForCausalLM else "Hermes-2"
    weights = write(tmp_path, CONFIG | {"llm_config": text | general, "template": template}, state)
    load_sentencepiece(tmp_path).save_pretrained(tmp_path / "fast")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "fast" / name, tmp_path / name)
    model = load_vlm(tmp_path, dtype="float32").eval()
    sample = model.processor.encode(talk([None, "What?"], "red"), [picture(1, (28, 28))])
    pixels = sample.tensors["pixel_values"]
    with torch.no_grad():
        embeddings = embedded(weights, "language_model.model.embed_tokens.weight", sample.input_ids, pixels)
        expected = decoder(inputs_embeds=embeddings[None]).logits[0]
    assert relative(logits(model, sample), expected) < 3e-6
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load_vlm(tmp_path / "again").eval(), sample), logits(model, sample))


def test_saved_it_is_transformers_own(model, sample, tmp_path, talk, picture):
    model.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert (type(plain).__name__, plain.config.text_config.model_type) == ("InternVLForConditionalGeneration", "llama")
    assert plain.config.text_config.vocab_size == ROWS
    assert not plain.config.tie_word_embeddings
    own = model.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = talk([None, "\nWhat colour?"], "It is red.", ["And ", None, "?"], "three").messages
    text = processor.apply_chat_template(list(messages), tokenize=False)
    images = [picture(1, (56, 28)), picture(2, (28, 28))]
    options = {"add_special_tokens": False, "max_patches": 6}
    inputs = processor(text=[text], images=images, return_tensors="pt", **options)
    assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
    torch.testing.assert_close(inputs["pixel_values"], sample.tensors["pixel_values"])
    again = load_vlm(tmp_path).eval()
    assert torch.equal(logits(again, sample), logits(model, sample))
    prompt = (talk([None, "\nWhat colour?"]), [picture(1, (56, 28))])
    answers = [m.generate([prompt], max_new_tokens=5)[0].token_ids for m in (model, again)]
    assert answers[0] == answers[1]
    assert again.end_tokens == model.end_tokens == {2, 3, 4}


def test_dtype_is_that_of_the_files_unless_given(model, folder, tmp_path):
    assert load_vlm(folder).dtype == torch.float32
    half = load_vlm(folder, dtype="bf16", attn_implementation="eager")
    assert half.dtype == torch.bfloat16
    assert half.model.get_decoder().config._attn_implementation == "eager"
    rotary = model.model.get_decoder().rotary_emb.inv_freq
    assert torch.equal(half.model.get_decoder().rotary_emb.inv_freq, rotary)


def test_while_zero_3_shards_what_is_loaded_it_is_made_whole(folder, weights, model):
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    whole = load_vlm(folder)
    del alive
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


# Images.


@pytest.fixture(scope="module")
def tiles(model):
    """Return the pixels and the number of image tokens of a picture, for a checkpoint with tiles of 448 pixels."""

    def cut(size, **config):
        source = CONFIG | {"force_image_size": 448} | config
        processor = _processor(source, InternVLConfig(image_seq_length=256), model.processor.tokenizer)
        out = processor(text=["<IMG_CONTEXT>"], images=[Image.new("RGB", size, "red")], return_tensors="pt")
        return out["pixel_values"], (out["input_ids"] == CONTEXT).sum()

    return cut


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((800, 600), 12, 4 * 3 + 1),
        ((800, 600), 6, 3 * 2 + 1),
        ((448, 448), 12, 1),
        # 1×1, 2×2 and 3×3 are equally near: the larger grid is taken if the picture has over half of its area.
        ((634, 634), 12, 2 * 2 + 1),
        ((633, 633), 12, 1),
        ((951, 951), 12, 3 * 3 + 1),
        ((950, 950), 12, 2 * 2 + 1),
    ],
)
def test_tiles_of_448_pixels(size, most, expected, tiles):
    pixels, tokens = tiles(size, max_dynamic_patch=most)
    assert pixels.shape == (expected, 3, 448, 448)
    assert tokens == 256 * expected


def test_one_tile_where_the_checkpoint_does_not_cut(tiles):
    assert len(tiles((800, 600), dynamic_image_size=False, use_thumbnail=False)[0]) == 1


def test_several_images_share_their_tiles(model, talk, picture):
    pictures = [picture(k, (80, 60)) for k in range(5)]
    for count, each in ((1, 4 * 3 + 1), (2, 3 * 2 + 1), (3, 2 * 2 + 1), (5, 1)):
        sample = model.processor.encode(talk([None] * count, "red"), pictures[:count])
        assert len(sample.tensors["pixel_values"]) == count * each
        assert (sample.input_ids == CONTEXT).sum() == 4 * count * each
    assert sample.images == 5


def test_pixels_are_normalised_as_imagenet_in_reading_order(model):
    picture = Image.new("RGB", (56, 28), "red")
    picture.paste((0, 0, 255), (28, 0, 56, 28))
    sample = model.processor.encode(
        Conversation(({"role": "user", "content": [{"type": "image"}]},)), [picture], generation=True
    )
    middle = sample.tensors["pixel_values"][:2, :, 14, 14]
    red = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    blue = [-0.485 / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(middle, torch.tensor([red, blue]), rtol=1e-4, atol=1e-4)


# Conversations.


def rendered(model, conversation, generation=False):
    return model.processor._render(conversation.messages, generation)


def test_conversations_are_written_as_the_original_does(model, talk):
    one = talk([None, "\nWhat colour?"], "It is red.")
    first = "<|im_start|>user\n<IMG_CONTEXT>\nWhat colour?<|im_end|><|im_start|>assistant\nIt is red.<|im_end|>"
    assert rendered(model, one) == "<s>" + SYSTEM + first
    two = talk([None, "\nWhat colour?"], "It is red.", "Sure?", "yes")
    second = "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nyes<|im_end|>"
    assert rendered(model, two) == "<s>" + SYSTEM + first + second
    asked = "<s>" + SYSTEM + "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n"
    assert rendered(model, talk("Sure?"), generation=True) == asked
    own = "<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nSure?<|im_end|>"
    assert rendered(model, talk("Sure?", system="Be brief.")) == own


def test_images_keep_their_places_and_stand_on_lines_of_their_own(model, talk):
    opening = "<s><|im_start|>system\n<|im_end|><|im_start|>user\n"
    for parts, text in (
        ([None, "What?"], "<IMG_CONTEXT>\nWhat?"),
        ([None, " ", None, " Same?"], "<IMG_CONTEXT> <IMG_CONTEXT> Same?"),
        ([None, None, "Same?"], "<IMG_CONTEXT>\n<IMG_CONTEXT>\nSame?"),
        (["What is this? ", None], "What is this? <IMG_CONTEXT>"),
    ):
        assert rendered(model, talk(parts, system="")) == opening + text + "<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name, folder, tmp_path, talk):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"template": name}), encoding="utf-8")
    got = rendered(load_vlm(tmp_path), talk("Sure?", "yes", system="Be brief."))
    expected = {
        "phi3-chat": "<s><|system|>\nBe brief.<|end|><|user|>\nSure?<|end|><|assistant|>\nyes<|end|>",
        "internvl2_5": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n",
    }
    chatml = "<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nSure?<|im_end|>"
    chatml += "<|im_start|>assistant\nyes<|im_end|>"
    assert got == expected.get(name, chatml)


def test_answers_and_their_ends_are_supervised(model, sample):
    decode = model.processor.tokenizer.decode
    runs = sample.supervised.tolist()
    edges = [i for i, marked in enumerate(runs) if marked and not runs[i - 1]]
    texts = [decode(sample.input_ids[i : runs.index(False, i) if False in runs[i:] else None]) for i in edges]
    assert texts == ["It is red.<|im_end|>", "three<|im_end|>"]
    assert sample.input_ids[sample.ends].tolist() == [3, 3]
    ids = sample.input_ids.tolist()
    assert ids[0] == 1
    assert ids.count(1) == 1
    first = ids.index(IMG)
    assert ids[first + 1 : first + 14] == [CONTEXT] * 12 + [END_IMG]


def test_placeholders_in_a_persons_text_are_refused(model, talk):
    for text in ("what does <IMG_CONTEXT> mean?", "what does <video> mean?"):
        with pytest.raises(BadSample):
            model.processor.encode(talk(text, "red"), [])


# Tokens.


@pytest.mark.parametrize("name", ["plain", "prefix"])
def test_sentencepiece_ids(name, tmp_path):
    """Ids equal those of the sentencepiece package (``golden/sentencepiece/README.md``)."""
    shutil.copy(SENTENCEPIECE / f"{name}.model", tmp_path / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = load_sentencepiece(tmp_path)
    for case in json.loads((SENTENCEPIECE / "expected.json").read_text(encoding="utf-8"))[name]:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_added_tokens_keep_their_ids(model):
    tokenizer = model.processor.tokenizer
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in ADDED} == ADDED
    assert tokenizer("a<box>b")["input_ids"][2] == PIECES + 7
    assert tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_1]") == tokenizer.unk_token_id


def test_older_checkpoints_list_added_tokens_in_a_file_of_their_own(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: i for i, token in ADDED.items()}))
    assert load_vlm(tmp_path).processor.tokenizer.get_vocab() == model.processor.tokenizer.get_vocab()


def test_a_qwen2_tokenizer_in_files_of_its_own(folder, weights, tmp_path, make_tokenizer, talk, picture):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").unlink()
    plain = make_tokenizer(bos=None, eos=None)
    plain.backend_tokenizer.model.save(str(tmp_path))
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    config = {
        "added_tokens_decoder": {
            str(len(plain) + i): {"content": token, "special": True, "normalized": False}
            for i, token in enumerate(marks)
        },
        "additional_special_tokens": marks[1:],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    text = {k: v for k, v in INTERNLM2.items() if k not in ("auto_map", "bias", "rope_scaling", "model_type")}
    config = CONFIG | {"llm_config": text | {"architectures": ["Qwen2ForCausalLM"]}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_internvl_tokenizer(tmp_path, "Qwen2ForCausalLM")
    assert [loaded.convert_tokens_to_ids(token) for token in marks] == [len(plain) + i for i in range(len(marks))]
    assert (loaded.context_image_token, loaded.start_image_token) == ("<IMG_CONTEXT>", "<img>")
    assert loaded("What")["input_ids"] == plain("What", add_special_tokens=False)["input_ids"]


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version v1"),
        ({"template": "vicuna_v1.1"}, "template 'vicuna_v1.1' is not one of internlm2-chat"),
        ({"use_thumbnail": False}, "use_thumbnail"),
        ({"use_llm_lora": 16}, "merge the adapter"),
        ({"vision_config": {}}, "no 'vision_config'"),
        ({"llm_config": INTERNLM2 | {"architectures": ["GPTNeoForCausalLM"]}}, "GPTNeoForCausalLM is not one of"),
        ({"llm_config": INTERNLM2 | {"num_hidden_layers": 4}}, "no weights for 9 parameters"),
        ({"llm_config": INTERNLM2 | {"num_hidden_layers": 2}}, "no place in this model"),
        ({"llm_config": INTERNLM2 | {"vocab_size": ROWS + 1}}, r"should have shape \[430, 32\]"),
        ({"llm_config": INTERNLM2 | {"vocab_size": PIECES}}, "no <IMG_CONTEXT> among its 420"),
        ({"llm_config": INTERNLM2 | {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "rope_scaling yarn"),
        ({"llm_config": {k: v for k, v in INTERNLM2.items() if k != "hidden_size"}}, "lacks 'hidden_size'"),
    ],
)
def test_other_layouts_are_refused_in_one_line(change, message, folder, weights, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_vlm(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.model", "tokenizer_config.json"])
def test_missing_files_are_named(name, folder, weights, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        load_vlm(tmp_path)
