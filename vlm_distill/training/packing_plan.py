"""Whether conversations share rows: if the configuration asks for it and the models can keep them apart."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_distill.config.sections import DataSection
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.packing_trial import keeps_samples_apart

#: ``data.length_window`` if packing is asked for and a model's rows must be padded instead.
WINDOW = 16


@dataclass(frozen=True)
class Packing:
    """How rows are filled.

    Attributes:
        packed: whether conversations share rows, for the student and for the teacher.
        window: batches within which samples are grouped by length.
        remarks: for a person.
    """

    packed: tuple[bool, bool]
    window: int
    remarks: tuple[str, ...] = ()


def plan_packing(data: DataSection, student: VisionLanguageModel, teacher: VisionLanguageModel | None) -> Packing:
    """Pack the rows of each model that keeps packed samples apart; group samples by length if one does not."""
    if not data.packing:
        return Packing((False, False), data.length_window)
    models = {"student": student, "teacher": teacher}
    packed = {role: model is not None and keeps_samples_apart(model) for role, model in models.items()}
    padded = [role for role, model in models.items() if model is not None and not packed[role]]
    window = data.length_window or (WINDOW if padded else 0)
    remarks = [
        f"data.packing: the {role} does not keep samples in one row apart; its rows are padded, "
        f"and samples are grouped by length within {window} batches"
        for role in padded
    ]
    return Packing((packed["student"], packed["teacher"]), window, tuple(remarks))
