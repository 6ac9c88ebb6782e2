"""Facts about families of Transformers that their configurations lack: one row a family."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.errors import UserError
from vlm_distill.losses.plugins import Plugins

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """Facts about a model type of Transformers.

    Attributes:
        softcap: the class of a vision-language model applies its text configuration's soft-cap to the logits. Other
            classes ignore it (Gemma 3).
        scale: the class applies its text configuration's factor on the logits. Other classes ignore it (Aya Vision).
        multiplies: the class multiplies the logits by ``logits_scaling``; Granite divides by it.
        needs: an input without which the model silently computes something else, such as one-dimensional positions or
            causal attention between image tokens.
        norm_after: the decoder's norms come after attention and MLP, so attention reads the hidden state itself.
        causal: Transformers lists this vision-language model among the causal LMs.
        chat: the family has a chat template.
        llava: a decoder of this type can be exported inside a LLaVA.
        equal_tiles: every image, or every tile of one that is cut, becomes the same number of tokens.
    """

    softcap: bool = False
    scale: bool = False
    multiplies: bool = False
    needs: str | None = None
    norm_after: bool = False
    causal: bool = False
    chat: bool = True
    llava: bool = False
    equal_tiles: bool = False


FAMILIES = {
    "aya_vision": Family(equal_tiles=True),
    "exaone4": Family(norm_after=True),
    "gemma3": Family(needs="token_type_ids", equal_tiles=True),
    "gemma3n": Family(softcap=True),
    "gemma4": Family(softcap=True),
    "gemma4_unified": Family(softcap=True),
    "granite4_vision": Family(scale=True),
    "granite_docling": Family(scale=True),
    "hyperclovax": Family(multiplies=True),
    "hyperclovax_vision_v2": Family(multiplies=True, scale=True),
    "idefics3": Family(equal_tiles=True),
    "internvl": Family(equal_tiles=True),
    "llama": Family(llava=True),
    "llava": Family(equal_tiles=True),
    "mistral": Family(llava=True),
    "mistral_large4": Family(softcap=True),
    "muse_glimmer": Family(softcap=True, scale=True),
    "muse_spark": Family(softcap=True, scale=True),
    "olmo2": Family(norm_after=True),
    "olmo3": Family(norm_after=True),
    "paligemma": Family(softcap=True, needs="token_type_ids", chat=False, equal_tiles=True),
    "phi4_multimodal": Family(causal=True),
    "qwen2": Family(llava=True),
    "qwen2_5_vl": Family(needs="mm_token_type_ids"),
    "smolvlm": Family(equal_tiles=True),
}

#: Rows from outside, by model type.
PLUGINS = Plugins("family", "vlm_distill.families", UserError)
PLUGINS.reserve(dict.fromkeys(FAMILIES, f"{__name__}:FAMILIES"))
register = PLUGINS.register

#: Normalisation (mean, standard deviation) of vision towers without an image processor, by the start of their model
#: type. These towers have a position for each patch and stretch them to another image size only if asked to.
TOWERS = {"clip": CLIP, "siglip": HALF, "vit": HALF}

#: Names of projectors inside a vision tower (Qwen-VL), and of projectors beside it.
PROJECTORS_INSIDE = ("merger", "deepstack_merger_list")
PROJECTORS_BESIDE = ("multi_modal_projector", "connector")
#: Name of the line-end embedding of LLaVA-NeXT and LLaVA-OneVision.
LINE_END = "image_newline"

#: Factors on the logits by their names in configurations, and the names of the soft-cap.
LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

#: Added tokens that frame an image or a part of one, by their names.
IMAGE_TOKENS = re.compile(r"im(g|age)|vision|video|audio|tile|patch|row_\d", re.IGNORECASE)

#: The sizes that a configuration can set, by the class of the image processor: keys, and the attribute behind each.
#: Image processors without an entry produce images of one size.
_IMAGE_KEYS = {
    "GotOcr2ImageProcessor": {"min_patches": "min_patches", "max_patches": "max_patches"},
    "Idefics2ImageProcessor": {"shortest_edge": "size.shortest_edge", "longest_edge": "size.longest_edge"},
    "Idefics3ImageProcessor": {"longest_edge": "size.longest_edge"},
    "Phi4MultimodalImageProcessor": {"dynamic_hd": "dynamic_hd"},
    "PixtralImageProcessor": {"longest_edge": "size.longest_edge"},
    "Qwen2VLImageProcessor": {"min_pixels": "size.shortest_edge", "max_pixels": "size.longest_edge"},
    "SmolVLMImageProcessor": {"longest_edge": "size.longest_edge"},
}


def image_keys(image_processor: str) -> dict[str, str]:
    """Return what can be set of an image processor of this class: the attribute behind each key."""
    return _IMAGE_KEYS.get(image_processor.removesuffix("Pil").removesuffix("Fast"), {})


def family(model_type: str) -> Family:
    """Return the facts about a model type: its row, or a plug-in's; one without a row has the defaults.

    Raises:
        UserError: a plug-in with this name cannot be used.
    """
    # A model's files name the type, and must not choose code: module:attribute means nothing here.
    if model_type in FAMILIES or ":" in model_type or model_type not in PLUGINS:
        return FAMILIES.get(model_type, Family())
    found = PLUGINS.find(model_type)
    if not isinstance(found, Family):
        raise UserError(f"family {model_type}: is a {type(found).__name__}; make it a {__name__}.Family")
    return found


def tower_normalisation(model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of a tower with a position for each patch; ``None`` for any other tower."""
    return next((known for start, known in TOWERS.items() if model_type.startswith(start)), None)


