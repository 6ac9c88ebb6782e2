"""Export assembled students as Transformers' LLaVA: CLIP or SigLIP, an MLP, a Llama, Qwen2 or Mistral decoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn

from data.conversation import Conversation
from data.errors import BadSample, UserError, first_line

from .common import cast_parameters
from .composed import ComposedVLM
from .families import FAMILIES, family
from .image_transform import INTERPOLATION
from .pretrained import PretrainedVLM
from .pretrained_processor import PretrainedProcessor
from .projectors import MLPProjector
from .vision_encoders import VisionEncoder

IMAGE = "<image>"
#: Largest difference between LLaVA's hidden states and ours, relative to the largest: rounding in another order.
TOLERANCE = {torch.float32: 1e-4}

# Turns content that is a list of parts into the text that the tokenizer's own template saw in training.
_FLATTEN = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.text = message['content'] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- set flat.text = flat.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""


@torch.no_grad()
def as_llava(model: ComposedVLM) -> PretrainedVLM:
    """Return the same model as ``LlavaForConditionalGeneration`` with a ``LlavaProcessor``, compared with the original.

    Weights are copied in the model's dtype. The vocabulary gets an image token, ``<image>``, whose row in both matrices
    is the mean of all others, so that its logit is never the largest.

    Args:
        model: on the CPU; left in evaluation mode.

    Raises:
        UserError: a part without an equal in LLaVA, by name, or a model that turns out to compute something else.
    """
    from transformers import LlavaForConditionalGeneration

    encoder = _check_parts(model)
    vision, tower, classed = _tower(encoder)
    tokenizer = copy.deepcopy(model.processor.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)

    llava: Any = LlavaForConditionalGeneration(_config(model, encoder, vision, classed, image_id))
    _fill(llava, model, tower, image_id)
    cast_parameters(llava, model.dtype)
    llava.generation_config.eos_token_id = sorted(model.end_tokens)
    llava.generation_config.bos_token_id = tokenizer.bos_token_id
    llava.generation_config.pad_token_id = model.pad_token

    processor = _processor(encoder, tokenizer, llava.config, classed)
    made = PretrainedVLM(llava, PretrainedProcessor(processor, image_id)).eval()
    _compare(model.eval(), made)
    return made


def _check_parts(model: ComposedVLM) -> VisionEncoder:
    """Return the vision encoder of a model whose projector and decoder LLaVA has too."""
    projector, decoder = model.projector, model.decoder
    if model.vision_encoder is None:
        raise _refusal("it has no vision encoder", "export it without --format")
    if not isinstance(projector, MLPProjector) or len(projector.layers) != 3:
        kind = model.projector_settings.get("type", "mlp")
        raise _refusal(f"projector {kind} is not LLaVA's, which has two linear layers", "use mlp with depth 2")
    text = decoder.config
    if not family(text.model_type).llava or decoder.get_output_embeddings().bias is not None or model.head.scale != 1:
        known = ", ".join(name for name, facts in FAMILIES.items() if facts.llava)
        raise _refusal(f"decoder {text.model_type} has not been checked inside a LLaVA", f"use {known}")
    return model.vision_encoder


def _config(model: ComposedVLM, encoder: VisionEncoder, vision: Any, classed: bool, image_id: int) -> Any:
    from transformers import LlavaConfig

    decoder = model.decoder
    rows = decoder.get_input_embeddings().num_embeddings
    tied = decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight
    changes = {"vocab_size": max(rows, image_id + 1), "tie_word_embeddings": tied}
    # vLLM asks the text's configuration for its class.
    changes["architectures"] = [type(decoder).__name__]
    return LlavaConfig(
        vision_config=vision,
        text_config=type(decoder.config).from_dict(decoder.config.to_dict() | changes),
        image_token_index=image_id,
        image_seq_length=encoder.tokens,
        vision_feature_layer=-1,  # the layers behind it were removed
        vision_feature_select_strategy="default" if classed and encoder.settings["select"] == "patch" else "full",
        tie_word_embeddings=tied,
    )


def _fill(llava: Any, model: ComposedVLM, tower: Mapping[str, Tensor], image_id: int) -> None:
    """Copy the weights under LLaVA's names. Raise ``UserError`` if one is left over or missing."""
    assert model.projector is not None
    state = {f"model.vision_tower.{name}": weight for name, weight in tower.items()}
    projector = model.projector.state_dict()
    for ours, theirs in (("layers.0", "linear_1"), ("layers.2", "linear_2")):
        for name in ("weight", "bias"):
            state[f"model.multi_modal_projector.{theirs}.{name}"] = projector[f"{ours}.{name}"]
    body = model.decoder.base_model.state_dict()
    state |= {f"model.language_model.{name}": weight for name, weight in body.items()}
    state["lm_head.weight"] = model.decoder.get_output_embeddings().weight
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        state[name] = _with_image_row(state[name], image_id)
    wrong = llava.load_state_dict(state, strict=False)
    # LLaVA's towers have a norm behind the layer that is read, which is never used.
    lacking = [name for name in wrong.missing_keys if "post_layernorm" not in name]
    if lacking or wrong.unexpected_keys:
        raise _refusal(f"{(lacking + wrong.unexpected_keys)[0]} has no equal", "export it without --format")


