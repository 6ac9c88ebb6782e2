"""What of the data a run can use: its first rows, tried before the first step, and the share left out ever since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.batch import Problem
from data.errors import UserError
from vlm_distill.evaluation.left_out import commonest_reason, reasons

#: Rows that are tried before the first step, and that must have been counted before ``data.max_bad`` ends a run.
FIRST_ROWS = 64
_MANY = 0.1
_KEYS = 8

# What to do about a reason, by how the reason begins.
_REMEDIES = {
    "image not found": "set images of the source to the folder that its image paths start from",
    "image outside the roots": "add the images' folder to data.roots",
    "image is a URL": "download the images, and name them by path",
    "model takes no images": "use models with a vision encoder, or data without images",
    "too long": "raise data.max_length, data.max_prompt or data.max_response",
    "no supervised token": "check the model's chat template, and set chat_template of that model if it is wrong",
    "chat template": "check the model's chat template, and set chat_template of that model if it is wrong",
    "misaligned": "give student and teacher the same chat_template and tokenizer",
    "class the student does not have": "give the student the classes of the data (student.classes)",
}


@dataclass
class FirstRows:
    """What came of trying a run's first rows.

    Attributes:
        tried: how many there were.
        problems: those that cannot be used.
        images: images of the others.
        apart: tokens of their answers that are not compared with the teacher's.
        rows_apart: in how many rows there are such tokens.
        not_read: by source the keys of its records that nothing reads, and how often each was met.
    """

    tried: int = 0
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    apart: int = 0
    rows_apart: int = 0
    not_read: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        return self.tried - len(self.problems)

    def mistake(self) -> str | None:
        """Return why the run cannot begin, with a remedy; ``None`` where at least one row can be used."""
        if not self.tried or self.usable:
            return None
        return f"data.train: none of the first {self.tried} rows can be used: {with_remedy(self.problems)}"

    def warning(self) -> str | None:
        """Return what to say where many rows cannot be used."""
        if len(self.problems) <= _MANY * self.tried:
            return None
        return f"{len(self.problems)} of the first {self.tried} rows are left out: {with_remedy(self.problems)}"

    def remarks(self) -> list[str]:
        """Return what else there is to know about the rows."""
        said = []
        if self.apart:
            said.append(
                f"{self.apart} tokens in {self.rows_apart} of the first {self.tried} rows are left to cross-entropy: "
                "the models' chat templates cut the answer's edge in different places"
            )
        for source, keys in self.not_read.items():
            listed = ", ".join(key for key, _ in keys.most_common(_KEYS))
            more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
            said.append(f"{source}: nothing reads {listed}{more} of its records")
        return said


@dataclass
class Tally:
    """Counts over all steps and ranks of a run; checkpoints keep them.

    Attributes:
        rows: rows of the data that the steps were made of, in each epoch anew.
        left_out: those of them that could not be used.
        empty_steps: steps in which no rank had anything to learn from. They change neither weights nor optimizer.
    """

    rows: int = 0
    left_out: int = 0
    empty_steps: int = 0

    @property
    def share(self) -> float:
        """The share of rows left out, 0…1."""
        return self.left_out / self.rows if self.rows else 0.0

    def exceeds(self, limit: float, epoch_rows: int, *, last: bool) -> bool:
        """Return whether more than a share of the rows was left out.

        A few bad rows at the beginning say nothing: the share counts from the 64th row on, or from the end of an epoch
        or of the run that is shorter.
        """
        enough = last or self.rows >= min(FIRST_ROWS, epoch_rows)
        return enough and self.share > limit

    def in_words(self) -> str:
        text = f"{self.left_out:,} of {self.rows:,} rows left out ({self.share:.1%})"
        return text + (f", {self.empty_steps:,} steps without a usable sample" if self.empty_steps else "")


def with_remedy(problems: Sequence[Problem]) -> str:
    """Return the reasons, and what to do about the commonest."""
    reason = commonest_reason(problems)
    remedy = next((text for start, text in _REMEDIES.items() if reason.startswith(start)), "mend the data")
    return f"{reasons(problems)}; {remedy} (`vlm-distill inspect` shows every sample)"


def too_many_left_out(tally: Tally, limit: float, summary: str) -> UserError:
    """Return the end of a run that leaves out more of its data than ``data.max_bad`` allows."""
    return UserError(
        f"data.max_bad: {tally.in_words()}, more than {limit:.0%}: {summary}; mend the data, or raise data.max_bad, "
        "and start the run again"
    )
