"""PretrainedVLM: Transformers' vision-language models behind the suite's interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data.batch import Encoded, ModelInputs
from data.errors import UserError

from .adapters import plain_state
from .common import checkpoint_layers, generation_ends, with_cache
from .decoder_features import IMAGES, VISION_FEATURES, decoder_features, decoder_width, wanted_states
from .families import LINE_END, PROJECTORS_BESIDE, PROJECTORS_INSIDE, family
from .interface import Outputs, VisionLanguageModel
from .lm_head import lm_head
from .packed_rows import wants_one_row
from .pretrained_processor import PretrainedProcessor
from .processor import template_ends
from .sequence_parallel import at_positions


@dataclass
class _Seen(BaseModelOutputWithPooling):
    deepstack_features: list[Any] | None = None


class PretrainedVLM(VisionLanguageModel):
    """An image-text-to-text model of Transformers.

    Args:
        model: from ``AutoModelForImageTextToText``.
        processor: this model's processor.
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
        # Modules outside the parts, such as audio towers, are not trained.
        used = {id(parameter) for part in self.parts.values() for parameter in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Views of the model's own modules."""
        base, tower = self.model.base_model, self.model.get_encoder(modality="image")
        inside = [name for name in PROJECTORS_INSIDE if hasattr(tower, name)]
        beside = [getattr(base, name) for name in PROJECTORS_BESIDE if hasattr(base, name)]
        if inside:
            beside = [getattr(tower, name) for name in inside]
            tower = nn.ModuleList([module for name, module in tower.named_children() if name not in inside])
        if hasattr(base, LINE_END):
            beside.append(nn.ParameterList([getattr(base, LINE_END)]))
        decoder = nn.ModuleList([self.model.get_decoder(), self.model.get_output_embeddings()])
        projector = beside[0] if len(beside) == 1 else nn.ModuleList(beside)
        return {"vision_encoder": tower} | ({"projector": projector} if beside else {}) | {"decoder": decoder}

    @property
    def end_tokens(self) -> set[int]:
        return super().end_tokens | self._ends | generation_ends(self.model)

    @property
    def body(self) -> nn.Module:
        return self.model.get_decoder()

    @property
    def decodes_plainly(self) -> bool:
        return super().decodes_plainly and not family(self.model.config.model_type).needs

    def forward(
        self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = (), *, cache: Cache | None = None
    ) -> Outputs:
        # The base model, not its decoder: some models also feed vision features into deeper layers.
        base, body = self.model.base_model, self.body
        given: dict[str, Any] = dict(inputs)
        needed = family(self.model.config.model_type).needs
        if needed and needed not in given:
            raise UserError(f"{self.model.config.model_type}: its processor gives no {needed}; load one that does")
        found: dict[str, Tensor] = {}
        if "vision_features" in given:
            given["mm_encoder_outputs"] = {"image": self._seen(given.pop("vision_features"))}
        if any(name in (*IMAGES, VISION_FEATURES) for name in features) and "pixel_values" in inputs:
            # The tower runs here, once, and the model continues from its output.
            seen = base.get_image_features(**self._image_inputs(inputs), return_dict=True)
            given = {k: v for k, v in given.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": seen}}
            found = self._image_features(seen, features)
        if "mm_encoder_outputs" in given and "pixel_values_videos" in given:
            # Beside outputs of the encoder, the model takes no pixels.
            asked = signature(base.get_video_features).parameters
            videos = {name: tensor for name, tensor in inputs.items() if name in asked}
            given["mm_encoder_outputs"]["video"] = base.get_video_features(**videos, return_dict=True)
            del given["pixel_values_videos"]
        states = wanted_states(features, body)
        if states:
            given["output_hidden_states"] = states
        output = base(**given, **with_cache(base, cache))
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
        # Grids and sizes are inputs if images are cut into tiles or keep their shape.
        various = {"image_grid_thw", "image_sizes"} & set(asked) & set(dummy.tensors)
        # Families that cut tiles do so by an image's shape.
        wide = self.processor.image_row([Image.new("RGB", (256, 64))])
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
        if hasattr(self.model.base_model, LINE_END) and inputs["pixel_values"].dim() == 5:
            # Padding rows are cut from the projector's output, line ends are added. Tiles of zeros pad the batch and
            # never run; the first line of a normalised image is never all zeros.
            tiles = inputs["pixel_values"].flatten(0, 1)
            run = int(tiles[:, :, 0].flatten(1).any(-1).sum())
            return dict.fromkeys(("vision_encoder", "projector"), run * self._patches(tiles[:1]))
        tokens = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        if self.processor.takes_videos:
            tokens += int((inputs["input_ids"] == self.processor.processor.video_token_id).sum())
        return {"vision_encoder": tokens * self._joined, "projector": tokens}

    @cached_property
    def _joined(self) -> float:
        """Patches an image token. Counting pixels would count padding, too, which towers leave out."""
        dummy = self.processor.dummy()
        return self._patches(dummy.tensors["pixel_values"]) / max(1, int(self.processor.image_tokens(dummy).sum()))

    def _patches(self, pixels: Tensor) -> float:
        """Return the number of patches in pixels; 0 if the first layer takes no patches (convolutional towers)."""
        kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
        first: Any = next((m for m in self.parts["vision_encoder"].modules() if isinstance(m, kinds)), None)
        # A patch has as many values as one row of that layer multiplies.
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
    def image_parts(self) -> dict[str, nn.Module]:
        if not self._takes_features:
            raise UserError(f"{self.model.config.model_type} takes no features in place of images")
        return {name: part for name, part in self.parts.items() if name != "decoder"}

    @property
    def vision_settings(self) -> dict[str, Any]:
        config = self.model.config.to_dict()
        here = ("text_config", "dtype", "transformers_version", "_name_or_path", "architectures")
        images = self.processor.processor.image_processor.to_dict()
        return {**{name: value for name, value in config.items() if name not in here}, "image_processor": images}

    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        # One by one: beside other images some families pad an image or its tiles.
        return [self._flat(self._look(row)) for row in rows]

    def _look(self, row: Encoded) -> Any:
        parameter = next(next(iter(self.image_parts.values())).parameters())
        inputs = self._image_inputs(self.processor.collate([row]).to(parameter.device, parameter.dtype))
        return self.model.base_model.get_image_features(**inputs, return_dict=True)

    def _flat(self, seen: Any) -> Tensor:
        """Flatten the output of ``get_image_features`` to ``[tokens, C]``: the decoder's input, then deeper layers'."""
        found = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
        columns = []
        for part in found:
            tensors = [part] if isinstance(part, Tensor) else part
            columns.append(torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]))
        return torch.cat(columns, -1)

    def _seen(self, features: Tensor) -> Any:
        """Reverse :meth:`_flat`."""
        if self._listed is None:
            # Whether a family returns a list or a tensor is documented nowhere.
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
        """Return which of the tower's hidden states the projector reads; none if it reads the final output."""
        layers = getattr(self.model.config, "vision_feature_layer", None)
        if layers is None:
            return []
        return list(layers) if isinstance(layers, list | tuple) else [layers]

    def _image_features(self, seen: Any, features: Sequence[str]) -> dict[str, Tensor]:
        """Return the image features by name from the output of ``get_image_features``."""
        found: dict[str, Tensor] = {}
        if VISION_FEATURES in features:
            found[VISION_FEATURES] = self._flat(seen)
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
        # ZeRO-3 gathers parameters inside a forward; Transformers encodes images, with this one, before the first.
        line_end = getattr(self.model.base_model, LINE_END, None)
        with self.head.gather([] if line_end is None else [line_end]):
            return self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    def checkpoint_activations(self) -> None:
        checkpoint_layers(self.model)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        state = plain_state(self, state)
        self.model.save_pretrained(folder, state_dict={k.removeprefix("model."): v for k, v in state.items()})
        self.processor.save_pretrained(folder)
