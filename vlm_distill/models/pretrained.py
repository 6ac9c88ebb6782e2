"""Transformers' own vision-language models behind the suite's interface, and what their output layers do to logits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, count_images
from data.errors import BadSample, UserError

from .adapters import plain_state
from .chat import (
    PRIVATE,
    Span,
    find_answers,
    held,
    mark_tokens,
    plain_messages,
    rendered,
    special_ids,
    token_places,
    written_texts,
)
from .common import checkpoint_layers, first_line
from .features import IMAGES, SIGHT, decoder_features, decoder_width, wanted_states
from .interface import LMHead, Outputs, Processor, VisionLanguageModel
from .packing import is_by_token, joined, row_positions, wants_one_row
from .sequence_parallel import at_positions

#: Causal LMs of which Transformers multiplies the logits by ``logits_scaling`` where Granite divides by it.
MULTIPLIED = ("hyperclovax", "hyperclovax_vision_v2")

#: Composite models whose class applies a field of the text configuration to its logits. Others ignore the fields that
#: their text model alone would apply (Gemma 3: its soft-cap; Aya Vision: Cohere 2's scale).
COMPOSITE_SOFTCAP = ("paligemma", "gemma3n", "gemma4", "gemma4_unified", "mistral_large4", "muse_glimmer", "muse_spark")
COMPOSITE_SCALE = ("granite4_vision", "granite_docling", "hyperclovax_vision_v2", "muse_glimmer", "muse_spark")

#: Inputs without which a model computes something else in silence: flat positions, images attended causally.
SILENTLY_NEEDED = {"qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids", "paligemma": "token_type_ids"}


def lm_head(model: Any) -> LMHead:
    """The output layer of a Transformers model with the scale and the soft-cap that its class applies to the logits."""
    config, text = model.config, model.config.get_text_config()
    composite = text is not config
    scale, softcap = 1.0, None
    if not composite or config.model_type in COMPOSITE_SOFTCAP:
        softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    if not composite or config.model_type in COMPOSITE_SCALE:
        scale = _scale(text, config.model_type)
    return LMHead(model.get_output_embeddings(), scale, softcap)


def _scale(text: Any, model_type: str) -> float:
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    return scale * scaling if model_type in MULTIPLIED else scale / scaling


def template_ends(processor: Processor) -> set[int]:
    """The tokens with which the chat template ends an answer, found by encoding one."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"))
    ]
    try:
        sample = processor.encode(Conversation(tuple(messages)), [])
    except BadSample:  # a template that always wants an image or a system prompt: the tokenizer's end token must do
        return set()
    return set(sample.input_ids[sample.ends].tolist())


def generation_ends(model: Any) -> set[int]:
    """End tokens that the model's own generation settings name."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(eos) if isinstance(eos, list) else set() if eos is None else {eos}


class Expanded:
    """A rendered text after the images' placeholders were replaced.

    Args:
        text: before.
        replaced: for each image its placeholder (``text``), where that stood (``span``), and what took its place
            (``replacement``).
    """

    def __init__(self, text: str, replaced: Sequence[dict[str, Any]]) -> None:
        if any(text[slice(*item["span"])] != item["text"] for item in replaced):
            raise BadSample("image expansion not understood", "the processor rewrites the text")
        self._replaced = [(*item["span"], item["replacement"]) for item in replaced]
        pieces, last = [], 0
        for start, stop, replacement in self._replaced:
            pieces += [text[last:start], replacement]
            last = stop
        self.text = "".join([*pieces, text[last:]])

    def span(self, span: Span) -> Span:
        """An answer's place afterwards; no image stands in an answer."""
        return span.moved(sum(len(new) - (stop - start) for start, stop, new in self._replaced if stop <= span.start))


