"""Transformers' own vision-language models behind the suite's interface, and what their output layers do to logits."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation
from data.errors import BadSample, UserError

from .adapters import plain_state
from .chat import Span, find_answers, mark_tokens, rendered, special_ids, token_places
from .common import checkpoint_layers, first_line
from .features import IMAGES, decoder_features, decoder_width, wanted_states
from .interface import LMHead, Outputs, Processor, VisionLanguageModel

#: Causal LMs of which Transformers multiplies the logits by ``logits_scaling`` where Granite divides by it.
MULTIPLIED = ("hyperclovax", "hyperclovax_vision_v2")

#: Composite models whose class applies a field of the text configuration to its logits. Others ignore the fields that
#: their text model alone would apply (Gemma 3: its soft-cap; Aya Vision: Cohere 2's scale).
COMPOSITE_SOFTCAP = ("paligemma", "gemma3n", "gemma4", "gemma4_unified", "mistral_large4", "muse_glimmer", "muse_spark")
COMPOSITE_SCALE = ("granite4_vision", "granite_docling", "hyperclovax_vision_v2", "muse_glimmer", "muse_spark")


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


class PretrainedProcessor(Processor):
    """A Transformers processor, which expands each image's placeholder; marks are carried over that expansion."""

    has_vision = True

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        #: What stands for an image in the rendered text; Gemma 3 has another token there than in the ids.
        self.placeholder = getattr(processor, "boi_token", None) or processor.image_token
        self._placeholder_id = self.tokenizer.convert_tokens_to_ids(self.placeholder)
        self._special = special_ids(self.tokenizer)
        self._dummy: Encoded | None = None

    def _render(self, messages: Sequence[dict[str, Any]], generation: bool) -> str:
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)

    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        messages = conversation.messages
        spans: list[Span] = []
        if generation:
            text = rendered(self._render, messages, True)
        else:
            text, spans = find_answers(self._render, messages)
        if text.count(self.placeholder) != len(images):
            raise BadSample("images and placeholders differ in number", f"{text.count(self.placeholder)} placeholders")
        tensors = self._process(text, images)
        input_ids = tensors.pop("input_ids")[0]
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        marks = mark_tokens(text, coded["offset_mapping"], coded["input_ids"], spans, self._special)
        supervised, ends = self._carry(coded["input_ids"], input_ids.tolist(), marks)
        places = token_places(coded["offset_mapping"], marks[0], spans)
        return Encoded(input_ids, supervised, ends, len(images), tensors, places)

    def _process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        bos = self.tokenizer.bos_token
        try:
            inputs = self.processor(
                text=[text],
                images=list(images) or None,
                return_tensors="pt",
                # As Transformers does after its own templates: no second start token.
                add_special_tokens=not (bos and text.startswith(bos)),
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise BadSample("processor refuses the sample", first_line(error)[:120]) from error
        return dict(inputs)

    def _carry(self, plain: list[int], full: list[int], marks: tuple[list[bool], list[bool]]) -> tuple[Tensor, Tensor]:
        """Marks on the ids before the images' expansion, carried to those after it.

        Between two placeholders the ids are the same in both. From the right, each such run that holds a supervised
        token is looked for in front of the one found before; the last run must be the end.
        """
        supervised = torch.zeros(len(full), dtype=torch.bool)
        ends = torch.zeros(len(full), dtype=torch.bool)
        limit = len(full)
        stop = len(plain)
        while stop >= 0:
            start = next((i + 1 for i in range(stop - 1, -1, -1) if plain[i] == self._placeholder_id), 0)
            run = plain[start:stop]
            if any(marks[0][start:stop]):
                first = limit - len(run)
                lowest = first if stop == len(plain) else 0
                while first >= lowest and full[first : first + len(run)] != run:
                    first -= 1
                if first < lowest:
                    raise BadSample("image expansion not understood", "an answer's tokens changed")
                supervised[first : first + len(run)] = torch.tensor(marks[0][start:stop])
                ends[first : first + len(run)] = torch.tensor(marks[1][start:stop])
                limit = first
            stop = start - 1
        return supervised, ends

    def dummy(self) -> Encoded:
        if self._dummy is None:
            tensors = self._process(self.placeholder, [Image.new("RGB", (64, 64))])
            input_ids = tensors.pop("input_ids")[0]
            nothing = torch.zeros(len(input_ids), dtype=torch.bool)
            self._dummy = Encoded(input_ids, nothing, nothing, 1, tensors)
        return self._dummy

    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Tensors of the shape ``[1, L]`` are padded to ``[B, L]``, all others joined along their first dimension."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

        def padded(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)

        inputs = ModelInputs(input_ids=padded([s.input_ids for s in samples], 0 if pad is None else pad))
        for name in {name: None for s in samples for name in s.tensors}:
            present = [s for s in samples if name in s.tensors]
            if all(s.tensors[name].shape == (1, len(s.input_ids)) for s in present):
                blank = present[0].tensors[name].dtype
                rows = [
                    s.tensors[name][0] if name in s.tensors else torch.zeros_like(s.input_ids, dtype=blank)
                    for s in samples
                ]
                inputs[name] = padded(rows, 0)
            else:
                inputs[name] = torch.cat([s.tensors[name] for s in present])
        return inputs

    def image_tokens(self, sample: Encoded) -> Tensor:
        return sample.input_ids == self.image_token_id

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


class PretrainedVLM(VisionLanguageModel):
    """An image-text-to-text model of Transformers.

    Args:
        model: from ``AutoModelForImageTextToText``.
        processor: of this model.
    """

    def __init__(self, model: Any, processor: PretrainedProcessor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.head = lm_head(model)
        self._ends = template_ends(processor)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Views of the model's own modules; a projector inside the vision tower (Qwen2-VL) is not told apart."""
        base = self.model.base_model
        parts: dict[str, nn.Module] = {"vision_encoder": self.model.get_encoder(modality="image")}
        for name in ("multi_modal_projector", "connector"):
            if hasattr(base, name):
                parts["projector"] = getattr(base, name)
        parts["decoder"] = nn.ModuleList([self.model.get_decoder(), self.model.get_output_embeddings()])
        return parts

    @property
    def end_tokens(self) -> set[int]:
        return super().end_tokens | self._ends | generation_ends(self.model)

    def forward(self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = ()) -> Outputs:
        # The base model, not its decoder: some models put vision features into deeper layers too.
        base, body = self.model.base_model, self.model.get_decoder()
        given: dict[str, Any] = dict(inputs)
        found: dict[str, Tensor] = {}
        if any(name in IMAGES for name in features) and "pixel_values" in inputs:
            # The tower runs here, once, and the model goes on from what it gave.
            seen = base.get_image_features(**self._image_inputs(inputs), return_dict=True)
            given = {k: v for k, v in given.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": seen}}
            found = self._image_features(seen, features)
        states = wanted_states(features, body)
        if states:
            given["output_hidden_states"] = states
        output = base(**given, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[positions]
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
        whole = "pixel_values" in dummy.tensors and dummy.tensors["pixel_values"].shape[:-3].numel() == 1
        width = getattr(config.vision_config, "hidden_size", None)
        enters = "mm_encoder_outputs" in signature(base.forward).parameters
        if not (asked and whole and width and enters) or various:
            raise UserError(
                f"feature {name}: {config.model_type} gives no features of equally many tokens an image; "
                "leave out the losses on images"
            )
        if name == "projector":
            return int(self.processor.image_tokens(dummy).sum()), body.config.hidden_size
        return None, width * len(self._vision_layers() or [0])

    def _image_inputs(self, inputs: ModelInputs) -> dict[str, Tensor]:
        asked = signature(self.model.base_model.get_image_features).parameters
        return {name: tensor for name, tensor in inputs.items() if name in asked}

    def _vision_layers(self) -> list[int]:
        """The tower's hidden states that the projector reads; none where it reads the final output."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        return list(layers) if isinstance(layers, list | tuple) else [] if layers is None else [layers]

    def _image_features(self, seen: Any, features: Sequence[str]) -> dict[str, Tensor]:
        """``vision`` and ``projector``, ``[images, tokens, width]``, of what ``get_image_features`` returned."""
        found: dict[str, Tensor] = {}
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
