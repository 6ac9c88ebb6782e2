"""Run this suite's models inside other harnesses, which ask and score with their own code.

lmms-eval finds them by itself if both are installed (entry point ``lmms_eval.models``):

    python -m lmms_eval --model vlm_distill --model_args pretrained=FOLDER --tasks mmstar --batch_size 16

VLMEvalKit keeps a list of models; ``vlmevalkit.register`` adds one to it.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """Return lmms-eval's manifest: the name ``vlm_distill`` and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlm_distill", simple_class_path=f"{__name__}.lmms_eval.VLMDistill")
