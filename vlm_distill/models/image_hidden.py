"""Run a model at the positions of a micro-batch: those that predict answers, and image tokens if a loss reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.batch import ModelBatch, ModelInputs
from vlm_distill.losses import IMAGE_HIDDEN

from .decoder_features import IMAGES, VISION_FEATURES
from .interface import Outputs


def run_at_positions(
    run: Callable[..., Any], inputs: ModelInputs, side: ModelBatch, features: Sequence[str] = ()
) -> Outputs:
    """Return a model's outputs at ``side.positions``.

    Args:
        run: calls the model: its forward, or that of the engine that shards it.
        inputs: of the model, on its device.
        side: the model's side of the micro-batch.
        features: as in ``VisionLanguageModel.forward``, and ``image_hidden``: the last hidden states ``[T, H]`` at
            ``side.image_positions``, from the same forward.
    """
    if IMAGE_HIDDEN not in features:
        return run(inputs, side.positions, features)
    others = [name for name in features if name != IMAGE_HIDDEN]
    outputs: Outputs = run(inputs, torch.cat([side.positions, side.image_positions]), others)
    count = len(side.positions)
    found = {IMAGE_HIDDEN: outputs.hidden[count:]}
    for name, feature in outputs.features.items():
        found[name] = feature if name in (*IMAGES, VISION_FEATURES) else feature[:count]
    return Outputs(outputs.hidden[:count], found)