@dataclass(frozen=True)
class SizeKeys:
    """Names of a part's sizes in its configuration.

    Attributes:
        layers, heads, width: numbers of layers and attention heads, and hidden size.
        groups: number of key-value heads; ``None``: each head has its own.
        neurons: of an MLP.
        ratio: whether ``neurons`` counts them in multiples of the width.
    """

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    width: str = "hidden_size"
    groups: str | None = "num_key_value_heads"
    neurons: str = "intermediate_size"
    ratio: bool = False


_TOWER = SizeKeys(groups=None)
_QWEN_TOWER = SizeKeys(layers="depth", heads="num_heads", groups=None)

#: Model types of decoders and vision encoders with plain layers, which can be pruned: separate linear layers, one MLP,
#: equal layers. tests/models/test_pruning.py tries each.
PLAIN = {
    **dict.fromkeys(("cohere2", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"), SizeKeys()),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "smollm3"), SizeKeys()),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "internvl_vision", "pixtral"), _TOWER),
    **dict.fromkeys(("idefics3_vision", "smolvlm_vision"), _TOWER),
    **dict.fromkeys(("qwen2_5_vl_vision", "qwen3_vl_vision"), _QWEN_TOWER),
    "qwen2_vl_vision": SizeKeys("depth", "num_heads", "embed_dim", None, "mlp_ratio", ratio=True),
}


@dataclass(frozen=True)
class VideoInput:
    """How a family takes videos.

    Attributes:
        separate: videos have tensors and tokens of their own; else the model receives frames among its images.
        stacked: the videos of a batch must have equally many frames.
    """

    separate: bool = True
    stacked: bool = False


#: Families that take videos, by their video processor, each tried in tests/models/test_videos.py; others see images.
VIDEO_INPUTS = {
    "InternVLVideoProcessor": VideoInput(separate=False),
    "LlavaOnevisionVideoProcessor": VideoInput(stacked=True),
    "Qwen2VLVideoProcessor": VideoInput(),
    "Qwen3VLVideoProcessor": VideoInput(),
    "SmolVLMVideoProcessor": VideoInput(separate=False),
}

#: Where else a vision-language model's configuration has the decoder's width, by model type.
DECODER_WIDTHS = {
    "paligemma": ("projection_dim", "hidden_size", "vision_config.projection_dim"),
    "qwen2_5_vl": ("vision_config.out_hidden_size",),
    "qwen2_vl": ("vision_config.hidden_size",),
    "qwen3_vl": ("vision_config.out_hidden_size",),
}

#: Names of weights that read several patches at once with each channel's values side by side; others have each patch's.
CHANNELS_FIRST = ("patch_merger.merging_layer.weight",)
