"""Add a model to VLMEvalKit's list, so that its ``run.py`` knows it by name.

PyPI has VLMEvalKit as ``ms-vlmeval`` and ``nvidia-vlmeval``; ``docs/evaluation.md`` shows how to start a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from data.errors import UserError
from vlm_distill.evaluation.benchmark_lookup import get_benchmark
from vlm_distill.models import load_vlm

from .harness_prompts import answers, prompt


def register(name: str, folder: str, max_new_tokens: int | None = None) -> None:
    """Add a model to ``vlmeval.config.supported_VLM``.

    Args:
        name: its name for ``--model``.
        folder: folder or name of the model.
        max_new_tokens: the longest answer; by default the benchmark's, as in ``vlm-distill eval``, or 512.
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
            length = max_new_tokens or answer_length(dataset)
            return answers(self.model, [prompt(parts)], batch_size=1, max_new_tokens=length)[0]

    supported_VLM[name] = partial(VLMDistill, model_path=folder)


def answer_length(dataset: str | None) -> int:
    """Return the longest answer to one of VLMEvalKit's data sets, in tokens; 512 for data sets unknown here."""
    try:
        return get_benchmark(dataset or "").length_for("vlmevalkit")
    except UserError:
        return 512
