"""Find out by trial whether a model keeps samples that share a row apart.

Transformers builds the attention mask of a packed row from its restarting ``position_ids``. Some classes silently do
not, so each model is tried before it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data.batch import Encoded
from data.conversation import Conversation
from data.errors import BadSample

from .interface import VisionLanguageModel
from .packed_rows import is_by_token
from .processor import Processor
from .weightless import weightless


@torch.no_grad()
def keeps_samples_apart(model: VisionLanguageModel) -> bool:
    """Find out whether samples that share a row see nothing of each other.

    Two rows hold the same samples in the middle; the samples around them are pictures in one row and as many tokens of
    text in the other. The hidden states in the middle must not differ. They do if layers carry a state or a convolution
    from one sample into the next, or if masks confuse positions in the row with positions in the sample. Without
    weights the answer is taken to be yes.
    """
    samples = _trial(model.processor)
    if samples is None or weightless():
        return samples is not None
    picture, text, *middle = samples
    rows = [model.processor.join([edge, *middle, edge]) for edge in (picture, text)]
    # WithoutAdapters has no parameters of its own.
    device, training = next(model.body.parameters()).device, model.training
    length, first = len(rows[0].input_ids), len(picture.input_ids)
    positions = torch.arange(first, length - first)
    batches = [([row], positions) for row in rows]
    if not model.processor.one_row:
        batches = [(rows, torch.cat([positions, length + positions]))]
    model.eval()
    try:
        # FlashAttention takes 16 bits only.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = [
                model(model.processor.collate(batch).to(device, model.dtype), where.to(device)).hidden
                for batch, where in batches
            ]
        one, two = torch.cat(found).float().chunk(2)
    finally:
        model.train(training)
    return bool((one - two).abs().max() <= 1e-4 * one.abs().max())


def _trial(processor: Processor) -> list[Encoded] | None:
    """Return two samples of one length, the first with an image if the model takes any, and the samples between."""
    if not processor.has_vision:
        rows = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [4, 5, 6, 7]])
        nothing = torch.zeros(4, dtype=torch.bool)
        return [Encoded(row, nothing, nothing) for row in rows]
    image, word = {"type": "image"}, {"type": "text", "text": "a"}
    try:
        picture, text = (
            processor.encode(
                Conversation(({"role": "user", "content": content}, {"role": "assistant", "content": [word]})),
                images,
            )
            for content, images in (([image, word], [_picture()]), ([word], []))
        )
    except BadSample:  # it takes no conversation without an image, or none at all
        return None
    return [picture, _repeated(text, len(picture.input_ids)), picture, text]


def _picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def _repeated(sample: Encoded, length: int) -> Encoded:
    """Repeat a sample's tokens up to ``length``."""

    def grown(tensor: Tensor) -> Tensor:
        times = -(-length // tensor.shape[-1])
        return torch.cat([tensor] * times, -1)[..., :length]

    tensors = {name: grown(x) if is_by_token(sample, name) else x for name, x in sample.tensors.items()}
    return Encoded(grown(sample.input_ids), grown(sample.supervised), grown(sample.ends), 0, tensors)