class PretrainedProcessor(Processor):
    """A Transformers processor, which expands each image's placeholder and says where.

    Args:
        processor: with its chat template and a fast tokenizer.
        image_token_id: of the token that stands for images in the ids.
        model: whose M-RoPE positions are computed, where it has any; its weights are not kept.
    """

    has_vision = True

    def __init__(self, processor: Any, image_token_id: int, model: Any = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        #: What stands for an image in the rendered text; Gemma 3 and Aya Vision have another token in the ids.
        self.placeholder = processor.image_token
        names = [processor.video_token] if getattr(processor, "video_token", None) else []
        self._reserved = [self.placeholder, self.tokenizer.convert_ids_to_tokens(image_token_id), *names]
        self._special = special_ids(self.tokenizer)
        self._dummy: Encoded | None = None
        self._rope = _rope_index(model)

    @property
    def chat_template(self) -> Any:
        return self.processor.chat_template

    def set_chat_template(self, template: Any) -> None:
        self.processor = copy.copy(self.processor)
        self.processor.chat_template = template

    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        return self.processor.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
        )

    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        messages = conversation.messages
        self._check(conversation, images)
        render = partial(self._render, tools=conversation.tools)
        spans: list[Span] = []
        if generation:
            text = rendered(render, plain_messages(messages, self.frame), True)
        else:
            text, spans = find_answers(render, messages, self.frame, self.learn_block)
        if text.count(self.placeholder) != len(images):
            raise BadSample("images and placeholders differ in number", f"{text.count(self.placeholder)} placeholders")
        return self._encoded(text, spans, images, add_special_tokens=self._lacks_start(text))

    def adds_special_tokens(self, conversation: Conversation) -> bool:
        """Whether the tokenizer puts its own tokens around this conversation, beside those of the template."""
        render = partial(self._render, tools=conversation.tools)
        return self._lacks_start(rendered(render, plain_messages(conversation.messages, self.frame), False))

    def _lacks_start(self, text: str) -> bool:
        # As Transformers does after its own templates: no second start token.
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _check(self, conversation: Conversation, images: Sequence[Image.Image]) -> None:
        texts = [text for message in conversation.messages for text in written_texts(message)]
        texts.append(json.dumps(conversation.tools, ensure_ascii=False))
        if held(PRIVATE, texts):
            raise BadSample("text holds a private-use character that marks images", "U+10FFF0 to U+10FFFD")
        if token := held(self._reserved, texts):
            raise BadSample("text holds one of the model's placeholders", token)
        # The processor tokenizes the rendered text as a whole, and makes of this what it makes of the template's own.
        if token := held(self.frame.control, texts):
            raise BadSample("text holds a control token", token)
        if count_images(conversation.messages) != len(images):
            raise BadSample("images and image parts differ in number", f"{len(images)} images")

    def _encoded(self, text: str, spans: Sequence[Span], images: Sequence[Image.Image], **options: Any) -> Encoded:
        """A rendered text with the answers at ``spans`` marked, which are carried over the images' expansion."""
        tensors, replaced = self._process(text, images, **options)
        expanded = Expanded(text, replaced)
        moved = [expanded.span(span) for span in spans]
        offsets = tensors.pop("offset_mapping")[0].tolist()
        input_ids = tensors.pop("input_ids")[0]
        supervised, ends = mark_tokens(expanded.text, offsets, input_ids.tolist(), moved, self._special)
        places = token_places(expanded.text, offsets, supervised, ends, moved)
        return Encoded(input_ids, torch.tensor(supervised), torch.tensor(ends), len(images), tensors, places)

    def _process(
        self, text: str, images: Sequence[Image.Image], **options: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The model's inputs, offsets among them, and what became of each image's placeholder.

        With ``vision_features`` among them where these are known; grids and sizes stay.
        """
        try:
            inputs = self.processor(
                text=[text],
                # One list for one sample: several images in a flat list are several samples to some families.
                images=[list(images)] if images else None,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                **options,
            )
            # Not by the processor: InternVL's would make a tensor of the replacements too.
            (replaced,) = inputs.pop("text_replacement_offsets", None) or [[]]
            tensors = dict(BatchFeature(dict(inputs), tensor_type="pt"))
        except Exception as error:  # processors raise almost anything on images of odd shapes
            raise BadSample("processor refuses the sample", first_line(error)[:120]) from error
        if len(replaced) != len(images):
            raise BadSample("image expansion not understood", f"{type(self.processor).__name__} does not tell it")
        if images and self.features is not None:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pixel_")}
            tensors["vision_features"] = self.features(images)
        return tensors, replaced

    def blank(self) -> Image.Image:
        return Image.new("RGB", (64, 64))

    def pictured(self, images: Sequence[Image.Image]) -> Encoded:
        return self._encoded(self.placeholder * len(images), [], images)

    def dummy(self) -> Encoded:
        if self._dummy is None:
            self._dummy = self.pictured([self.blank()])
        return self._dummy

    def with_features(self, features: Callable[[Sequence[Image.Image]], Tensor]) -> Self:
        other = super().with_features(features)
        other._dummy = None
        return other

    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Tensors of the shape ``[1, L]`` are padded to ``[B, L]``, all others joined along their first dimension.

        Where these differ in a further one (tiles, height, width), they are padded there with zeros, as processors do
        with the images of one sample; masks and sizes among the inputs tell the models what is padding.
        """
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

        def padded(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)

        inputs = ModelInputs(input_ids=padded([s.input_ids for s in samples], 0 if pad is None else pad))
        for name in {name: None for s in samples for name in s.tensors}:
            present = [s for s in samples if name in s.tensors]
            if name == "position_ids":
                inputs[name] = row_positions(samples, inputs["input_ids"].shape[1])
            elif all(is_by_token(s, name) for s in present):
                blank = present[0].tensors[name].dtype
                rows = [
                    s.tensors[name][0] if name in s.tensors else torch.zeros_like(s.input_ids, dtype=blank)
                    for s in samples
                ]
                inputs[name] = padded(rows, 0)
            else:
                inputs[name] = joined([s.tensors[name] for s in present])
        return inputs

    def positions(self, sample: Encoded) -> Tensor:
        text = super().positions(sample)
        if self._rope is None:
            return text
        asked = set(signature(self._rope).parameters) - {"attention_mask"}
        axes, _ = self._rope(sample.input_ids.unsqueeze(0), **{k: v for k, v in sample.tensors.items() if k in asked})
        return torch.cat([text.unsqueeze(0), axes[:, 0]])

    def image_tokens(self, sample: Encoded) -> Tensor:
        return sample.input_ids == self.image_token_id

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


@dataclass
class _Seen(BaseModelOutputWithPooling):
    deepstack_features: list[Any] | None = None


def _rope_index(model: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The method of a model's class that computes M-RoPE positions, bound to an object with its configuration alone.

    It goes to the processes that make batches, where the weights must not go.
    """
    base: Any = getattr(model, "base_model", None)
    if not hasattr(base, "get_rope_index"):
        return None
    kind: Any = type(base)
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    bare.config = base.config
    return bare.get_rope_index


class PretrainedVLM(VisionLanguageModel):
    """An image-text-to-text model of Transformers.

    Args:
        model: from ``AutoModelForImageTextToText``.
        processor: of this model.
    """

    processor: PretrainedProcessor

    def __init__(self, model: Any, processor: PretrainedProcessor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.head = lm_head(model)
        self._ends = template_ends(processor)
        self._listed: bool | None = None
        processor.one_row = wants_one_row(model.get_decoder().config)
        # What no part holds takes no part: towers for sound.
        used = {id(parameter) for part in self.parts.values() for parameter in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Views of the model's own modules."""
        base, tower = self.model.base_model, self.model.get_encoder(modality="image")
        # The projectors of Qwen-VL stand inside the tower.
        inside = [name for name in ("merger", "deepstack_merger_list") if hasattr(tower, name)]
        beside = [getattr(base, name) for name in ("multi_modal_projector", "connector") if hasattr(base, name)]
        if inside:
            beside = [getattr(tower, name) for name in inside]
            tower = nn.ModuleList([module for name, module in tower.named_children() if name not in inside])
        # The embedding of a line's end in LLaVA-NeXT and LLaVA-OneVision.
        if hasattr(base, "image_newline"):
            beside.append(nn.ParameterList([base.image_newline]))
        decoder = nn.ModuleList([self.model.get_decoder(), self.model.get_output_embeddings()])
        projector = beside[0] if len(beside) == 1 else nn.ModuleList(beside)
        return {"vision_encoder": tower} | ({"projector": projector} if beside else {}) | {"decoder": decoder}

    @property
    def end_tokens(self) -> set[int]:
        return super().end_tokens | self._ends | generation_ends(self.model)

    @property
    def body(self) -> nn.Module:
        return self.model.get_decoder()

    def forward(self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = ()) -> Outputs:
        # The base model, not its decoder: some models put vision features into deeper layers too.
        base, body = self.model.base_model, self.body
        given: dict[str, Any] = dict(inputs)
        needed = SILENTLY_NEEDED.get(self.model.config.model_type)
        if needed and needed not in given:
            raise UserError(f"{self.model.config.model_type}: its processor gives no {needed}; load one that does")
        found: dict[str, Tensor] = {}
        if "vision_features" in given:
            given["mm_encoder_outputs"] = {"image": self._seen(given.pop("vision_features"))}
        if any(name in (*IMAGES, SIGHT) for name in features) and "pixel_values" in inputs:
            # The tower runs here, once, and the model goes on from what it gave.
            seen = base.get_image_features(**self._image_inputs(inputs), return_dict=True)
            given = {k: v for k, v in given.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": seen}}
            found = self._image_features(seen, features)
        states = wanted_states(features, body)
        if states:
            given["output_hidden_states"] = states
        output = base(**given, use_cache=False)
        hidden = at_positions(output.last_hidden_state, positions, inputs["input_ids"].shape[1])
        kept = getattr(output, "hidden_states", None)
        return Outputs(hidden, decoder_features(features, body, hidden, kept, positions) | found)

    def feature_shape(self, name: str) -> tuple[int | None, int]:
        config, body = self.model.config, self.model.get_decoder()
        if name not in IMAGES:
            return None, decoder_width(name, body)
        base = self.model.base_model
        asked = signature(base.get_image_features).parameters if hasattr(base, "get_image_features") else {}
        dummy = self.processor.dummy()
        # Grids and sizes are asked for where images are cut into tiles or keep their shape.
        various = {"image_grid_thw", "image_sizes"} & set(asked) & set(dummy.tensors)
        # Families that cut tiles do it by an image's shape.
        wide = self.processor.pictured([Image.new("RGB", (256, 64))])
        whole = all(
            "pixel_values" in s.tensors and s.tensors["pixel_values"].shape[:-3].numel() == 1 for s in (dummy, wide)
        )
        width = getattr(config.vision_config, "hidden_size", None)
        if not (asked and whole and width and self._takes_features) or various:
            raise UserError(
                f"feature {name}: {config.model_type} gives no features of equally many tokens an image; "
                "leave out the losses on images"
            )
        if name == "projector":
            return int(self.processor.image_tokens(dummy).sum()), body.config.hidden_size
        return None, width * len(self._vision_layers() or [0])

    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        if "pixel_values" not in inputs:
            return {"vision_encoder": 0, "projector": 0}
        if hasattr(self.model.base_model, "image_newline") and inputs["pixel_values"].dim() == 5:
            # Rows of padding are cut out of what the projector gave, ends of lines are put in. Tiles of zeros, which a
            # normalised image's first line is not, pad the batch and never run.
            tiles = inputs["pixel_values"].flatten(0, 1)
            run = int(tiles[:, :, 0].flatten(1).any(-1).sum())
            return dict.fromkeys(("vision_encoder", "projector"), run * self._patches(tiles[:1]))
        tokens = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        return {"vision_encoder": tokens * self._joined, "projector": tokens}

    @cached_property
    def _joined(self) -> float:
        """How many patches become one image token: pixels of a batch hold padding as well, which towers leave out."""
        dummy = self.processor.dummy()
        return self._patches(dummy.tensors["pixel_values"]) / max(1, int(self.processor.image_tokens(dummy).sum()))

    def _patches(self, pixels: Tensor) -> float:
        """How many patches pixels are; 0 where the first layer is none of patches, as in convolutional towers."""
        kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
        first: Any = next((m for m in self.parts["vision_encoder"].modules() if isinstance(m, kinds)), None)
        # A patch's numbers are what one row of that layer multiplies.
        if isinstance(first, nn.Linear):
            return pixels.numel() / first.in_features
        if first is None or first.stride != first.kernel_size:
            return 0.0
        return pixels.numel() / (first.in_channels * torch.Size(first.kernel_size).numel())

    @property
    def _takes_features(self) -> bool:
        base = self.model.base_model
        return hasattr(base, "get_image_features") and "mm_encoder_outputs" in signature(base.forward).parameters

    @property
    def sight(self) -> dict[str, nn.Module]:
        if not self._takes_features:
            raise UserError(f"{self.model.config.model_type} takes no features in place of images")
        return {name: part for name, part in self.parts.items() if name != "decoder"}

    @property
    def sight_settings(self) -> dict[str, Any]:
        config = self.model.config.to_dict()
        here = ("text_config", "dtype", "transformers_version", "_name_or_path", "architectures")
        images = self.processor.processor.image_processor.to_dict()
        return {**{name: value for name, value in config.items() if name not in here}, "image_processor": images}

    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        # Alone: beside other images some families pad an image, or its tiles.
        return [self._flat(self._look(row)) for row in rows]

    def _look(self, row: Encoded) -> Any:
        parameter = next(next(iter(self.sight.values())).parameters())
        inputs = self._image_inputs(self.processor.collate([row]).to(parameter.device, parameter.dtype))
        return self.model.base_model.get_image_features(**inputs, return_dict=True)

    def _flat(self, seen: Any) -> Tensor:
        """``[tokens, C]`` of what ``get_image_features`` gave: what the decoder takes first, then in deeper layers."""
        found = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
        lists = [[one] if isinstance(one, Tensor) else one for one in found]
        return torch.cat([torch.cat([t.reshape(-1, t.shape[-1]) for t in one]) for one in lists], -1)

    def _seen(self, features: Tensor) -> Any:
        """The way back from :meth:`_flat`."""
        if self._listed is None:
            # Whether a family gives a list or a tensor is written nowhere.
            with torch.no_grad():
                self._listed = not isinstance(self._look(self.processor.dummy()).pooler_output, Tensor)
        found: list[Any] = list(features.split(self.model.config.get_text_config().hidden_size, -1))
        if self._listed:
            found = [[one] for one in found]
        return _Seen(pooler_output=found[0], deepstack_features=found[1:] or None)

    def _image_inputs(self, inputs: ModelInputs) -> dict[str, Tensor]:
        asked = signature(self.model.base_model.get_image_features).parameters
        return {name: tensor for name, tensor in inputs.items() if name in asked}

    def _vision_layers(self) -> list[int]:
        """The tower's hidden states that the projector reads; none where it reads the final output."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        return list(layers) if isinstance(layers, list | tuple) else [] if layers is None else [layers]

    def _image_features(self, seen: Any, features: Sequence[str]) -> dict[str, Tensor]:
        """Features of images, of what ``get_image_features`` returned."""
        found: dict[str, Tensor] = {}
        if SIGHT in features:
            found[SIGHT] = self._flat(seen)
        if "projector" in features:
            projected = seen.pooler_output
            found["projector"] = projected if isinstance(projected, Tensor) else torch.stack(list(projected))
        if "vision" in features:
            states = seen.hidden_states
            layers = self._vision_layers() if states else []
            vision = torch.cat([states[i] for i in layers], -1) if layers else seen.last_hidden_state
            classed = getattr(self.model.config, "vision_feature_select_strategy", None) == "default"
            found["vision"] = vision[:, 1:] if classed else vision
        return found

    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        return self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self.model)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        state = plain_state(self, state)
        self.model.save_pretrained(folder, state_dict={k.removeprefix("model."): v for k, v in state.items()})
        self.processor.save_pretrained(folder)
