"""Several teachers as one: each is asked about the samples that it teaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from data.batch import DistillationBatch
from data.errors import UserError

from .interface import VisionLanguageModel
from .teacher import Teacher, TeacherOutputs


class SeveralTeachers(Teacher):
    """Asks each teacher about its own part of a micro-batch, ``batch.taught``.

    A teacher that no comparison names does not run, unless it is sharded over ranks: it then runs on every rank in
    every micro-batch, on a blank row if need be, so that no rank waits for another.

    Args:
        members: the teachers by name, in the order in which they run on every rank.

    Attributes:
        processor: the first teacher's, whose tokenizer an assembled student takes if it names none.
    """

    def __init__(self, members: Mapping[str, Teacher]) -> None:
        self._members = dict(members)
        teachers = list(self._members.values())
        self.processor = teachers[0].processor
        self.needs_images = any(teacher.needs_images for teacher in teachers)
        self.asks_ahead = any(teacher.asks_ahead for teacher in teachers)
        self.collective = any(teacher.collective for teacher in teachers)
        counts = [teacher.parameters for teacher in teachers]
        self.parameters = None if None in counts else sum(count for count in counts if count is not None)

    @property
    def members(self) -> Mapping[str, Teacher]:
        return self._members

    def align(self, student: VisionLanguageModel) -> int:
        raise UserError("several teachers are aligned one by one")

    def request(self, batch: DistillationBatch) -> None:
        for name, teacher in self._asked(batch):
            teacher.request(batch.taught[name])

    def forget(self, batch: DistillationBatch) -> None:
        for name, teacher in self._asked(batch):
            teacher.forget(batch.taught[name])

    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert not features, "features are compared with a single teacher"
        found = {}
        for name, teacher in self._asked(batch):
            targets = teacher.outputs(batch.taught[name]).targets
            assert targets is not None
            found[name] = targets
        heads = [teacher.head for teacher in self.members.values() if teacher.collective and teacher.head is not None]
        return TeacherOutputs(None, taught=found, sharded=heads)

    def _asked(self, batch: DistillationBatch) -> Iterator[tuple[str, Teacher]]:
        """Yield the teachers that run for a micro-batch, by name."""
        for name, teacher in self.members.items():
            if teacher.collective or any(name in comparison.teachers for comparison in batch.comparisons):
                yield name, teacher
