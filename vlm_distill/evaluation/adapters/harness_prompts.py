"""Answer the questions that other harnesses put, in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from data.conversation import Conversation
from data.images import load_image
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.processor import Prompt


def prompt(parts: Sequence[str | Image.Image]) -> Prompt:
    """Return texts and images, in their order, as one user message; images are decoded as the harnesses do."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    images = tuple(load_image(part, alpha="drop") for part in parts if isinstance(part, Image.Image))
    return Conversation(({"role": "user", "content": content},), images), images


def answers(
    model: VisionLanguageModel, prompts: Sequence[Prompt], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Return greedy answers, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][0].question), i))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        told = model.generate([prompts[i] for i in batch], max_new_tokens=max_new_tokens)
        for i, answer in zip(batch, told, strict=True):
            found[i] = answer.text
    return found
