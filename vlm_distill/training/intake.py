"""How much of the data a run can use: its first samples, tried before the first step, and the share left out since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from data.batch import Problem
from data.errors import BadSample, UserError
from data.loader import problem_of
from vlm_distill.evaluation.left_out import commonest_reason, reasons

#: Samples that are tried before the first step, and that must be counted before ``data.max_bad`` can end a run.
FIRST_SAMPLES = 64
_MANY = 0.1
_KEYS = 8

# Remedies by the beginning of the reason.
_REMEDIES = {
    "image not found": "set images of the source to the folder that its image paths start from",
    "image outside the roots": "add the images' folder to data.roots",
    "image is a URL": "download the images, and name them by path",
    "model takes no images": "use models with a vision encoder, or data without images",
    "too long": "raise data.max_length, data.max_prompt or data.max_response",
    "no supervised token": "check the model's chat template, and set chat_template of that model if it is wrong",
    "chat template": "check the model's chat template, and set chat_template of that model if it is wrong",
    "misaligned": "give student and teacher the same chat_template and tokenizer",
    "image tokens differ": "choose an image size and projector that give both models as many tokens an image",
    "class the student does not have": "give the student the classes of the data (student.classes)",
}


@dataclass
class FirstSamples:
    """The result of trying a run's first samples.

    Attributes:
        tried: number of samples.
        problems: of samples that cannot be used.
        images: number of images in the others.
        apart: answer tokens without a counterpart in the teacher's.
        samples_apart: number of samples with such tokens.
        hint: where a user can look at every sample, to be added to the reasons.
        not_read: by source, the keys of its records that nothing reads, and how often each occurred.
    """

    tried: int = 0
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    apart: int = 0
    samples_apart: int = 0
    not_read: dict[str, Counter[str]] = field(default_factory=dict)
    hint: str = ""

    @property
    def usable(self) -> int:
        return self.tried - len(self.problems)

    def mistake(self) -> str | None:
        """Return why the run cannot begin, with a remedy; ``None`` if at least one sample can be used."""
        if not self.tried or self.usable:
            return None
        return f"data.train: none of the first {self.tried} samples can be used: {self._reasons()}"

    def warning(self) -> str | None:
        """Return a warning if many samples cannot be used."""
        if len(self.problems) <= _MANY * self.tried:
            return None
        return f"{len(self.problems)} of the first {self.tried} samples are left out: {self._reasons()}"

    def _reasons(self) -> str:
        """Return why samples cannot be used, and what to do about the commonest reason."""
        reason = commonest_reason(self.problems)
        remedy = next((text for start, text in _REMEDIES.items() if reason.startswith(start)), "fix the data")
        return f"{reasons(self.problems)}; {remedy}{self.hint}"

    def remarks(self) -> list[str]:
        """Return what else a person should know about the samples."""
        remarks = []
        if self.apart:
            remarks.append(
                f"{self.apart} tokens in {self.samples_apart} of the first {self.tried} samples are learned "
                "by cross-entropy alone: the two chat templates tokenize the edges of the answer differently"
            )
        for source, keys in self.not_read.items():
            listed = ", ".join(key for key, _ in keys.most_common(_KEYS))
            more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
            remarks.append(f"{source}: keys {listed}{more} of its records are ignored")
        return remarks


def try_samples(dataset: Any, start: int, stop: int) -> FirstSamples:
    """Encode the first samples of the steps ``start`` to ``stop - 1``, and return what came of it."""
    found, mixture = FirstSamples(), dataset.mixture
    samples = chain.from_iterable(mixture.samples_of(step) for step in range(start, stop))
    for source, row in islice(samples, min(FIRST_SAMPLES, mixture.epoch_samples)):
        found.tried += 1
        try:
            images, apart = dataset.try_sample((source, row))
        except BadSample as bad:
            found.problems.append(problem_of(mixture.sources[source], row, bad, "skip"))
            continue
        found.images += images
        found.apart += apart
        found.samples_apart += apart > 0
    for source in mixture.sources:
        keys = getattr(source, "not_read", None)
        if keys:
            found.not_read[source.name] = keys
    return found


@dataclass
class SampleTally:
    """Counts of samples and empty steps over all steps and ranks of a run; checkpoints keep them.

    Attributes:
        samples: samples in all steps, used or left out; every epoch counts them again.
        left_out: samples that could not be used.
        empty_steps: steps in which no rank had anything to learn from. They change neither weights nor optimizer.
    """

    samples: int = 0
    left_out: int = 0
    empty_steps: int = 0

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> SampleTally:
        """Return the counts of a checkpoint."""
        return cls(state.get("rows", 0), state.get("left_out", 0), state.get("empty_steps", 0))

    def state(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"rows": self.samples, "left_out": self.left_out, "empty_steps": self.empty_steps}

    @property
    def share(self) -> float:
        """The share of samples left out, 0…1."""
        return self.left_out / self.samples if self.samples else 0.0

    def exceeds(self, limit: float, epoch_samples: int, *, last: bool) -> bool:
        """Return whether more than this share of the samples was left out.

        A few bad samples at the beginning mean nothing: the share counts from the 64th sample on, or from the end of
        the epoch or run if that comes first.
        """
        enough = last or self.samples >= min(FIRST_SAMPLES, epoch_samples)
        return enough and self.share > limit

    def in_words(self) -> str:
        """Return the counts in words."""
        text = f"{self.left_out:,} of {self.samples:,} samples left out ({self.share:.1%})"
        return text + (f", {self.empty_steps:,} steps without a usable sample" if self.empty_steps else "")


def too_many_left_out(tally: SampleTally, limit: float, summary: str) -> UserError:
    """Return the error of a run that leaves out more of its data than ``data.max_bad`` allows."""
    return UserError(
        f"data.max_bad: {tally.in_words()}, more than {limit:.0%}: {summary}; fix the data, or raise data.max_bad, "
        "and start the run again"
    )
