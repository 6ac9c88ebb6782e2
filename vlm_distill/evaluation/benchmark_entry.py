"""A benchmark's settings: its files, its prompt, the length of answers, and its scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from data.errors import UserError
from data.tables import Table
from vlm_distill.config.fields import Positive, Section
from vlm_distill.config.file import explain

from . import prompts
from .benchmark_layouts import HuggingFace, Layout, Official, SourceFile, Tsv, selected
from .benchmark_questions import BenchmarkQuestions, Groups, Wording
from .scoring.scorers import rules_of
from .scoring.scores import Rules

T = TypeVar("T")
Format = Literal["tsv", "huggingface", "official", "source"]


class Benchmark(Section):
    """One benchmark. Its layouts are tried in the order ``tsv``, ``huggingface``, ``official``, ``source``."""

    name: str = Field(description="Its name; capitals and `-` or `_` do not matter. By default that of the file.")
    aliases: tuple[str, ...] = Field((), description="Further names.")
    tsv: Tsv | None = Field(None, description="Its files as VLMEvalKit has them.")
    huggingface: HuggingFace | None = Field(None, description="Its files as lmms-eval has them.")
    official: Official | None = Field(None, description="Its files as their authors publish them.")
    source: SourceFile | None = Field(None, description="Its files in a format that training reads.")
    where: dict[str, str | list[str]] = Field(
        default={}, description="Which rows belong to it: by column, the value or values that they have."
    )
    prompt: str | dict[Rules, str] = Field(
        "question",
        description="How it asks: a name or a template with columns of the row, or one for each of the rules.",
    )
    interleave: tuple[Rules, ...] = Field(
        (), description="The rules under which images go where the text says `<image k>`."
    )
    max_new_tokens: Positive | dict[Rules, Positive] = Field(
        128, description="Longest answer, in tokens, or one for each of the rules."
    )
    scorer: str = Field(
        description="How answers are scored: a name in `scoring/scorers.py`, or `package.module:function` of your own."
    )
    scorer_options: dict[str, Any] = Field(default={}, description="Arguments of the scorer.")
    metric: str = Field("accuracy", description="The usual name of the main score.")
    out_of: Annotated[float, Field(gt=0)] = Field(100.0, description="The main score of a model that is always right.")
    worth: dict[Literal["question", "group"], Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="If the main score is a sum: what each scored `question`, or each `group`, adds to it. The scorer "
        "must take `partial`, which scores a part of the benchmark by its own total.",
    )
    groups: tuple[str, ...] = Field((), description="Columns by which scores are reported.")
    together: tuple[str, ...] = Field(
        (),
        description="Columns whose equal values mark questions that are scored together: a limit asks all of them or "
        "none, and if one has no answer, none is scored. The millions of `index` do not count, because they number "
        "circular copies; `index:4` means its first four parts, joined by `_`.",
    )
    least: Positive = Field(1, description="Questions in such a group; smaller groups are not scored.")

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, prompt: str | dict[Rules, str]) -> str | dict[Rules, str]:
        for text in [prompt] if isinstance(prompt, str) else prompt.values():
            prompts.check(text)
        return prompt

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, scorer: str) -> str:
        try:
            rules_of(scorer)
        except UserError as error:
            raise ValueError(str(error)) from None
        return scorer

    @model_validator(mode="after")
    def _has_files(self) -> Benchmark:
        if not self.layouts():
            raise ValueError(f"name its files: one or more of {', '.join(get_args(Format))}")
        return self

    def layouts(self) -> dict[Format, Tsv | HuggingFace | Official | SourceFile]:
        """Return its layouts, in the order in which they are tried."""
        found = {"tsv": self.tsv, "huggingface": self.huggingface, "official": self.official, "source": self.source}
        return {name: layout for name, layout in found.items() if layout is not None}  # type: ignore[misc]

    @property
    def dataset(self) -> str:
        """The name by which VLMEvalKit looks for predictions."""
        return self.tsv.name if self.tsv else self.name

    def prompt_for(self, rules: Rules) -> str:
        """Return the prompt under these rules."""
        return _by_rules(self.prompt, rules, "question")

    def length_for(self, rules: Rules) -> int:
        """Return the longest answer under these rules, in tokens."""
        return _by_rules(self.max_new_tokens, rules, 128)

    def questions(self, table: Table, layout: Layout, rules: Rules = "vlmevalkit") -> BenchmarkQuestions:
        """Return an open table's questions, put by the rules."""
        numbered = any(other.index_answers for other in self.layouts().values())
        return BenchmarkQuestions(
            self.name,
            selected(table, self.where),
            layout,
            Wording(self.prompt_for(rules), rules in self.interleave, rules, numbered and rules != "vlmevalkit"),
            Groups(self.together, self.least),
        )


def _by_rules(setting: T | dict[Rules, T], rules: Rules, default: T) -> T:
    """Return a setting under the rules, or if they leave it open, as official scorers mostly do, lmms-eval's."""
    if not isinstance(setting, dict):
        return setting
    order: tuple[Rules, ...] = (rules, "lmms-eval", "vlmevalkit", "official")
    return next((setting[name] for name in order if name in setting), default)


def load_benchmark(path: Path) -> Benchmark:
    """Return the benchmark in a YAML file with the fields of :class:`Benchmark`.

    Raises:
        UserError: the file is missing or invalid; names the wrong key and the nearest known one.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except Exception as error:  # impossible dates, tags, bytes that are not text, …
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a benchmark is a mapping with keys such as tsv, prompt and scorer")
    return read_benchmark({"name": path.stem, **content}, str(path))


def read_benchmark(content: Mapping[str, Any], where: str) -> Benchmark:
    """Return the benchmark of a mapping with the fields of :class:`Benchmark`.

    Raises:
        UserError: it is invalid; says where it is from.
    """
    try:
        return Benchmark.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Benchmark)}") from None