def _processor(encoder: VisionEncoder, tokenizer: Any, config: Any, classed: bool) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    transform = encoder.transform
    (height, width), cropped = transform.size, transform.resize == "crop"
    padded: dict[str, Any] = {"do_pad": True} if transform.resize == "pad" else {}
    images = (LlavaImageProcessor if padded else CLIPImageProcessor)(
        size={"shortest_edge": height} if cropped else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=cropped,
        resample=INTERPOLATION[transform.interpolation],
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        **padded,
    )
    tokenizer.chat_template = _FLATTEN + tokenizer.chat_template
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(classed),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )


def _refusal(what: str, remedy: str) -> UserError:
    return UserError(f"--format llava: {what}; {remedy}")


def _with_image_row(weight: Tensor, image: int) -> Tensor:
    """Return the matrix with an image token's row, the mean of the rows before it; some may have no token."""
    mean = weight[: min(image, len(weight))].float().mean(0, keepdim=True).to(weight.dtype)
    missing = max(0, image + 1 - len(weight))
    whole = torch.cat([weight, mean.expand(missing, -1)])
    whole[image] = mean[0]
    return whole


def _tower(encoder: VisionEncoder) -> tuple[Any, dict[str, Tensor], bool]:
    """Return a CLIP or SigLIP configuration, the weights under its names, and whether there is a class token."""
    source = encoder.settings["source"]
    module: Any = encoder.tower
    height, width = encoder.transform.size
    if height != width:
        raise _refusal(f"images of {height}×{width} are not square", "use a square image_size")
    if source == "transformers":
        own = encoder.settings["config"]
        classed = own["model_type"] == "clip_vision_model"
        if not classed and own["model_type"] != "siglip_vision_model":
            raise _refusal(f"vision encoder {own['model_type']} is neither CLIP nor SigLIP", "use one of them")
        if own["image_size"] != height:
            raise _refusal(f"positions of {own['image_size']} pixels are stretched to {height}", "use their own size")
        return _vision(own, classed, len(module.encoder.layers), encoder), module.state_dict(), classed
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None) or getattr(module, "blocks", None)
    if source == "open_clip" and not hasattr(module, "class_embedding"):
        blocks = None  # towers of open_clip that are timm's
    if blocks is None or not hasattr(blocks[0], "mlp"):
        raise _refusal(f"vision encoder {source}'s {encoder.settings['name']} is neither CLIP nor SigLIP", "use one")
    state = module.state_dict()
    classed = "class_embedding" in state or "cls_token" in state
    first = blocks[0]
    norm, act = (first.ln_1, first.mlp.gelu) if source == "open_clip" else (first.norm1, first.mlp.act)
    attention = first.attn
    patch = module.conv1 if source == "open_clip" else module.patch_embed.proj
    own = {
        "hidden_size": patch.out_channels,
        "intermediate_size": (first.mlp.c_fc if source == "open_clip" else first.mlp.fc1).out_features,
        "num_attention_heads": attention.num_heads,
        "image_size": height,
        "patch_size": patch.kernel_size[0],
        "layer_norm_eps": norm.eps,
        "hidden_act": _activation(act),
    }
    return _vision(own, classed, len(blocks), encoder), _renamed(state, classed), classed


