"""Models assembled from a vision encoder, a projector and a causal LM of Transformers, or from the last alone."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, count_images
from data.errors import BadSample, UserError

from .adapters import plain_state
from .chat import (
    BREAK,
    DEFAULT_TEMPLATE,
    IMAGE,
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
from .common import as_dtype, built_whole, check_attention, check_keys, checkpoint_layers, first_line, read_settings
from .features import IMAGES, SIGHT, decoder_features, decoder_width, wanted_states
from .folder import check_folder, check_open_clip_config, check_settings, check_timm_options, is_place, read_object
from .interface import Outputs, Processor, VisionLanguageModel
from .loading import Report, check_finite, check_report, check_shapes, check_size, from_pretrained
from .packing import row_positions, wants_one_row
from .pretrained import generation_ends, lm_head, template_ends
from .projectors import Projector, build_projector
from .sequence_parallel import at_positions
from .vision_encoders import ImageTransform, VisionEncoder, VisionEncoderSettings, build_vision_encoder
from .weightless import weightless

#: The file that makes a folder one of ours.
CONFIG_NAME = "vlm_distill.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = 1

_MARKS = re.compile(f"([{IMAGE}{BREAK}])")


class ComposedProcessor(Processor):
    """Chat template, tokenizer and image transform; an image becomes a fixed number of positions where its part stands.

    Image positions hold the pad id and are marked in ``image_mask``, so that no word of the vocabulary means "image".

    Args:
        tokenizer: a fast tokenizer; one without a chat template gets :data:`~vlm_distill.models.chat.DEFAULT_TEMPLATE`.
        transform: ``None`` for a language model.
        tokens: positions an image takes.
    """

    def __init__(self, tokenizer: Any, transform: ImageTransform | None = None, tokens: int = 0) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer: {type(tokenizer).__name__} of '{tokenizer.name_or_path}' is not a fast tokenizer; "
                "character offsets need one, choose a model with a tokenizer.json"
            )
        if tokenizer.chat_template is None:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.tokenizer = tokenizer
        self.transform = transform
        self.tokens = tokens
        self.has_vision = transform is not None
        self._special = special_ids(tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else pad

    @property
    def chat_template(self) -> Any:
        return self.tokenizer.chat_template

    def set_chat_template(self, template: Any) -> None:
        self.tokenizer = copy.deepcopy(self.tokenizer)  # a student's may be its teacher's
        self.tokenizer.chat_template = template

    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        flat = [{**m, "content": self._flat_content(m)} for m in messages]
        return self.tokenizer.apply_chat_template(
            flat, tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
        )

    def _flat_content(self, message: Mapping[str, Any]) -> str:
        parts = message["content"]
        text = "".join(part["text"] if part["type"] == "text" else IMAGE for part in parts)
        for token in self._frame.control if self._frame and message["role"] != "assistant" else ():
            text = text.replace(token, token[:1] + BREAK + token[1:])
        return text

    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        messages, frame = conversation.messages, self.frame
        self._check(conversation, images)
        render = partial(self._render, tools=conversation.tools)
        spans: list[Span] = []
        if generation:
            text = rendered(render, plain_messages(messages, frame), True)
        else:
            text, spans = find_answers(render, messages, frame, self.learn_block)
        if text.count(IMAGE) != len(images):
            raise BadSample("chat template drops or repeats images", f"{text.count(IMAGE)} of {len(images)}")

        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for piece in _MARKS.split(text):
            if piece == IMAGE:
                ids += [-1] * self.tokens
                offsets += [(at, at + 1)] * self.tokens
            if piece in (IMAGE, BREAK):
                at += 1
                continue
            coded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += coded["input_ids"]
            offsets += [(at + a, at + b) for a, b in coded["offset_mapping"]]
            at += len(piece)
        supervised, ends = mark_tokens(text, offsets, ids, spans, self._special)
        encoded = self._encoded(ids, supervised, ends, images)
        encoded.spans = token_places(text, offsets, supervised, ends, spans)
        return encoded

    def _check(self, conversation: Conversation, images: Sequence[Image.Image]) -> None:
        texts = [text for message in conversation.messages for text in written_texts(message)]
        if held(PRIVATE, texts):
            raise BadSample("text holds a private-use character that marks images", "U+10FFF0 to U+10FFFD")
        # What is not escaped: an answer, and what a template writes as JSON.
        texts = [text for m in conversation.messages if m["role"] == "assistant" for text in written_texts(m)]
        if token := held(self.frame.control, texts):
            raise BadSample("answer holds a control token", token)
        if token := held(self.frame.control, [json.dumps(conversation.tools, ensure_ascii=False)]):
            raise BadSample("text holds a control token", f"{token} among the tools")
        if images and not self.has_vision:
            raise BadSample("model takes no images", f"{len(images)} given")
        if count_images(conversation.messages) != len(images):
            raise BadSample("images and image parts differ in number", f"{len(images)} images")

    def _encoded(
        self, ids: list[int], supervised: list[bool], ends: list[bool], images: Sequence[Image.Image]
    ) -> Encoded:
        input_ids = torch.tensor(ids, dtype=torch.long)
        tensors = {}
        if self.has_vision:
            tensors["image_mask"] = input_ids < 0
        if images and self.features is not None:
            tensors["vision_features"] = torch.stack([self.features([image]) for image in images])
        elif images and self.transform is not None:
            tensors["pixel_values"] = torch.stack([self.transform(image) for image in images])
        return Encoded(
            input_ids.masked_fill(input_ids < 0, self._pad),
            torch.tensor(supervised, dtype=torch.bool),
            torch.tensor(ends, dtype=torch.bool),
            len(images),
            tensors,
        )

    def dummy(self) -> Encoded:
        return self.pictured([] if self.transform is None else [self.blank()])

    def blank(self) -> Image.Image:
        assert self.transform is not None
        return self.transform.blank()

    def pictured(self, images: Sequence[Image.Image]) -> Encoded:
        ids = [-1] * self.tokens * len(images) + [self._pad]
        nothing = [False] * len(ids)
        return self._encoded(ids, nothing, nothing, images)

    def seen_together(self, images: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
        return [[image] for image in images]

    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Samples padded into one batch.

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids`` int64 ``[B, L]``; with a vision encoder ``image_mask``
            bool ``[B, L]`` and, unless no sample has an image, ``pixel_values`` float32 ``[images, 3, H, W]`` or
            ``vision_features`` ``[images, tokens, C]``.
            Where samples were joined there is no ``attention_mask``.
        """

        def padded(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)

        mask = padded([torch.ones_like(s.input_ids) for s in samples], 0)
        inputs = ModelInputs(
            input_ids=padded([s.input_ids for s in samples], self._pad),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        )
        if any("position_ids" in s.tensors for s in samples):
            del inputs["attention_mask"]
            inputs["position_ids"] = row_positions(samples, mask.shape[1])
        if self.has_vision:
            inputs["image_mask"] = padded([s.tensors["image_mask"] for s in samples], False)
            name = "pixel_values" if self.features is None else "vision_features"
            seen = [s.tensors[name] for s in samples if s.images]
            if seen:
                inputs[name] = torch.cat(seen)
        return inputs

    def image_tokens(self, sample: Encoded) -> Tensor:
        mask = sample.tensors.get("image_mask")
        return torch.zeros_like(sample.supervised) if mask is None else mask

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


