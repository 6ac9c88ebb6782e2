"""The scores that tables and pages show, and how: by their keys in ``scores.json``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A score.

    Attributes:
        title, unit: for headings.
        scale: factor from ``scores.json`` to tables.
        lower: whether lower is better.
    """

    title: str
    unit: str = ""
    scale: float = 1.0
    lower: bool = False

    @property
    def heading(self) -> str:
        """Return title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


#: In the order in which tables show them. The first that a data set has is its main score.
MEASURES = {
    "main": Measure("Score"),
    "exact": Measure("Accuracy", "%", 100),
    "rouge_l": Measure("ROUGE-L", "%", 100),
    "perplexity": Measure("Perplexity", lower=True),
    "kl": Measure("KL to the teacher", "nats per token", lower=True),
}
