"""Transformers' vision-language families, tiny and untrained, each with its own processor and a chat template.

All share one byte-level tokenizer with every family's special tokens, so that any may teach any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = {"height": 28, "width": 28}
#: Of two layers the second sees all: an answer must see its image.
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

#: Names under which a tokenizer gives special tokens to the processors; ``image_token`` differs from family to family.
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<|audio|>",
}
EXTRA = [
    *("<|im_start|>", "<image>", "<video>", *NAMED.values(), "<image_soft_token>", "<|image|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
    *(f"TILE_{i}" for i in range(1, 13)),
]


def template(image: str, style: str = "chatml", video: str = "<video>") -> str:
    """A chat template in which an image stands as ``image``, a video as ``video``; three styles of turns."""
    role = "message['role']"
    opening, closing, start = {
        "chatml": (f"<|im_start|>{{{{ {role} }}}}\n", "</s>\n", "<|im_start|>assistant\n"),
        "colon": (f"{{{{ {role} | capitalize }}}}:\n", "<end_of_utterance>\n", "Assistant:\n"),
        "words": (f"[{{{{ {role} }}}}]", "</s>", "[assistant]"),
    }[style]
    return (
        f"{{% for message in messages %}}{opening}{{% for part in message['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
        f"{closing}{{% endfor %}}{{% if add_generation_prompt %}}{start}{{% endif %}}"
    )


class Maker:
    """Builds families around one kind of tokenizer.

    Args:
        make_tokenizer: the fixture of this name.
    """

    def __init__(self, make_tokenizer: Callable[..., Any]) -> None:
        self._make_tokenizer = make_tokenizer

    def tokenizer(self, image: str) -> Any:
        named = NAMED | {"image_token": image, "video_token": "<|video_pad|>" if "image_pad" in image else "<video>"}
        return self._make_tokenizer(extra=EXTRA, extra_special_tokens=named)

    def write(self, name: str, folder: Path, *, seed: int = 0, sharp: float = 4.0) -> Path:
        """A family's model and processor, saved as Transformers saves them."""
        model, processor = self.build(name, seed=seed, sharp=sharp)
        model.save_pretrained(folder)
        with num2words():
            processor.save_pretrained(folder)
        return folder

    def build(self, name: str, *, seed: int = 0, sharp: float = 4.0) -> tuple[Any, Any]:
        """A model in evaluation mode, its matrices ``sharp`` times what they were drawn as, and its processor."""
        image, style = FAMILIES[name.removesuffix("_wide")]
        torch.manual_seed(seed)
        tokenizer = self.tokenizer(image)
        with num2words():
            chat = template(_written(name, image), style, _written(name, tokenizer.video_token))
            model, processor = globals()[f"_{name}"](tokenizer, chat)
        with torch.no_grad():
            for parameter in model.get_decoder().parameters() if sharp != 1 else ():
                if parameter.ndim == 2:
                    parameter.mul_(sharp)
        return model.eval(), processor


def _written(name: str, image: str) -> str:
    """What stands for an image, or a video, in a family's chat template."""
    if name.startswith("qwen"):
        return f"<|vision_start|>{image}<|vision_end|>"
    if image == "<video>":
        return image
    around = {"internvl": "{}\n", "gemma3": "<start_of_image>", "aya_vision": "<image>"}
    return around.get(name, "{}").format(image)


def made_once(make_tokenizer: Callable[..., Any]) -> Callable[[str], Any]:
    """A function that returns a family as the suite sees it, built when it is first asked for."""
    from vlm_distill.models.family_classes import adapted

    maker, made = Maker(make_tokenizer), dict[str, Any]()

    def get(name: str) -> Any:
        if name not in made:
            made[name] = adapted(*maker.build(name))
        return made[name]

    return get


@contextmanager
def num2words() -> Iterator[None]:
    """Stands in for the package that SmolVLM's processor asks for, which only videos need."""
    from transformers.models.smolvlm import processing_smolvlm

    before = processing_smolvlm.num2words
    processing_smolvlm.num2words = before or str
    try:
        yield
    finally:
        processing_smolvlm.num2words = before