def _vision(own: Mapping[str, Any], classed: bool, layers: int, encoder: VisionEncoder) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    if encoder.settings["layer"] is None and not (classed and encoder.settings["source"] == "transformers"):
        raise _refusal("it reads the encoder's layers before the final norm", "train with vision_encoder.layer: -1")
    left = {k: v for k, v in own.items() if k not in ("model_type", "architectures", "transformers_version")}
    left |= {"num_hidden_layers": layers} | ({} if classed else {"vision_use_head": False})
    return (CLIPVisionConfig if classed else SiglipVisionConfig)(**left)


def _activation(module: nn.Module) -> str:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    tanh = getattr(module, "approximate", "none") == "tanh" or type(module).__name__ == "GELUTanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


#: Parts of weight names in timm and open_clip, and what Transformers calls them.
_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "class_embedding": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "conv1.": "embeddings.patch_embedding.",
    "norm_pre.": "pre_layrnorm.",
    "ln_pre.": "pre_layrnorm.",
    "transformer.resblocks.": "encoder.layers.",
    "blocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".norm1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".norm2.": ".layer_norm2.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".attn.": ".self_attn.",
}


def _renamed(state: Mapping[str, Tensor], classed: bool) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        for theirs, ours in _NAMES.items():
            if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
                name = name.replace(theirs, ours, 1)
        if "position_embedding" in name:
            weight = weight.reshape(-1, weight.shape[-1])
        elif "class_embedding" in name:
            weight = weight.flatten()
        stem, fused, kind = name.partition("in_proj_") if "in_proj_" in name else name.partition("qkv.")
        if fused:
            parts = zip("qkv", weight.chunk(3), strict=True)
            renamed |= {f"{stem}{letter}_proj.{kind}": part for letter, part in parts}
        else:
            renamed[name] = weight
    return renamed


def _compare(ours: ComposedVLM, theirs: PretrainedVLM) -> None:
    """Raise ``UserError`` if the LLaVA renders, tokenizes or computes differently from the original."""
    picture = Image.radial_gradient("L").convert("RGB")
    question = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "\nthis? 1 word."}]
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]},
    )
    conversation = Conversation(messages, (picture,))
    try:
        rows = [model.processor.encode(conversation, [picture]) for model in (ours, theirs)]
    except BadSample as error:
        raise _refusal(f"its chat template or processor fails: {first_line(error)}", "report it") from error
    masks = [model.processor.image_tokens(row) for model, row in zip((ours, theirs), rows, strict=True)]
    ids = [row.input_ids[~mask].tolist() for row, mask in zip(rows, masks, strict=True)]
    if ids[0] != ids[1] or not torch.equal(*masks):
        raise _refusal(
            "the text around an image becomes different tokens", "write the start token in its chat template"
        )
    inputs = [model.processor.collate([row]) for model, row in zip((ours, theirs), rows, strict=True)]
    inputs[1]["pixel_values"] = inputs[0]["pixel_values"]  # resized by another library, the picture differs a little
    positions = torch.arange(len(rows[0].input_ids))
    dtype = ours.dtype
    hidden = [m(i.to("cpu", dtype), positions).hidden.float() for m, i in zip((ours, theirs), inputs, strict=True)]
    difference = (hidden[0] - hidden[1]).abs().max().item() / max(1e-9, hidden[0].abs().max().item())
    if not difference <= TOLERANCE.get(dtype, 0.05):
        raise _refusal(f"its hidden states differ by {difference:.1e} of the largest", "export it without --format")
