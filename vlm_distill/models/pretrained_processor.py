"""The processors of Transformers' vision-language models behind the suite's interface."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data.attempts import attempt, checked, with_good
from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, count_images
from data.errors import BadSample, UserError

from .answer_spans import Span, find_answers
from .chat import held, plain_messages, rendered, special_ids, written_texts
from .common import booleans, integers
from .image_settings import with_image_settings
from .packed_rows import is_by_token, joined, row_positions
from .processor import Processor
from .processor_calls import ProcessedSample, RenderedSample, process_all
from .supervision import mark_tokens, token_spans
from .template_marks import PRIVATE
from .templates import apply_template
from .video_inputs import Video, blank_video, video_input, video_options, with_videos


class Expanded:
    """A rendered text with the images' placeholders replaced.

    Args:
        text: with the placeholders.
        replaced: for each image its placeholder (``text``), its position (``span``) and its ``replacement``.
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
        """Return an answer's span after the replacement; no answer contains an image."""
        return span.moved(sum(len(new) - (stop - start) for start, stop, new in self._replaced if stop <= span.start))


class PretrainedProcessor(Processor):
    """A Transformers processor that expands each image's placeholder and reports where.

    Args:
        processor: with its chat template and a fast tokenizer.
        image_token_id: the token that stands for images in the ids.
        model: computes M-RoPE positions, if it has any; its weights are not kept.
    """

    has_vision = True
    #: The longest side in pixels that the vision encoder has positions for; ``None``: unknown.
    largest_image: int | None = None
    #: Replaces :meth:`rendered_sample` where another model asks for the same texts.
    shared_rendering: Callable[..., RenderedSample] | None = None
    #: How many tokens every image or tile becomes; ``None``: images differ.
    tile_tokens: int | None = None

    def __init__(self, processor: Any, image_token_id: int, model: Any = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        #: The text for an image in a rendered conversation; Gemma 3 and Aya Vision use another token in the ids.
        self.placeholder = processor.image_token
        names = [processor.video_token] if getattr(processor, "video_token", None) else []
        self._reserved = [self.placeholder, self.tokenizer.convert_ids_to_tokens(image_token_id), *names]
        self._video_input = video_input(processor) if names else None
        self._special = special_ids(self.tokenizer)
        self._dummy: Encoded | None = None
        self._loaded: Any = None  # the processor before its image sizes were set, if they were
        self._rope = _rope_index(model)

    @property
    def _reads_videos(self) -> bool:
        return self.video_frames is not None and self._video_input is not None

    @property
    def takes_videos(self) -> bool:  # type: ignore[override]
        separate = self._video_input is not None and self._video_input.separate
        return self._reads_videos and separate and self.features is None

    @property
    def chat_template(self) -> Any:
        return self.processor.chat_template

    def set_chat_template(self, template: Any) -> None:
        self.processor = copy.copy(self.processor)
        self.processor.chat_template = template

    def recipe(self) -> tuple[Any, ...]:
        own = {
            name: value for name, value in vars(self.processor).items() if name not in self.processor.get_attributes()
        }
        return *super().recipe(), own, self.image_token_id, _rope_recipe(self._rope)

    def text_recipe(self) -> tuple[Any, ...]:
        return *super().text_recipe(), type(self.processor), self._reserved, self._video_input

    def image_recipe(self) -> tuple[Any, ...]:
        images = self.processor.image_processor
        videos = getattr(self.processor, "video_processor", None) if self._reads_videos else None
        return type(images), vars(images), type(videos), vars(videos) if videos else {}

    @property
    def image_function(self) -> Any:
        """What turns images into pixels."""
        return self.processor.image_processor

    def set_image_function(self, function: Any) -> None:
        self.processor = copy.copy(self.processor)
        self.processor.image_processor = function

    def set_image_sizes(self, settings: Mapping[str, Any], where: str) -> None:
        if not settings:
            return
        self._loaded = self.processor
        self.processor = with_image_settings(self.processor, settings, where, self.largest_image)
        self._dummy = None
        for size in ((64, 64), (1024, 768)):
            try:
                self.image_row([Image.new("RGB", size)])
            except BadSample as bad:
                raise UserError(f"{where}: the image processor fails on {size} pixels: {bad.detail}") from bad

    def as_loaded(self) -> Self:
        if self._loaded is None:
            return self
        other = copy.copy(self)
        other.processor, other._dummy = self._loaded, None
        return other

    def _render(
        self, messages: Sequence[dict[str, Any]], generation: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        return apply_template(self.processor, messages, tools, generation)

    def encode(self, conversation: Conversation, images: Sequence[Image.Image], *, generation: bool = False) -> Encoded:
        return self._encoded(self._rendered(conversation, images, generation))

    def encode_all(self, samples: Sequence[tuple[Conversation, Sequence[Image.Image]]]) -> list[Encoded | BadSample]:
        return with_good(self._all_encoded, [attempt(self._rendered, *sample) for sample in samples])

    def _rendered(
        self, conversation: Conversation, images: Sequence[Image.Image], generation: bool = False
    ) -> RenderedSample:
        render = self.shared_rendering or self.rendered_sample
        return render(conversation, images, generation)

    def rendered_sample(
        self, conversation: Conversation, images: Sequence[Image.Image], generation: bool
    ) -> RenderedSample:
        """Check and render a sample, and find its answers."""
        videos: list[Video] = []
        if self._reads_videos:
            conversation, images, videos = with_videos(conversation, images)
        messages = conversation.messages
        self._check(conversation, len(images) + len(videos))
        render = partial(self._render, tools=conversation.tools)
        spans: list[Span] = []
        if generation:
            text = rendered(render, plain_messages(messages, self.frame), True)
        else:
            text, spans = find_answers(render, messages, self.frame, self.learn_answer_prefix)
        if text.count(self.placeholder) != len(images):
            raise BadSample("images and placeholders differ in number", f"{text.count(self.placeholder)} placeholders")
        if videos and text.count(self.processor.video_token) != len(videos):
            raise BadSample("videos and placeholders differ in number", "the chat template shows no videos")
        options = {"add_special_tokens": self._lacks_start(text), **self._video_options(videos)}
        return RenderedSample(text, spans, images, options, videos)

    def _video_options(self, videos: Sequence[Video]) -> dict[str, Any]:
        if not videos:
            return {}
        assert self._video_input is not None
        return video_options(videos, self.video_frames if self._video_input.stacked else None)

    def adds_special_tokens(self, conversation: Conversation) -> bool:
        """Return whether the tokenizer adds its own tokens around this conversation, besides the template's."""
        render = partial(self._render, tools=conversation.tools)
        return self._lacks_start(rendered(render, plain_messages(conversation.messages, self.frame), False))

    def _lacks_start(self, text: str) -> bool:
        # No second start token, as in Transformers after its own templates.
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _check(self, conversation: Conversation, images: int) -> None:
        """Refuse texts that the processor would misunderstand, and another number of images and videos than parts."""
        texts = [text for message in conversation.messages for text in written_texts(message)]
        if conversation.tools:
            texts.append(json.dumps(conversation.tools, ensure_ascii=False))
        if held(PRIVATE, texts):
            raise BadSample("text holds a private-use character that marks images", "U+10FFF0 to U+10FFFD")
        if token := held(self._reserved, texts):
            raise BadSample("text holds one of the model's placeholders", token)
        # The processor tokenizes the rendered text as a whole and cannot tell this from the template's own.
        if token := held(self.frame.control, texts):
            raise BadSample("text holds a control token", token)
        if count_images(conversation.messages) != images:
            raise BadSample("images and image parts differ in number", f"{images} images")

    def _encoded(self, sample: RenderedSample) -> Encoded:
        return checked(self._all_encoded([sample])[0])

    def _all_encoded(self, samples: Sequence[RenderedSample]) -> list[Encoded | BadSample]:
        results = process_all(self.processor, samples)
        return [attempt(self._marked, *both) for both in zip(samples, results, strict=True)]

    def _marked(self, sample: RenderedSample, result: ProcessedSample | BadSample) -> Encoded:
        """Mark the answers in what the processor made of a sample.

        If features are given, ``vision_features`` takes the place of pixels; grids and sizes stay.
        """
        processed, images = checked(result), sample.images
        if len(processed.replaced) != len(images) + len(sample.videos):
            raise BadSample("image expansion not understood", f"{type(self.processor).__name__} does not report it")
        if sample.videos and self.features is not None:
            raise BadSample("video with cached features", "a cache holds images alone; leave student.vision_cache out")
        if images and self.features is not None:
            kept = {name: tensor for name, tensor in processed.tensors.items() if not name.startswith("pixel_")}
            processed = replace(processed, tensors={**kept, "vision_features": self.features(images)})
        return self._with_answers(sample, processed)

    def _with_answers(self, sample: RenderedSample, processed: ProcessedSample) -> Encoded:
        """Return the sample with its answers marked, whose spans are moved past the images' expansion."""
        ids, offsets = processed.ids, processed.offsets
        expanded = Expanded(sample.text, processed.replaced)
        moved = [expanded.span(span) for span in sample.spans]
        supervised, ends = mark_tokens(expanded.text, offsets, ids, moved, self._special)
        spans = token_spans(expanded.text, offsets, supervised, ends, moved)
        tensors = integers(ids), booleans(supervised), booleans(ends)
        separate = self._video_input is not None and self._video_input.separate
        videos = len(sample.videos) if separate else 0
        frames = 0 if separate else sum(len(video.frames) for video in sample.videos)
        return Encoded(*tensors, len(sample.images) + frames, processed.tensors, spans, videos)

    def blank(self) -> Image.Image:
        return Image.new("RGB", (64, 64))

    def image_row(self, images: Sequence[Image.Image]) -> Encoded:
        return self._encoded(RenderedSample(self.placeholder * len(images), [], images))

    def dummy(self) -> Encoded:
        if self._dummy is None or bool(self._dummy.videos) != self.takes_videos:
            self._dummy = self.image_row([self.blank()])
            if self.takes_videos:
                text = f"{self.placeholder}\n{self.processor.video_token}"
                videos = [blank_video(self.blank())]
                self._dummy = self._encoded(
                    RenderedSample(text, [], [self.blank()], self._video_options(videos), videos)
                )
        return self._dummy

    def with_features(self, features: Callable[[Sequence[Image.Image]], Tensor]) -> Self:
        other = super().with_features(features)
        other._dummy = None
        return other

    def collate(self, samples: Sequence[Encoded], *, padding_side: str = "right") -> ModelInputs:
        """Pad tensors of shape ``[1, L]`` to ``[B, L]``, and join all others along their first dimension.

        If these differ in a further dimension (tiles, height, width), they are padded there with zeros, as processors
        pad the images of one sample; masks and sizes among the inputs tell the model what is padding.
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

    def image_blocks(self, sample: Encoded) -> list[int]:
        if self.tile_tokens is not None:
            return [self.tile_tokens] * (int(self.image_tokens(sample).sum()) // self.tile_tokens)
        # Each image is a run of tokens, in Pixtral with breaks between its lines.
        within = self.image_tokens(sample)
        runs = within | (sample.input_ids == getattr(self.processor, "image_break_token_id", self.image_token_id))
        starts = runs & ~torch.cat([runs.new_zeros(1), runs[:-1]])
        blocks = (
            within.long().new_zeros(int(starts.sum())).index_add(0, starts.cumsum(0)[within] - 1, within[within].long())
        )
        if len(blocks) != sample.images:
            raise BadSample("images stand side by side", f"{len(blocks)} runs of tokens for {sample.images} images")
        return [int(tokens) for tokens in blocks]

    def save_pretrained(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)


#: What positions of images depend on, in a configuration and in its ``vision_config``.
_ROPE_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_ROPE_GRIDS = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second", "patch_size", "image_size")


def _rope_recipe(rope: Any) -> tuple[Any, ...]:
    """Return everything that decides what :func:`_rope_index` returns."""
    if rope is None:
        return ()
    config = rope.__self__.config
    tokens = [getattr(config, name, None) for name in _ROPE_TOKENS]
    grids = [getattr(config.vision_config, name, None) for name in _ROPE_GRIDS]
    return rope.__func__, tokens, grids


def _rope_index(model: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the method that computes M-RoPE positions, bound to an object that has only the configuration.

    It is sent to the processes that make batches, where the weights must not go.
    """
    base: Any = getattr(model, "base_model", None)
    if not hasattr(base, "get_rope_index"):
        return None
    kind: Any = type(base)
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    bare.config = base.config
    return bare.get_rope_index