#: Families by the name of their model type: the token that stands for images, and the style of turns.
FAMILIES = {
    "llava": ("<image>", "chatml"),
    "pixtral": ("[IMG]", "words"),
    "llava_next": ("<image>", "colon"),
    "llava_onevision": ("<image>", "chatml"),
    "internvl": ("<IMG_CONTEXT>", "chatml"),
    "qwen2_vl": ("<|image_pad|>", "chatml"),
    "qwen2_5_vl": ("<|image_pad|>", "chatml"),
    "qwen3_vl": ("<|image_pad|>", "chatml"),
    "qwen3_vl_moe": ("<|image_pad|>", "chatml"),
    "qwen3_5": ("<|image_pad|>", "chatml"),
    "qwen3_5_moe": ("<|image_pad|>", "chatml"),
    "smolvlm": ("<image>", "colon"),
    "idefics3": ("<image>", "colon"),
    "paligemma": ("<image>", "chatml"),
    "paligemma2": ("<image>", "chatml"),
    "gemma3": ("<image_soft_token>", "words"),
    "mistral3": ("[IMG]", "words"),
    "aya_vision": ("<|IMG_PATCH|>", "words"),
    "phi4_multimodal": ("<|image|>", "colon"),
}


def _text(kind: Any, tokenizer: Any, **options: Any) -> Any:
    return kind(**TEXT | {"vocab_size": len(tokenizer)} | options)


def _clip() -> Any:
    return hf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7)


def _siglip(**options: Any) -> Any:
    return hf.SiglipVisionConfig(**VISION | {"image_size": 28, "patch_size": 7, "vision_use_head": False} | options)


def _llava(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=_clip(), text_config=_text(hf.LlamaConfig, tokenizer), image_token_id=tokenizer.image_token_id
    )
    images = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    processor = hf.LlavaProcessor(images, tokenizer, 7, "default", chat, num_additional_image_tokens=1)
    return hf.LlavaForConditionalGeneration(config), processor


def _pixtral_parts(tokenizer: Any, chat: str, merge: int) -> tuple[Any, Any]:
    vision = hf.PixtralVisionConfig(**VISION, head_dim=16, image_size=56, patch_size=7)
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7 * merge, "width": 7 * merge})
    return vision, hf.PixtralProcessor(images, tokenizer, 7, merge, chat)


def _pixtral(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    vision, processor = _pixtral_parts(tokenizer, chat, 1)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=_text(hf.MistralConfig, tokenizer, head_dim=8, sliding_window=None),
        image_token_id=tokenizer.image_token_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _mistral3(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    vision, processor = _pixtral_parts(tokenizer, chat, 2)
    text = _text(hf.MistralConfig, tokenizer, head_dim=8, sliding_window=None)
    config = hf.Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config), processor


def _llava_next(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    grid = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(hf.LlamaConfig, tokenizer),
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=grid,
    )
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE, image_grid_pinpoints=grid)
    processor = hf.LlavaNextProcessor(images, tokenizer, 7, "default", chat, num_additional_image_tokens=1)
    return hf.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = hf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text(hf.Qwen2Config, tokenizer, tie_word_embeddings=True),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=grid,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=grid),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=SIDE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _internvl(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION, image_size=[28, 28], patch_size=[7, 7]),
        text_config=_text(hf.Qwen2Config, tokenizer),
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4)
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(size=SIDE), 4, chat)
    return hf.InternVLForConditionalGeneration(config), processor


def _qwen(
    name: str, tokenizer: Any, chat: str, vision: dict[str, Any], patch: int = 14, **more: Any
) -> tuple[Any, Any]:
    kinds = {k: getattr(hf, f"{name}{k}") for k in ("Config", "ForConditionalGeneration")}
    newer = name.startswith("Qwen3")
    videos = hf.Qwen3VLVideoProcessor if newer else hf.Qwen2VLVideoProcessor
    made = hf.Qwen3VLProcessor if newer else getattr(hf, f"{name}Processor")
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 8, "tie_word_embeddings": name != "Qwen2VL"} | more
    config = kinds["Config"](
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2} | vision,
        text_config=text | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=name != "Qwen2VL",
    )
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 6 * (2 * patch) ** 2}
    images = hf.Qwen2VLImageProcessor(size=pixels, patch_size=patch)
    processor = made(images, tokenizer, videos(size=pixels, patch_size=patch), chat)
    return kinds["ForConditionalGeneration"](config), processor


