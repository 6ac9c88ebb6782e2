"""ComposedVLM: a vision encoder, a projector and a causal LM of Transformers, or the causal LM alone."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache

from data.batch import Encoded, ModelInputs
from data.errors import UserError

from .adapters import plain_state
from .common import (
    checkpoint_layers,
    generation_ends,
    tied_names,
    with_cache,
)
from .composed_processor import ComposedProcessor
from .decoder_features import IMAGES, VISION_FEATURES, decoder_features, decoder_width, wanted_states
from .interface import Outputs, VisionLanguageModel
from .lm_head import lm_head
from .packed_rows import wants_one_row
from .processor import template_ends
from .projectors import Projector
from .sequence_parallel import at_positions
from .vision_encoders import VisionEncoder
from .weightless import weightless

#: The file by which a folder is recognised as one of ours.
CONFIG_NAME = "vlm_distill.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT = 1


class ComposedVLM(VisionLanguageModel):
    """Vision encoder, projector and decoder put together; image features take the place of embeddings.

    Without a vision encoder it is a language model, saved as Transformers saves it.

    Args:
        decoder: any causal language model of Transformers.
        processor: this model's processor.
        vision_encoder, projector: both or neither.
        projector_settings: settings that build the projector again.
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

    def forward(
        self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = (), *, cache: Cache | None = None
    ) -> Outputs:
        # The base model, not the whole decoder, whose output layer must never run on every token.
        body = self.body
        embeddings, images = self._embed(inputs)
        states = wanted_states(features, body)
        options: dict[str, Any] = {"output_hidden_states": states} if states else {}
        options |= with_cache(body, cache)
        output = body(inputs_embeds=embeddings, **self._sequence(inputs), **options)
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
    def image_parts(self) -> dict[str, nn.Module]:
        if self.vision_encoder is None:
            raise UserError("a language model sees no images")
        return {"vision_encoder": self.vision_encoder}

    @property
    def vision_settings(self) -> dict[str, Any]:
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
        # Given if a teacher with the same encoder, or a cache, already has them.
        known = inputs.get("vision_features")
        features = self.vision_encoder(inputs["pixel_values"]) if known is None else known
        projected = self.projector(features)
        mask = inputs["image_mask"].unsqueeze(-1)
        embeddings = embeddings.masked_scatter(mask, projected.to(embeddings.dtype))
        return embeddings, {"vision": features, VISION_FEATURES: features, "projector": projected}

    def _sequence(self, inputs: ModelInputs) -> dict[str, Tensor]:
        names = ("attention_mask", "position_ids") if self._takes_positions else ("attention_mask",)
        return {name: inputs[name] for name in names if name in inputs}

    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        embeddings, _ = self._embed(inputs)
        return self.decoder.generate(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **settings)

    def use_tokenizer(self, tokenizer: Any, ends: set[int]) -> None:
        """Replace the tokenizer and its chat template.

        Embeddings and output layer are resized to its tokens. New rows are the mean of the old ones plus noise of a
        billionth of their covariance, as in Transformers. Rows keep their ids, whatever token each was for.

        Args:
            tokenizer: a copy is kept.
            ends: ids that end an answer from now on, besides the template's.
        """
        assert isinstance(self.processor, ComposedProcessor)
        tokenizer = copy.deepcopy(tokenizer)
        self.decoder.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1, mean_resizing=not weightless())
        for settings in (self.decoder.config.get_text_config(), self.decoder.generation_config):
            settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
            settings.eos_token_id = sorted(ends)
        learn_answer_prefix = self.processor.learn_answer_prefix
        self.processor = ComposedProcessor(tokenizer, self.processor.transform, self.processor.tokens)
        self.processor.learn_answer_prefix = learn_answer_prefix
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