class ComposedVLM(VisionLanguageModel):
    """Vision encoder, projector and decoder put together; image features take the place of embeddings.

    Without a vision encoder it is a language model, and is saved as Transformers saves it.

    Args:
        decoder: any causal language model of Transformers.
        processor: of this model.
        vision_encoder, projector: both or neither.
        projector_settings: what builds the projector again.
    """

    def __init__(
        self,
        decoder: Any,
        processor: ComposedProcessor,
        vision_encoder: VisionEncoder | None = None,
        projector: Projector | None = None,
        projector_settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.decoder = decoder
        self.processor = processor
        self.projector_settings = dict(projector_settings or {})
        self.head = lm_head(decoder)
        self._takes_positions = "position_ids" in inspect.signature(decoder.base_model.forward).parameters
        self._ends = template_ends(processor)
        processor.one_row = wants_one_row(decoder.base_model.config)

    @property
    def parts(self) -> dict[str, nn.Module]:
        parts = {"vision_encoder": self.vision_encoder, "projector": self.projector, "decoder": self.decoder}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def end_tokens(self) -> set[int]:
        return super().end_tokens | self._ends | generation_ends(self.decoder)

    @property
    def body(self) -> nn.Module:
        return self.decoder.base_model

    def forward(self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = ()) -> Outputs:
        # The base model, not the whole decoder: its output layer must never run on every token.
        body = self.body
        embeddings, images = self._embed(inputs)
        states = wanted_states(features, body)
        options = {"output_hidden_states": states} if states else {}
        output = body(inputs_embeds=embeddings, use_cache=False, **self._sequence(inputs), **options)
        hidden = at_positions(output.last_hidden_state, positions, inputs["input_ids"].shape[1])
        kept = getattr(output, "hidden_states", None)
        found = decoder_features(features, body, hidden, kept, positions)
        return Outputs(hidden, found | {name: images[name] for name in features if name in images})

    def feature_shape(self, name: str) -> tuple[int | None, int]:
        if name in IMAGES:
            if self.vision_encoder is None:
                raise UserError(f"feature {name}: a language model sees no images")
            if name == "vision":
                return self.vision_encoder.tokens, self.vision_encoder.width
            assert isinstance(self.processor, ComposedProcessor)
            return self.processor.tokens, self.decoder.get_input_embeddings().embedding_dim
        return None, decoder_width(name, self.decoder.base_model)

    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        assert isinstance(self.processor, ComposedProcessor)
        encoder = None if "vision_features" in inputs else self.vision_encoder
        images = len(inputs.get("vision_features", inputs.get("pixel_values", ())))
        seen = 0 if encoder is None else encoder.positions or 0
        return {"vision_encoder": images * seen, "projector": images * self.processor.tokens}

    @property
    def sight(self) -> dict[str, nn.Module]:
        if self.vision_encoder is None:
            raise UserError("a language model sees no images")
        return {"vision_encoder": self.vision_encoder}

    @property
    def sight_settings(self) -> dict[str, Any]:
        assert self.vision_encoder is not None
        return dict(self.vision_encoder.settings)

    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        assert self.vision_encoder is not None
        inputs = self.processor.collate(rows).to(next(self.vision_encoder.parameters()).device)
        features = self.vision_encoder(inputs["pixel_values"]).flatten(0, 1)
        return list(features.split([row.images * self.vision_encoder.tokens for row in rows]))

    def _embed(self, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self.decoder.get_input_embeddings()(inputs["input_ids"])
        if "pixel_values" not in inputs and "vision_features" not in inputs:
            return embeddings, {}
        assert self.vision_encoder is not None
        assert self.projector is not None
        # Those of a teacher with the same encoder, or from disk, if there are any.
        known = inputs.get("vision_features")
        features = self.vision_encoder(inputs["pixel_values"]) if known is None else known
        projected = self.projector(features)
        mask = inputs["image_mask"].unsqueeze(-1)
        embeddings = embeddings.masked_scatter(mask, projected.to(embeddings.dtype))
        return embeddings, {"vision": features, SIGHT: features, "projector": projected}

    def _sequence(self, inputs: ModelInputs) -> dict[str, Tensor]:
        names = ("attention_mask", "position_ids") if self._takes_positions else ("attention_mask",)
        return {name: inputs[name] for name in names if name in inputs}

    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        embeddings, _ = self._embed(inputs)
        return self.decoder.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **settings)

    def use_tokenizer(self, tokenizer: Any, ends: set[int]) -> None:
        """Takes another tokenizer, with its chat template, in place of its own.

        Embeddings and output layer are cut or grown to its tokens; new rows are the old ones' mean, with a billionth of
        their covariance as noise, as Transformers does. A row keeps its id, whatever token it was of.

        Args:
            tokenizer: a copy is kept.
            ends: ids that end an answer from now on, beside the template's.
        """
        assert isinstance(self.processor, ComposedProcessor)
        tokenizer = copy.deepcopy(tokenizer)
        self.decoder.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1, mean_resizing=not weightless())
        for settings in (self.decoder.config.get_text_config(), self.decoder.generation_config):
            settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
            settings.eos_token_id = sorted(ends)
        learn_block = self.processor.learn_block
        self.processor = ComposedProcessor(tokenizer, self.processor.transform, self.processor.tokens)
        self.processor.learn_block = learn_block
        self.processor.one_row = wants_one_row(self.decoder.base_model.config)
        self.head = lm_head(self.decoder)
        self._ends = template_ends(self.processor)

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self.decoder)
        if self.vision_encoder is not None:
            self.vision_encoder.checkpoint_activations()

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = plain_state(self, state)
        if self.vision_encoder is None:
            decoder = {k.removeprefix("decoder."): v for k, v in state.items()}
            self.decoder.save_pretrained(folder, state_dict=decoder)
        else:
            aliases = tied_names(self)
            weights = {k: v.detach().cpu().contiguous() for k, v in state.items() if k not in aliases}
            save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            dtype = next(v.dtype for k, v in weights.items() if k.startswith("decoder.") and v.is_floating_point())
            config = {
                "format": FORMAT,
                "dtype": str(dtype).removeprefix("torch."),
                "vision_encoder": self.vision_encoder.settings,
                "projector": self.projector_settings,
                "decoder": self.decoder.config.to_dict(),
                "end_tokens": sorted(self.end_tokens),
            }
            (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.processor.save_pretrained(folder)


def tied_names(module: nn.Module) -> set[str]:
    """Names of parameters that are also there under an earlier name."""
    seen: set[int] = set()
    aliases = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            aliases.add(name)
        seen.add(id(parameter))
    return aliases


def cast_parameters(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Floating-point parameters to ``dtype``; buffers stay (rotary frequencies and running means need float32)."""
    if dtype is not None:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class DecoderSettings:
    """A causal LM of Transformers: ``name`` of a pretrained one, or ``config`` with its ``model_type``."""

    name: str | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ComposedSettings:
    """What names an assembled model.

    Attributes:
        decoder: a name or folder, or the keys of :class:`DecoderSettings`.
        vision_encoder: keys of ``VisionEncoderSettings``; ``None`` makes a language model.
        projector: ``type`` and that type's keys.
        tokenizer: a name or folder; ``None``: the pretrained decoder's.
        chat_template: the text of a Jinja template or a file that holds it; ``None``: the tokenizer's own.
        dtype: of all parameters; ``None``: float32.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2`` …; ``None``: the best there is.
        trust_remote_code: run code that comes with a pretrained decoder.
        quantize: a ``quantization_config`` of Transformers for a pretrained decoder.
    """

    decoder: str | Mapping[str, Any]
    vision_encoder: Mapping[str, Any] | None = None
    projector: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str | torch.dtype | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: Any = None


def build(settings: Mapping[str, Any], tokenizer: Any = None) -> ComposedVLM:
    """The model that ``settings`` name (see :class:`ComposedSettings`).

    New weights come from torch's global random generator: seed it before.

    Args:
        settings: a mapping with the keys of :class:`ComposedSettings`.
        tokenizer: instead of the one that ``settings`` name.

    Raises:
        UserError: a wrong setting, or a part that cannot be found or built.
    """
    s = read_settings(ComposedSettings, "model", settings)
    check_attention(s.attn_implementation)
    dtype = as_dtype(s.dtype) or torch.float32
    spec = {"name": s.decoder} if isinstance(s.decoder, str) else s.decoder
    decoder_settings = read_settings(DecoderSettings, "decoder", spec)
    if (decoder_settings.name is None) == (decoder_settings.config is None):
        raise UserError("decoder: give either 'name' (pretrained) or 'config' (new weights)")
    if tokenizer is None:
        name = s.tokenizer or decoder_settings.name
        if name is None:
            raise UserError("model.tokenizer: missing; a decoder built from a configuration needs a tokenizer")
        tokenizer = load_tokenizer(name, trust_remote_code=s.trust_remote_code)
    if s.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # a student's may be its teacher's, which has a template of its own
        tokenizer.chat_template = read_template(s.chat_template)
    attention = {"attn_implementation": s.attn_implementation} if s.attn_implementation else {}
    if decoder_settings.name is not None:
        options = attention | ({"quantization_config": s.quantize} if s.quantize is not None else {})
        decoder = load_decoder(decoder_settings.name, dtype, s.trust_remote_code, options)
    else:
        assert decoder_settings.config is not None
        decoder = _new_decoder(decoder_settings.config, tokenizer, attention)
    rows = decoder.get_input_embeddings().num_embeddings
    if rows < len(tokenizer):
        raise UserError(f"decoder: {rows} embeddings are too few for the tokenizer's {len(tokenizer)} tokens")
    model = _assemble(decoder, tokenizer, s.vision_encoder, s.projector, s.attn_implementation)
    cast_parameters(model, dtype)
    return model


def _assemble(
    decoder: Any,
    tokenizer: Any,
    vision_encoder: Mapping[str, Any] | None,
    projector: Mapping[str, Any] | None,
    attn_implementation: str | None,
) -> ComposedVLM:
    if vision_encoder is None:
        if projector is not None:
            raise UserError("projector: there is no vision_encoder to project; name one or leave the projector out")
        return ComposedVLM(decoder, ComposedProcessor(tokenizer))
    encoder = build_vision_encoder(vision_encoder, attn_implementation)
    projector = {"type": "mlp"} if projector is None else projector
    width = decoder.get_input_embeddings().embedding_dim
    module = build_projector(projector, encoder.width, width, encoder.tokens, encoder.grid)
    processor = ComposedProcessor(tokenizer, encoder.transform, module.tokens(encoder.tokens))
    return ComposedVLM(decoder, processor, encoder, module, projector)


@built_whole()
def _new_decoder(settings: Mapping[str, Any], tokenizer: Any, attention: Mapping[str, Any]) -> Any:
    options = dict(settings)
    if "model_type" not in options:
        raise UserError("decoder.config: 'model_type' is missing (llama, qwen2, gemma2 …)")
    model_type = options.pop("model_type")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        check_settings(options, "decoder.config")
        config = AutoConfig.for_model(model_type, **(defaults | options))
        if not weightless():
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention)
            check_size("decoder.config", empty)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **attention)
    except UserError:
        raise
    except Exception as error:  # the configuration classes' own checks, of many kinds
        raise UserError(f"decoder.config: {model_type} cannot be built: {first_line(error)}") from error


def load_decoder(name: str, dtype: torch.dtype | str, trust_remote_code: bool, options: Mapping[str, Any]) -> Any:
    """A pretrained causal LM; ``options`` are more of ``from_pretrained``. ``UserError`` where there is none."""
    try:
        return from_pretrained(AutoModelForCausalLM, name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"decoder: '{name}' cannot be loaded: {first_line(error)}; check the name or folder") from error


def load_tokenizer(name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """A pretrained tokenizer, made with further ``options``; ``UserError`` where there is none."""
    check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        tokenizer("a")  # some settings of the wrong type are only met here
        return tokenizer
    except Exception as error:
        raise UserError(
            f"tokenizer: '{name}' cannot be loaded: {first_line(error)}; check the name or folder"
        ) from error


def read_template(template: str) -> str:
    """A chat template given as text or as the path of a file."""
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise UserError(f"chat_template: no such file '{template}'; give a file or the template's text")
    return path.read_text(encoding="utf-8")


def load_composed(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
) -> ComposedVLM:
    """A model that :meth:`ComposedVLM.save_pretrained` wrote with its vision encoder.

    Args:
        folder: holds ``vlm_distill.json``.
        dtype: ``None``: as saved.
        attn_implementation: as in :class:`ComposedSettings`.
        tokenizer: instead of the saved one.

    Raises:
        UserError: another format, settings that would fetch or open anything else, weights that are not this model's.
    """
    folder = Path(folder)
    check_attention(attn_implementation)
    config = _read_composed(folder / CONFIG_NAME)
    try:
        weights = {} if weightless() else load_file(folder / WEIGHTS_NAME)
    except Exception as error:
        raise UserError(f"model: '{folder}' cannot be read: {first_line(error)}; is the copy complete?") from error
    tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    decoder = _new_decoder(config["decoder"], tokenizer, attention)
    decoder.generation_config.eos_token_id = config["end_tokens"]
    model = _assemble(decoder, tokenizer, config["vision_encoder"], config["projector"], attn_implementation)
    cast_parameters(model, as_dtype(config["dtype"]))
    if not weightless():
        _fill(model, weights, str(folder))
    cast_parameters(model, as_dtype(dtype))
    return model


#: The keys of ``vlm_distill.json`` and the types of their values.
_KEYS: dict[str, type] = {
    "format": int,
    "dtype": str,
    "vision_encoder": dict,
    "projector": dict,
    "decoder": dict,
    "end_tokens": list,
}


def _read_composed(path: Path) -> dict[str, Any]:
    """Return a saved model's settings, of which none names a place outside its folder.

    Raises:
        UserError: another format, a key or value of another kind, or weights that would come from elsewhere.
    """
    config = read_object(path)
    if config.get("format") != FORMAT:
        raise UserError(f"model: {path} has format {config.get('format')}, this version reads {FORMAT}; upgrade")
    check_keys(f"model: {path}", config, _KEYS)
    for key, kind in _KEYS.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"model: {path}: {key} is missing or no {kind.__name__}; is the copy complete?")
    if not all(isinstance(token, int) for token in config["end_tokens"]):
        raise UserError(f"model: {path}: end_tokens must be token ids")
    where = f"model: {path}: vision_encoder"
    check_keys(where, config["vision_encoder"], [field.name for field in fields(VisionEncoderSettings)])
    encoder = config["vision_encoder"] = config["vision_encoder"] | {"pretrained": False}
    source, own = encoder.get("source"), encoder.get("config")
    if source == "timm":
        if not isinstance(encoder.get("name"), str) or is_place(encoder["name"]):
            raise UserError(f"{where}.name is {encoder.get('name')!r}; it must be an architecture of timm")
        check_timm_options(own or {}, f"{where}.config")
    elif source == "open_clip":
        check_open_clip_config(own, f"{where}.config")
    elif not isinstance(own, dict):
        raise UserError(f"{where}.config is missing or no object; is the copy complete?")
    else:
        check_settings(own, f"{where}.config")
    check_settings(config["decoder"], f"model: {path}: decoder")
    if not isinstance(config["decoder"].get("model_type"), str):
        raise UserError(f"model: {path}: decoder.model_type is missing or no string; is the copy complete?")
    return config


def _fill(model: ComposedVLM, weights: dict[str, Tensor], name: str) -> None:
    """Put a file's weights into the model, all of them and no others."""
    wanted = model.state_dict()
    mismatched = tuple(
        (key, tuple(weights[key].shape), tuple(wanted[key].shape))
        for key in sorted(weights.keys() & wanted.keys())
        if weights[key].shape != wanted[key].shape
    )
    missing = frozenset(wanted.keys() - weights.keys() - tied_names(model))
    report = Report(missing, frozenset(weights.keys() - wanted.keys()), mismatched)
    check_report(name, report)
    check_shapes(name, report)
    model.load_state_dict(weights, strict=False)
    check_finite(name, model)