def _qwen2_vl(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    return _qwen("Qwen2VL", tokenizer, chat, {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})


def _qwen2_5_vl(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", tokenizer, chat, vision | {"window_size": 28})


def _qwen3_vl(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]}
    return _qwen("Qwen3VL", tokenizer, chat, vision | {"num_position_embeddings": 16}, patch=16)


#: Experts whose matrices are square (`down_proj` of 32 × 32), so that a turned one would be loaded in silence.
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def _qwen3_vl_moe(tokenizer: Any, chat: str, **more: Any) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]}
    vision |= {"num_position_embeddings": 16}
    return _qwen("Qwen3VLMoe", tokenizer, chat, vision, patch=16, **EXPERTS | more)


def _qwen3_vl_moe_wide(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    return _qwen3_vl_moe(tokenizer, chat, moe_intermediate_size=24)


def _qwen3_5(tokenizer: Any, chat: str, name: str = "Qwen3_5", **more: Any) -> tuple[Any, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "head_dim": 32}
    return _qwen(name, tokenizer, chat, vision, patch=16, **linear, **more)


def _qwen3_5_moe(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    return _qwen3_5(tokenizer, chat, "Qwen3_5Moe", shared_expert_intermediate_size=24, **EXPERTS)


def _smol(name: str, tokenizer: Any, chat: str) -> tuple[Any, Any]:
    kinds = {k: getattr(hf, f"{name}{k}") for k in ("Config", "ImageProcessor", "Processor", "VisionConfig")}
    config = kinds["Config"](
        vision_config=kinds["VisionConfig"](**VISION, image_size=28, patch_size=7),
        text_config=_text(hf.LlamaConfig, tokenizer).to_dict(),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    images = kinds["ImageProcessor"](size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    extra = {}
    if name == "SmolVLM":
        sampling = {"fps": 1, "max_frames": 4}
        extra["video_processor"] = hf.SmolVLMVideoProcessor(
            size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, video_sampling=sampling
        )
    processor = kinds["Processor"](images, tokenizer, image_seq_len=4, chat_template=chat, **extra)
    return getattr(hf, f"{name}ForConditionalGeneration")(config), processor


def _smolvlm(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    return _smol("SmolVLM", tokenizer, chat)


def _idefics3(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    return _smol("Idefics3", tokenizer, chat)


def _paligemma(tokenizer: Any, chat: str, text: Any = None) -> tuple[Any, Any]:
    images = hf.SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)  # adds tokens: the vocabulary is counted afterwards
    config = hf.PaliGemmaConfig(
        vision_config=_siglip(),
        text_config=text or _text(hf.GemmaConfig, tokenizer, head_dim=8),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        pad_token_id=0,
    )
    config.text_config.vocab_size = len(tokenizer)
    return hf.PaliGemmaForConditionalGeneration(config), processor


def _paligemma2(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    text = _text(hf.Gemma2Config, tokenizer, head_dim=8, sliding_window=16, final_logit_softcapping=2.0)
    return _paligemma(tokenizer, chat, text)


def _gemma3(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    config = hf.Gemma3Config(
        vision_config=_siglip(),
        text_config=_text(hf.Gemma3TextConfig, tokenizer, **MIXED, head_dim=8, final_logit_softcapping=0.5),
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
    )
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SIDE), tokenizer, chat, 4)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # drawn as zeros
    return model, processor


def _aya_vision(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    config = hf.AyaVisionConfig(
        vision_config=_siglip(),
        text_config=_text(hf.Cohere2Config, tokenizer, **MIXED, logit_scale=0.25),
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=64,
    )
    images = hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4)
    processor = hf.AyaVisionProcessor(images, tokenizer, 7, 28, "<image>", 2, chat_template=chat)
    return hf.AyaVisionForConditionalGeneration(config), processor


def _phi4_multimodal(tokenizer: Any, chat: str) -> tuple[Any, Any]:
    vision = VISION | {
        "image_size": 448,
        "patch_size": 14,
        "crop_size": 448,
        "image_token_id": tokenizer.image_token_id,
    }
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8}
    audio |= {"audio_token_id": tokenizer.audio_token_id, "nemo_conv_channels": 8, "ext_pw_out_channel": 32}
    config = hf.Phi4MultimodalConfig(
        vision_config=vision, audio_config=audio, **TEXT, vocab_size=len(tokenizer), tie_word_embeddings=False
    )
    processor = hf.Phi4MultimodalProcessor(
        hf.Phi4MultimodalImageProcessor(dynamic_hd=2),
        hf.Phi4MultimodalFeatureExtractor(feature_size=8),
        tokenizer,
        chat_template=chat,
    )
    return hf.Phi4MultimodalForCausalLM(config), processor
