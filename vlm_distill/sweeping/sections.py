"""The keys of a sweep's file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from vlm_distill.config.fields import Section

#: Dotted keys of a run's configuration and their values; ``config`` in a setting names another file.
Overrides = dict[str, Any]
#: The values of a key, or settings by name, each with its overrides.
Axis = Annotated[list[Any], Field(min_length=1)] | Annotated[dict[str, Overrides], Field(min_length=1)]


class LimitSection(Section):
    """A smaller sweep, for `--limit NAME`."""

    axes: dict[str, Axis] = Field(
        {}, description="Per axis: a list chooses among its settings or values, a mapping replaces it."
    )
    overrides: Overrides = Field({}, description="Overrides of every run, after all others.")
    output: str | None = Field(None, description="Folder of the runs; by default `OUTPUT-NAME`.")


class SweepSection(Section):
    """A sweep: a base configuration, axes, and a folder."""

    config: str = Field(description="Configuration of every run, relative to this file.")
    output: str = Field(description="Folder of the runs: `OUTPUT/SETTING/seedN`.")
    overrides: Overrides = Field({}, description="Overrides of every run, as `section.key: value`.")
    axes: dict[str, Axis] = Field(
        min_length=1,
        description="What differs: `section.key: [values]`, or `name: {setting: {section.key: value}}`, where a "
        "setting may also name its own `config`. A later axis overrides an earlier one.",
    )
    baseline: str | None = Field(
        None, description="Setting that the others are compared with; by default the first of the first axis."
    )
    first: list[str] = Field(
        [], description="Sweeps to run before this one, such as those that train its teachers; relative to this file."
    )
    limits: dict[str, LimitSection] = Field({}, description="Smaller sweeps by name, for `--limit`.")
