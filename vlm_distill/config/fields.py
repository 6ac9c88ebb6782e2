"""What every section is made of: its base class, and the types of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

DType = Literal["fp32", "bf16"]
Measure = Literal["exact", "rouge_l", "perplexity", "kl"]
#: Whose conventions benchmarks are scored by.
Rules = Literal["vlmevalkit", "lmms-eval", "official"]
TrackerName = Literal["wandb", "mlflow", "trackio"]
Part = Literal["vision_encoder", "projector", "decoder"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
#: Keys of a section, each with the keys that it excludes.
Replaces = Mapping[str, tuple[str, ...]]


def _accepts_truth(annotation: Any) -> bool:
    """Return whether a field of this type accepts true and false, which pydantic would otherwise read as 1 and 0."""
    return annotation in (bool, Any) or any(_accepts_truth(part) for part in get_args(annotation))


class Section(BaseModel):
    """A section of a configuration, or the whole of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Mutually exclusive keys: when a later layer (an override, a file with a ``base``) sets the key on the left, it
    #: removes those on the right from the layers below. Within one layer they are refused.
    replaces: ClassVar[Replaces] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _means_something(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse empty text, a leading ``~`` (nothing expands it), and ``true`` in place of a number."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise ValueError("is empty; give a value, or leave the key out")
            if isinstance(text, str) and text.startswith("~/"):
                raise ValueError("~ is not expanded; write ${oc.env:HOME} or the whole path")
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _accepts_truth(field.annotation):
            raise ValueError("give a value other than true or false")
        return value
