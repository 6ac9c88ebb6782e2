"""Run a model at the positions of a micro-batch: those that predict answers, and image and text tokens for losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.batch import ModelBatch, ModelInputs
from vlm_distill.losses import IMAGE_HIDDEN, TEXT_HIDDEN, TEXT_SAMPLES, AttentionFeature

from .attention_to_images import attention_to_images, recording
from .decoder_features import IMAGES, VISION_FEATURES, attention_layers
from .interface import Outputs, VisionLanguageModel


def run_at_positions(
    model: VisionLanguageModel,
    inputs: ModelInputs,
    side: ModelBatch,
    features: Sequence[str] = (),
    run: Callable[..., Any] | None = None,
) -> Outputs:
    """Return a model's outputs at ``side.positions``.

    Args:
        model: to run.
        inputs: of the model, on its device.
        side: the model's side of the micro-batch.
        features: as in ``VisionLanguageModel.forward``, and from the same forward

            - ``image_hidden``: ``[T, H]``, the last hidden states at ``side.image_positions``.
            - ``text_hidden:all``, ``text_samples:all`` (or ``:answers``): ``[M, H]``, these states at the text tokens
              of samples with images; int64 ``[M]``, the sample that each is of.
            - an ``AttentionFeature``'s name: what :func:`.attention_to_images` returns.
        run: calls the model in place of its forward, such as the engine that shards it.
    """
    attention = [feature for name in features if (feature := AttentionFeature.parse(name)) is not None]
    others = [name for name in features if AttentionFeature.parse(name) is None]
    if not attention:
        return _run_at_tokens(run or model, inputs, side, others)
    layers = {feature: attention_layers(model.body, feature) for feature in attention}
    with recording(model.body, [module for modules in layers.values() for module in modules]) as seen:
        outputs = _run_at_tokens(run or model, inputs, side, others)
    for feature, modules in layers.items():
        outputs.features[feature.name] = attention_to_images(feature, [seen[id(m)] for m in modules], inputs, side)
    return outputs


def _run_at_tokens(run: Callable[..., Any], inputs: ModelInputs, side: ModelBatch, features: Sequence[str]) -> Outputs:
    """Return a model's outputs at ``side.positions``, and its last hidden states at further tokens."""
    # Where hidden states are read, by the features' names.
    wanted: dict[str, Tensor] = {IMAGE_HIDDEN: side.image_positions} if IMAGE_HIDDEN in features else {}
    samples: dict[str, Tensor] = {}
    for name in features:
        kind, _, which = name.partition(":")
        if kind == TEXT_HIDDEN:
            wanted[name], samples[f"{TEXT_SAMPLES}:{which}"] = _text_tokens(side, which)
    others = [name for name in features if name not in wanted | samples]
    if not wanted:
        return run(inputs, side.positions, others)

    outputs: Outputs = run(inputs, torch.cat([side.positions, *wanted.values()]), others)
    count = len(side.positions)
    found = dict(samples)
    for name, feature in outputs.features.items():
        found[name] = feature if name in (*IMAGES, VISION_FEATURES) else feature[:count]
    hidden = outputs.hidden.split([count, *map(len, wanted.values())])
    return Outputs(hidden[0], found | dict(zip(wanted, hidden[1:], strict=True)))


def _text_tokens(side: ModelBatch, which: str) -> tuple[Tensor, Tensor]:
    """Return positions ``[M]`` of text tokens of samples with images, and the numbers of their samples, ascending.

    Args:
        side: a model's side of a micro-batch.
        which: ``all`` tokens but those of images, or the positions that predict ``answers``.
    """
    positions, samples = [side.positions[:0]], [side.positions[:0]]
    for number, images in enumerate(side.image_counts.tolist()):
        if images:
            found = side.tokens_of(number, which)
            if which == "all":
                found = found[~torch.isin(found, side.image_positions)]
            positions.append(found)
            samples.append(torch.full_like(found, number))
    return torch.cat(positions), torch.cat(samples)
