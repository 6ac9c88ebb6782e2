"""The metrics of several teachers: the share of each in a step, and its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import TermSums
from vlm_distill.runtime.processes import Processes

from .task import comparison_key
from .terms import AnyTerm


class TeacherShares:
    """Adds up what a step is compared with, teacher by teacher.

    Args:
        config: the run.
        terms: of the loss.
        processes: the ranks.
    """

    def __init__(self, config: RunConfig, terms: Sequence[AnyTerm], processes: Processes) -> None:
        self.processes = processes
        self._teachers: list[tuple[str, ...]] = []
        for source in config.data.train:
            mixed = source.combine != "losses" and len(source.lesson) > 1
            self._teachers += [tuple(source.lesson)] if mixed else [(name,) for name in source.lesson]
        self._teachers = list(dict.fromkeys(self._teachers))
        self._terms = [term.name for term in terms if "teacher" in term.loss.needs]
        self._sums: list[Mapping[str, TermSums]] = []

    def add(self, sums: Mapping[str, TermSums]) -> None:
        """Add a micro-batch's sums, as the task returned them."""
        self._sums.append(sums)

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics, and begin the next step; collective.

        ``teacher/NAME/share`` is the share of the compared positions, by weight, ``teacher/NAME/TERM`` the mean loss
        there. The mixture of several teachers is named ``A+B``.
        """
        names = [comparison_key(teachers, term) for teachers in self._teachers for term in self._terms]
        nothing = TermSums(torch.zeros(()))
        flat: list[float | torch.Tensor] = []
        for name in names:
            found = [sums.get(name, nothing) for sums in self._sums]
            flat += [sum(float(one.count) for one in found), sum(float(one.loss) for one in found)]
        self._sums = []
        totals = self.processes.sum(flat)
        counts, losses = dict(zip(names, totals[::2], strict=True)), dict(zip(names, totals[1::2], strict=True))
        metrics: dict[str, float] = {}
        for term in self._terms:
            counted = {teachers: counts[comparison_key(teachers, term)] for teachers in self._teachers}
            compared = sum(counted.values())
            if compared:  # all terms that act on a step compare the same positions
                metrics |= {comparison_key(teachers, "share"): own / compared for teachers, own in counted.items()}
                break
        for teachers in self._teachers:
            for term in self._terms:
                key = comparison_key(teachers, term)
                if counts[key]:
                    metrics[key] = losses[key] / counts[key]
        return metrics
