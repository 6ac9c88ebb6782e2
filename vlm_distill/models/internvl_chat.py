"""Convert InternVL2's own checkpoints (``internvl_chat``) to Transformers' InternVL, without running their code.

InternViT, pixel shuffle, ``mlp1`` and the language model map one to one; InternLM2 is a Llama whose query, key and
value matrices are stored as one. Layout and facts: https://github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.errors import UserError, first_line

from .common import built_whole
from .families import IMAGENET
from .loading import check_finite
from .sentencepiece import load_sentencepiece
from .tokenizer import load_tokenizer
from .weightless import weightless

MODEL_TYPE = "internvl_chat"
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    # Transformers' processor requires one. It has no embedding, and the processor refuses texts with it.
    "video_token": "<video>",
}

#: Language models that have the same weight names and computation in Transformers.
SAME = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Phi3ForCausalLM": "phi3"}
INTERNLM2 = "InternLM2ForCausalLM"

_RENAMED = [
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"^vision_model\.encoder\.layers", "model.vision_tower.encoder.layer"),
    (r"(vision_tower.*)\.attn\.proj", r"\1.attention.projection_layer"),
    (r"(vision_tower.*)\.attn\.", r"\1.attention."),
    (r"(vision_tower.*)\.norm1", r"\1.layernorm_before"),
    (r"(vision_tower.*)\.norm2", r"\1.layernorm_after"),
    (r"(vision_tower.*)\.ls([12])$", r"\1.lambda_\2"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.tok_embeddings", "model.language_model.embed_tokens"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.(lm_head|output)", "lm_head"),
    (r"(language_model.*)\.attention\.wo", r"\1.self_attn.o_proj"),
    (r"(language_model.*)\.attention\.wqkv", r"\1.self_attn.wqkv"),
    (r"(language_model.*)\.feed_forward\.w1", r"\1.mlp.gate_proj"),
    (r"(language_model.*)\.feed_forward\.w2", r"\1.mlp.down_proj"),
    (r"(language_model.*)\.feed_forward\.w3", r"\1.mlp.up_proj"),
    (r"(language_model.*)\.attention_norm", r"\1.input_layernorm"),
    (r"(language_model.*)\.ffn_norm", r"\1.post_attention_layernorm"),
]

_SHANGHAI = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
#: By a checkpoint's ``template``: the opening of each role's turn, the end of a turn, the default system message.
_CHATML = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
_PHI3 = {role: f"<|{role}|>\n" for role in ("system", "user", "assistant")}
TEMPLATES = {
    "internlm2-chat": (_CHATML, "<|im_end|>", _SHANGHAI),
    "Hermes-2": (_CHATML, "<|im_end|>", _SHANGHAI),
    "phi3-chat": (_PHI3, "<|end|>", _SHANGHAI),
    "internvl2_5": (_CHATML, "<|im_end|>\n", _WANXIANG),
}


def load_internvl_chat(
    name: str, config: Mapping[str, Any], dtype: torch.dtype | str, attention: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Make a Transformers model and processor from an InternVL2 checkpoint.

    Weights are read one tensor at a time: memory holds the model and, at most, its largest tensor once more. Every rank
    makes the whole model, even while ZeRO-3 loading is on.

    Args:
        name: a folder, or a name on the hub.
        config: the content of its ``config.json``.
        dtype: of the parameters; ``auto``: as saved.
        attention: ``attn_implementation``, or nothing.

    Returns:
        An ``InternVLForConditionalGeneration`` and an ``InternVLProcessor`` with its chat template.

    Raises:
        UserError: a layout that Transformers' InternVL cannot express, or an incomplete checkpoint.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig
    from transformers.initialization import no_init_weights

    _check(name, config)
    folder = _folder(name)
    tokenizer = _tokenizer(folder, config["llm_config"]["architectures"][0])
    native = _config(name, config, tokenizer)
    if weightless():
        wanted = native.dtype if dtype == "auto" else dtype
        model = AutoModelForImageTextToText.from_config(
            native, dtype=wanted or torch.float32, trust_remote_code=False, **attention
        )
        return model.eval(), _processor(config, native, tokenizer)
    files = _weight_files(folder)
    if dtype == "auto":
        with safe_open(files[0], framework="pt") as file:
            dtype = file.get_tensor(next(iter(file.keys()))).dtype
    with built_whole(), no_init_weights():
        model = AutoModelForImageTextToText.from_config(native, dtype=dtype, trust_remote_code=False, **attention)
    model.tie_weights()
    _fill(name, model, files)
    check_finite(name, model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    return model.eval(), _processor(config, native, tokenizer)


def _check(name: str, config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for settings that Transformers' InternVL computes differently."""
    where = f"model: '{name}'"
    for key in ("vision_config", "llm_config", "template"):
        if not config.get(key):
            raise UserError(f"{where}: config.json has no '{key}'; is the copy complete?")
    architecture = (config["llm_config"].get("architectures") or ["none"])[0]
    if architecture not in (INTERNLM2, *SAME):
        known = ", ".join((INTERNLM2, *SAME))
        raise UserError(f"{where}: its language model {architecture} is not one of {known}; choose another checkpoint")
    if config["template"] not in TEMPLATES:
        raise UserError(f"{where}: its template '{config['template']}' is not one of {', '.join(TEMPLATES)}")
    if config.get("ps_version", "v1") != "v2":
        raise UserError(
            f"{where}: ps_version v1 transposes images, Transformers' InternVL does not; use InternVL2 or later"
        )
    tiled = config.get("dynamic_image_size", False)
    if config.get("pad2square") or (tiled and not config.get("use_thumbnail", False)):
        raise UserError(
            f"{where}: pad2square, or tiles without use_thumbnail, is not what Transformers' InternVL does; "
            "use InternVL2 or later"
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if config.get(key):
            raise UserError(f"{where}: {key} is set; merge the adapter into the checkpoint first")


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.model", "*.txt", *([] if weightless() else ["*.safetensors"])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"model: '{name}' cannot be loaded: {first_line(error)}; check the name or folder") from error


def _tokenizer(folder: Path, architecture: str) -> Any:
    if architecture == INTERNLM2 and not (folder / "tokenizer.json").is_file():
        return load_sentencepiece(folder, extra_special_tokens=IMAGE_TOKENS)
    return load_tokenizer(str(folder), extra_special_tokens=IMAGE_TOKENS)


# From a configuration to Transformers' own.


def _config(name: str, config: Mapping[str, Any], tokenizer: Any) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    vision, text = config["vision_config"], config["llm_config"]
    try:
        language = _llama(text) if text["architectures"][0] == INTERNLM2 else _same(text)
        tower = InternVLVisionConfig(
            hidden_size=vision["hidden_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            num_channels=vision.get("num_channels", 3),
            attention_bias=vision["qkv_bias"],
            use_qk_norm=vision["qk_normalization"],
            norm_type=vision.get("norm_type", "rms_norm"),
            layer_norm_eps=vision["layer_norm_eps"],
            hidden_act=vision.get("hidden_act", "gelu"),
            attention_dropout=vision.get("attention_dropout", 0.0),
            hidden_dropout_prob=vision.get("dropout", 0.0),
        )
    except KeyError as error:
        raise UserError(f"model: '{name}': config.json lacks {error}; is the copy complete?") from error
    except Exception as error:  # the configuration classes' own checks, of many kinds
        raise UserError(f"model: '{name}': its configuration is refused: {first_line(error)}") from error
    image_token_id = tokenizer.get_vocab().get(IMAGE_TOKENS["context_image_token"], language.vocab_size)
    if image_token_id >= language.vocab_size:
        raise UserError(
            f"tokenizer: '{name}' has no {IMAGE_TOKENS['context_image_token']} among its {language.vocab_size} tokens; "
            "is tokenizer_config.json this model's?"
        )
    ratio = config.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=tower,
        text_config=language,
        image_token_id=image_token_id,
        image_seq_length=int((_side(config) // vision["patch_size"]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        tie_word_embeddings=language.tie_word_embeddings,
    )


def _side(config: Mapping[str, Any]) -> int:
    """Return the side of a tile in pixels."""
    return config.get("force_image_size") or config["vision_config"]["image_size"]


def _llama(text: Mapping[str, Any]) -> Any:
    """Convert InternLM2's settings to Llama's. Dynamic rotary scaling changes nothing up to the longest position."""
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": float(text.get("rope_theta", 10000))}
    scaling = text.get("rope_scaling") or {"type": "dynamic"}
    if scaling["type"] == "linear":
        rope |= {"rope_type": "linear", "factor": scaling["factor"]}
    elif scaling["type"] != "dynamic":
        raise ValueError(f"rope_scaling {scaling['type']}")
    return LlamaConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        max_position_embeddings=text["max_position_embeddings"],
        hidden_act=text.get("hidden_act", "silu"),
        rms_norm_eps=text["rms_norm_eps"],
        attention_bias=text["bias"],
        rope_parameters=rope,
        initializer_range=text.get("initializer_range", 0.02),
        bos_token_id=text.get("bos_token_id", 1),
        eos_token_id=text.get("eos_token_id", 2),
        pad_token_id=text.get("pad_token_id"),
        tie_word_embeddings=False,
    )


def _same(text: Mapping[str, Any]) -> Any:
    """Keep the settings that the language model's configuration class has, and drop Transformers 4's general ones."""
    from transformers import AutoConfig

    model_type = SAME[text["architectures"][0]]
    general = {"architectures", "dtype", "_name_or_path", "transformers_version", "model_type"}
    known = set(AutoConfig.for_model(model_type).to_dict()) | {"rope_theta", "rope_scaling"}
    return AutoConfig.for_model(model_type, **{key: text[key] for key in text if key in known - general})


# Weights.


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"model: '{folder}' has no {missing[0]}; weights are read from safetensors, is the copy complete?"
        )
    return [folder / name for name in names]


def _fill(name: str, model: Any, files: list[Path]) -> None:
    """Copy every tensor of the files into its parameter, one at a time."""
    text = model.config.text_config
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                for target, tensor in _pieces(key, file.get_tensor(key), text):
                    parameter = parameters.get(target)
                    if parameter is None or parameter.shape != tensor.shape:
                        expected = "no place in this model" if parameter is None else f"shape {list(parameter.shape)}"
                        raise UserError(
                            f"model: weight '{key}' of '{name}', shape {list(tensor.shape)}, should have {expected}; "
                            "do config.json and weights belong together?"
                        )
                    parameter.data.copy_(tensor)
                    filled.add(id(parameter))
    empty = [target for target, parameter in parameters.items() if id(parameter) not in filled]
    if empty:
        raise UserError(
            f"model: '{name}' has no weights for {len(empty)} parameters, first '{empty[0]}'; is the copy complete?"
        )


def _pieces(key: str, tensor: Tensor, text: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a stored tensor under Transformers' names, with joint projections split."""
    if key.endswith("rotary_emb.inv_freq"):  # older files contain this constant
        return
    name = key
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    if ".attention.qkv." in name:
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace(".qkv.", f".{part}_proj."), piece
    elif ".wqkv." in name:
        # For each key head: its queries, the key and the value, each with as many rows as a head is wide.
        group = text.num_attention_heads // text.num_key_value_heads
        heads = tensor.unflatten(0, (text.num_key_value_heads, group + 2, -1))
        for part, piece in (("q", heads[:, :group].flatten(0, 2)), ("k", heads[:, -2]), ("v", heads[:, -1])):
            yield name.replace(".wqkv.", f".{part}_proj."), piece if part == "q" else piece.flatten(0, 1)
    else:
        yield name, tensor


# Conversations and images.


def chat_template(name: str, start: str = "") -> str:
    """Return the Jinja template for a checkpoint's ``template``.

    A conversation without a system message gets the template's own. An image is rendered where its part is; as in the
    models' training, a line break follows unless the next part is text that begins with a blank.

    Args:
        name: one of :data:`TEMPLATES`.
        start: what the conversation begins with; ``{{ bos_token }}`` if the tokenizer adds one.
    """
    opening, end, system = TEMPLATES[name]
    quoted = {role: json.dumps(text, ensure_ascii=False) for role, text in opening.items()}
    roles = ", ".join(f"'{role}': {text}" for role, text in quoted.items())
    stop = f"{{{{ {json.dumps(end)} }}}}"
    default = json.dumps(system, ensure_ascii=False)
    return (
        f"{start}{{% if not messages or messages[0]['role'] != 'system' %}}"
        f"{{{{ {quoted['system']} + {default} }}}}{stop}{{% endif %}}"
        f"{{% for message in messages %}}{{{{ {{{roles}}}[message['role']] }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% else %}}{{{{ '{IMAGE_TOKENS['video_token']}' if part['type'] == 'video' "
        f"else '{IMAGE_TOKENS['context_image_token']}' }}}}"
        "{% if not loop.last and (loop.nextitem['type'] != 'text' or loop.nextitem['text'][:1].strip()) %}"
        "{{ '\\n' }}{% endif %}{% endif %}{% endfor %}{% endif %}"
        f"{stop}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {quoted['assistant']} }}}}{{% endif %}}"
    )


def _processor(config: Mapping[str, Any], native: Any, tokenizer: Any) -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = {"height": _side(config), "width": _side(config)}
    pixels: dict[str, Any] = {"size": side, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]}
    tiled = config.get("dynamic_image_size", False)
    images = GotOcr2ImageProcessor(
        **pixels,
        crop_to_patches=True,
        min_patches=config.get("min_dynamic_patch", 1) if tiled else 1,
        max_patches=config.get("max_dynamic_patch", 6) if tiled else 1,
    )
    adds_start = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(**pixels),
        image_seq_length=native.image_seq_length,
        chat_template=chat_template(config["template"], "{{ bos_token }}" if adds_start else ""),
    )
