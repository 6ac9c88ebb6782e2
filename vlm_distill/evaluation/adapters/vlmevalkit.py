"""A model in VLMEvalKit's list, which its ``run.py`` then knows by name. (VLMEvalKit is not on a package index.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from vlm_distill.models import load_vlm

from .conversations import answers, prompt


def register(name: str, folder: str, max_new_tokens: int = 512) -> None:
    """Adds a model to ``vlmeval.config.supported_VLM``.

    Args:
        name: what ``--model`` calls it.
        folder: folder or name of the model.
        max_new_tokens: a bound on answers.
    """
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    class VLMDistill(BaseModel):
        INTERLEAVE = True

        def __init__(self, model_path: str, **ignored: Any) -> None:
            super().__init__()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = load_vlm(model_path, dtype="fp32" if device == "cpu" else None).to(device).eval()

        def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
            parts = [Image.open(part["value"]) if part["type"] == "image" else part["value"] for part in message]
            return answers(self.model, [prompt(parts)], batch_size=1, max_new_tokens=max_new_tokens)[0]

    supported_VLM[name] = partial(VLMDistill, model_path=folder)
