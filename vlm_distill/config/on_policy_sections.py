"""The section ``on_policy``: learning from the student's own answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .fields import AboveZero, AtLeastZero, Fraction, NotNegative, Positive, Section
from .model_sections import BlurSection, DownsampleSection


class VisualAdvantageSection(Section):
    """Weights of drawn answers by how much the teacher's probabilities of them rest on their images."""

    images: Literal["none"] | BlurSection | DownsampleSection = Field(
        "none", description="What the teacher sees instead: `none`, or worse images: `{blur: 8}`, `{downsample: 4}`."
    )
    temperature: AboveZero = Field(
        1.0, description="Temperature of the softmax over a step's answers; the larger, the more equal the weights."
    )


class ImportanceSection(Section):
    """Weights of drawn tokens by how much likelier the student finds them now than when it drew them."""

    clip: Annotated[float, Field(ge=1)] = Field(
        2.0, description="The largest weight; larger ratios are truncated to it."
    )
    over: Literal["token", "answer"] = Field(
        "token", description="What the ratio is of: the `token` alone, or the `answer` up to it."
    )


class AnswerServerSection(Section):
    """A vLLM server that draws the student's answers, by weights that follow the student in training."""

    url: str = Field(description="Base URL of the server's API, such as `http://host:8000/v1`.")
    model: str | None = Field(None, description="The student's name on the server; by default the student's path.")
    weights: Literal["folder", "nccl"] = Field(
        "folder", description="How weights get there: over a shared `folder`, or from GPU to GPU (`nccl`)."
    )
    folder: str | None = Field(
        None,
        description="Folder that the server sees under the same path, into which the student's weights are written.",
    )
    adapter: bool = Field(
        False, description="Send the LoRA adapter alone; the server keeps the student's base (`--enable-lora`)."
    )
    refresh: Positive = Field(1, description="Steps after which the server loads the student's weights again.")
    max_staleness: NotNegative | None = Field(
        None, description="Learn from no answer drawn by weights older than this many steps; by default from all."
    )
    workers: Positive = Field(64, description="Requests that a rank sends at once.")
    timeout: Positive = Field(300, description="Seconds that one request, or loading the weights, may take.")

    @model_validator(mode="after")
    def _fresh(self) -> AnswerServerSection:
        if self.max_staleness is not None and self.refresh > self.max_staleness + 1:
            raise ValueError(
                f"refresh: weights become {self.refresh - 1} steps old, more than max_staleness allows; set refresh to "
                f"at most {self.max_staleness + 1}"
            )
        return self

    @model_validator(mode="after")
    def _way(self) -> AnswerServerSection:
        if self.weights == "folder" and self.folder is None:
            raise ValueError("weights go over a folder that the server sees; name it as folder, or set weights to nccl")
        if self.weights == "nccl" and self.folder is not None:
            raise ValueError("folder: weights go from GPU to GPU with weights: nccl; leave one of the two out")
        if self.weights == "nccl" and self.adapter:
            raise ValueError("adapter: vLLM loads adapters from a folder; leave it or weights: nccl out")
        return self


class OnPolicySection(Section):
    """Steps that learn from the student's own answers."""

    fraction: Fraction = Field(description="Share of steps that learn from the student's own answers.")
    max_new_tokens: Positive = Field(256, description="Longest answer, in tokens.")
    temperature: AtLeastZero = Field(1.0, description="Temperature of drawing; 0 takes the likeliest token.")
    batch_size: Positive = Field(64, description="Answers drawn at once on a rank.")
    replay: Positive | None = Field(None, description="Number of latest answers that are kept and learnt from again.")
    adaptive: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Let the share grow by this much whenever the evaluation shows no progress."
    )
    pairs: bool = Field(
        False, description="Learn from the data's answer and the student's own to the same question in one step."
    )
    balance: Literal["even", "gradual"] = Field(
        "even",
        description="`gradual` moves weight from terms with `answers: data` to those with `answers: own` (DistiLLM-2).",
    )
    visual_advantage: VisualAdvantageSection | None = Field(
        None, description="Weigh the student's answers by how much the teacher needs their images (VA-OPD)."
    )
    importance: ImportanceSection | None = Field(
        None, description="Weigh the tokens of stale answers by truncated importance weights."
    )
    server: AnswerServerSection | None = Field(
        None, description="vLLM server that draws the answers; by default the student in training does."
    )
