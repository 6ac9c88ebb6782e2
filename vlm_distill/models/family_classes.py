"""Classes for families that need code of their own, and the choice of class for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.batch import Encoded, ModelInputs
from data.conversation import Conversation, is_answer, message_text
from data.errors import BadSample, UserError

from .families import family
from .pretrained import PretrainedVLM
from .pretrained_processor import PretrainedProcessor
from .processor_calls import ProcessedSample, RenderedSample


class PaliGemmaProcessor(PretrainedProcessor):
    """PaliGemma 1 and 2: images, a question seen in both directions, and its answer, seen token by token.

    There is no chat. The answer is the processor's ``suffix``; as plain text it would be seen in both directions, too.
    """

    def rendered_sample(
        self, conversation: Conversation, images: Sequence[Image.Image], generation: bool
    ) -> RenderedSample:
        messages = conversation.messages
        self._check(conversation, len(images))
        prompt = messages if generation else messages[:-1]
        if any(message["role"] == "assistant" for message in prompt):
            raise BadSample("PaliGemma takes one question and its answer", f"{len(messages)} messages")
        meant = [key for message in messages for key in ("reasoning_content", "tool_calls") if message.get(key)]
        if meant or conversation.tools:
            raise BadSample("PaliGemma takes one question and its answer", f"no {(meant or ['tools'])[0]}")
        if not images:
            raise BadSample("PaliGemma needs an image", "there is none")
        if not generation and not is_answer(messages[-1]):
            raise BadSample("no supervised token", "the only answer is masked")
        text = self.placeholder * len(images) + "\n".join(message_text(message) for message in prompt)
        # Without an answer there is no such option: an empty one would be learned.
        options = {} if generation else {"suffix": [message_text(messages[-1])]}
        return RenderedSample(text, [], images, options)

    def answered(self, prompt: Encoded, ids: Sequence[int]) -> Encoded:
        row = super().answered(prompt, ids)
        row.tensors["token_type_ids"][:, len(prompt.input_ids) :] = 1
        return row

    def _with_answers(self, sample: RenderedSample, processed: ProcessedSample) -> Encoded:
        tensors = {name: tensor for name, tensor in processed.tensors.items() if name != "labels"}
        input_ids, offsets = torch.tensor(processed.ids), torch.tensor(processed.offsets)
        supervised = tensors["token_type_ids"][0] == 1
        # The last token is the end token that the processor appends to an answer.
        ends = supervised & (torch.arange(len(input_ids)) == len(input_ids) - 1)
        # Piece 1 is the first answer's text; see `data.conversation.answer_pieces`.
        spans = torch.nn.functional.pad(offsets[supervised], (1, 0), value=1)
        return Encoded(input_ids, supervised, ends, len(sample.images), tensors, spans)


class InternVLImages(PretrainedProcessor):
    """Any InternVL, converted or not: several images share the tiles of a single one, as in its training."""

    def _all_encoded(self, samples: Sequence[RenderedSample]) -> list[Encoded | BadSample]:
        return super()._all_encoded([self._with_tiles(sample) for sample in samples])

    def _with_tiles(self, sample: RenderedSample) -> RenderedSample:
        if len(sample.images) < 2:
            return sample
        cut = self.processor.image_processor
        tiles = max(cut.min_patches, cut.max_patches // len(sample.images))
        return replace(sample, options={**sample.options, "max_patches": tiles})


class Phi4MultimodalVLM(PretrainedVLM):
    """Phi-4-multimodal: a causal LM to Transformers, with the vision encoder inside its embedding layer."""

    def __init__(self, model: Any, processor: PretrainedProcessor) -> None:
        super().__init__(model, processor)
        # Transformers 5.23 marks this attention as causal, which sdpa obeys if no tile of a batch has padding: an
        # image's features would depend on the other images.
        for module in self.parts["vision_encoder"].modules():
            if hasattr(module, "is_causal"):
                setattr(module, "is_causal", False)  # noqa: B010

    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        if "image_pixel_values" not in inputs:
            return super().vision_positions(inputs)
        # Tiles that only pad a batch run, too; line ends are added before the projector.
        tokens = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        return {"vision_encoder": self._patches(inputs["image_pixel_values"]), "projector": tokens}

    @property
    def parts(self) -> dict[str, nn.Module]:
        base = self.model.base_model
        images = base.embed_tokens_extend.image_embed
        tower = images.img_processor
        projector = [module for module in images.children() if module is not tower]
        separators = nn.ParameterList([images.global_img_feature_extensor, images.sub_img_feature_extensor])
        decoder = [module for module in base.children() if module is not base.embed_tokens_extend]
        return {
            "vision_encoder": tower,
            "projector": nn.ModuleList([*projector, separators]),
            "decoder": nn.ModuleList([*decoder, self.model.get_output_embeddings()]),
        }


#: Model types with a processor or a model class of their own.
PROCESSORS = {"internvl": InternVLImages, "paligemma": PaliGemmaProcessor}
MODELS = {"phi4_multimodal": Phi4MultimodalVLM}


def adapted(model: Any, processor: Any) -> PretrainedVLM:
    """Put a Transformers model and its processor behind the suite's interface."""
    wrapped = adapted_processor(model.config, processor, model)
    return MODELS.get(model.config.model_type, PretrainedVLM)(model, wrapped)


def adapted_processor(config: Any, processor: Any, model: Any = None) -> PretrainedProcessor:
    """Put a Transformers processor behind the suite's interface; without the model it cannot pack M-RoPE positions.

    Raises:
        UserError: the processor does not report where an image's tokens are, so that every sample would be refused.
    """
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found.append(getattr(config.vision_config, "image_token_id", None))
    image_token_id = next((token for token in found if token is not None), None)
    refusal = f"model: {type(processor).__name__} does not report how it expands images; choose a family that does"
    if image_token_id is None or not isinstance(getattr(processor, "image_token", None), str):
        raise UserError(refusal)
    wrapped = PROCESSORS.get(config.model_type, PretrainedProcessor)(processor, image_token_id, model)
    side = getattr(config.vision_config, "image_size", None)
    wrapped.largest_image = side if isinstance(side, int) else None
    try:
        dummy = wrapped.dummy()
    except BadSample as bad:
        raise UserError(f"{refusal} ({bad.reason}: {bad.detail})") from bad
    # A LLaVA with Pixtral's encoder, which keeps an image's shape, receives its size.
    if family(config.model_type).equal_tiles and "image_sizes" not in dummy.tensors:
        tiles = dummy.tensors["pixel_values"].shape[:-3].numel()
        wrapped.tile_tokens = int(wrapped.image_tokens(dummy).sum()) // tiles
    return wrapped
