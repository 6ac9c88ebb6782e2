"""A model of this suite inside other harnesses, which then ask and score by their own code.

lmms-eval finds it by itself where both are installed (entry point ``lmms_eval.models``):

    python -m lmms_eval --model vlm_distill --model_args pretrained=FOLDER --tasks mmstar --batch_size 16

VLMEvalKit has a list of models in its own files, to which ``vlmevalkit.register`` adds one.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval is told: the name ``vlm_distill`` and the class behind it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlm_distill", simple_class_path=f"{__name__}.lmms_eval.VLMDistill")
