"""Take a teacher's projector into a student: a small MLP behind it brings its output to the student's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.errors import UserError

from .common import check_keys
from .composed import ComposedVLM
from .interface import VisionLanguageModel
from .pretrained import PretrainedVLM
from .projectors import AdaptedProjector
from .weightless import needs_weights

WHERE = "student.projector"


def adapted_settings(teacher: VisionLanguageModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a projector that holds the teacher's.

    Args:
        teacher: whose projector is taken.
        given: the student's section: ``type: teacher``, and ``depth`` of the MLP.

    Raises:
        UserError: another key, or a teacher whose projector is not known here.
    """
    check_keys(WHERE, given, ("type", "depth"))
    settings, _ = _projector_of(teacher)
    body: Any = teacher.body
    width = body.config.hidden_size
    return {"type": "adapted", "inner": settings, "width": width, "depth": given.get("depth", 2)}


def take_projector(student: VisionLanguageModel, teacher: VisionLanguageModel) -> None:
    """Copy the teacher's projector into the student's, where it stays as it is.

    Raises:
        UserError: the student's vision encoder gives other features than the teacher's.
    """
    assert isinstance(student, ComposedVLM)
    assert isinstance(student.projector, AdaptedProjector)
    _, state = _projector_of(teacher)
    inner = student.projector.inner
    for name, tensor in inner.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            theirs = "none" if name not in state else "×".join(map(str, state[name].shape))
            raise UserError(
                f"{WHERE}: the teacher's projector has {name} of {theirs}, the student's vision encoder needs "
                f"{'×'.join(map(str, tensor.shape))}; give the student the teacher's vision encoder"
            )
    _copy(inner, state)
    student.projector.keep_inner = True


@needs_weights
def _copy(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})


def _projector_of(teacher: VisionLanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and weights of a teacher's projector, as ours would be built and named."""
    if isinstance(teacher, ComposedVLM) and teacher.projector is not None:
        if isinstance(teacher.projector, AdaptedProjector):
            raise UserError(f"{WHERE}: the teacher's projector holds its own teacher's; name a projector type")
        return {"type": "mlp"} | teacher.projector_settings, teacher.projector.state_dict()
    projector = (
        getattr(teacher.model.base_model, "multi_modal_projector", None) if isinstance(teacher, PretrainedVLM) else None
    )
    if projector is None or [name for name, _ in projector.named_children()] != ["linear_1", "act", "linear_2"]:
        raise UserError(
            f"{WHERE}: the projectors of models from parts and of LLaVA's kind can be taken, not this teacher's; name "
            "a projector type"
        )
    probe = torch.linspace(-3, 3, 7)  # GELU's approximations differ by more than rounding
    if projector.linear_1.bias is None or not torch.allclose(projector.act(probe), F.gelu(probe), atol=1e-6):
        raise UserError(f"{WHERE}: the teacher's projector is not an MLP with biases and GELU; name a projector type")
    state: dict[str, Tensor] = {}
    for ours, theirs in (("layers.0", projector.linear_1), ("layers.2", projector.linear_2)):
        state |= {f"{ours}.{name}": tensor for name, tensor in theirs.state_dict().items()}
    return {"type": "mlp", "depth": 2}, state
