"""Collation for several teachers: each gets a micro-batch of its own samples, and comparisons say whose is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from .attempts import attempt, checked
from .batch import Combine, Comparison, DistillationBatch
from .collate import Collator, LoadedSample, collate, collate_groups
from .encoding import Pair
from .errors import BadSample


@dataclass(frozen=True)
class Lesson:
    """Who teaches a source.

    Attributes:
        weights: of each teacher by name; they sum to 1.
        combine: what their weighted mean is taken of.
    """

    weights: Mapping[str, float]
    combine: Combine = "losses"


@dataclass(frozen=True)
class SeveralCollator(Collator):
    """Turns samples into micro-batches for a student and several teachers. ``teacher`` is ``None``.

    Attributes:
        members: by name the collator of the student with each teacher alone.
        lessons: of each source.
        own: by teacher, for each source that it teaches, the source's number among these.
        shown: teachers that read conversations with their images instead of tokens.
    """

    members: Mapping[str, Collator] = field(default_factory=dict)
    lessons: Sequence[Lesson] = ()
    own: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    shown: Sequence[str] = ()

    def encode_all(self, samples: Sequence[LoadedSample]) -> list[list[Pair] | BadSample]:
        """Return for each sample its pairs, each with those of its teachers, or why it has none; ids are needed."""
        by_sample: list[dict[str, list[Pair] | BadSample]] = [{} for _ in samples]
        for name, member in self.members.items():
            own = [number for number, loaded in enumerate(samples) if name in self._lesson_of(loaded).weights]
            encoded = member.encode_all([self._for_teacher(name, samples[number]) for number in own])
            for number, found in zip(own, encoded, strict=True):
                by_sample[number][name] = found
        return [attempt(self._together, *both) for both in zip(samples, by_sample, strict=True)]

    def _lesson_of(self, loaded: LoadedSample) -> Lesson:
        assert loaded.sample_id is not None, "who teaches a sample depends on its source"
        return self.lessons[loaded.sample_id[0]]

    def _for_teacher(self, name: str, loaded: LoadedSample) -> LoadedSample:
        """Return a sample with its number among those of a teacher."""
        assert loaded.sample_id is not None
        source, index = loaded.sample_id
        return loaded._replace(sample_id=(self.own[name][source], index))

    def _together(self, loaded: LoadedSample, encoded: Mapping[str, list[Pair] | BadSample]) -> list[Pair]:
        """Return a sample's pairs, given those with each teacher. Raise ``BadSample`` if one teacher cannot have it."""
        assert loaded.sample_id is not None
        by_teacher = {name: checked(found) for name, found in encoded.items()}
        for name in by_teacher.keys() & set(self.shown):
            seen = self.members[name].parts(loaded.sample, loaded.images)
            pairs = zip(by_teacher[name], seen, strict=True)
            by_teacher[name] = [replace(pair, seen=part) for pair, part in pairs]
        found = []
        for parts in zip(*by_teacher.values(), strict=True):
            found.append(self.join_pairs(loaded.sample_id[0], dict(zip(by_teacher, parts, strict=True))))
        return found

    def collators_of(self, source: int) -> Mapping[str, Collator]:
        return {name: self.members[name] for name in self.lessons[source].weights}

    def join_pairs(self, source: int, pairs: Mapping[str, Pair]) -> Pair:
        first = next(iter(pairs.values()))  # the student's side is the same in all
        return Pair(
            first.student,
            None,
            first.student_tokens,
            first.student_tokens,
            distilled=torch.stack([pair.distilled for pair in pairs.values()]).any(0),
            samples=first.samples,
            document=first.document,
            taught=pairs,
            source=source,
        )

    def batch(self, pairs: Sequence[Pair]) -> DistillationBatch:
        """Return a micro-batch with those of the teachers; a teacher without a sample gets a blank row."""
        batch = collate(pairs, self.student, None, packed=(self.packed[0], False))
        groups = self._by_lesson(pairs)

        # Give each teacher its samples, lesson by lesson, and note where those of each lesson are.
        taught = {}
        for name, member in self.members.items():
            own: list[Pair] = []
            start = 0
            for group in groups:
                if name not in group.lesson.weights:
                    continue
                mine = [pair.taught[name] for pair in group.pairs]
                stop = start + sum(len(pair.teacher_tokens) for pair in mine)
                group.spans[name] = start, stop
                own, start = own + mine, stop
            taught[name] = _alone(own, member)

        comparisons = [_comparisons(group, self.members) for group in groups]
        return replace(batch, taught=taught, comparisons=list(chain.from_iterable(comparisons)))

    def _by_lesson(self, pairs: Sequence[Pair]) -> list[_Group]:
        """Return the pairs of each lesson; without pairs, the first source's lesson without any."""
        groups: list[_Group] = []
        start = 0
        for pair in pairs:
            lesson, stop = self.lessons[pair.source], start + len(pair.student_tokens)
            group = next((group for group in groups if group.lesson == lesson), None)
            if group is None:
                group = _Group(lesson)
                groups.append(group)
            group.pairs.append(pair)
            group.rows += range(start, stop)
            start = stop
        return groups or [_Group(self.lessons[0])]


@dataclass
class _Group:
    """What of a micro-batch has the same lesson.

    Attributes:
        lesson: who teaches it.
        pairs: its samples.
        rows: indices of their positions in the micro-batch.
        spans: for each teacher, the first and last + 1 of these positions among its own.
    """

    lesson: Lesson
    pairs: list[Pair] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def _alone(pairs: Sequence[Pair], member: Collator) -> DistillationBatch:
    """Return a micro-batch of a teacher's own samples, its side in both places."""
    assert member.teacher is not None
    own = []
    for pair in pairs:
        assert pair.teacher is not None
        own.append(replace(pair, student=pair.teacher, teacher=None, student_tokens=pair.teacher_tokens, groups=None))
    batch = collate(own, member.teacher, None, packed=(member.packed[1], False))
    seen = [pair.seen for pair in pairs if pair.seen is not None]
    return replace(batch, teacher=batch.student, conversations=seen)


def _comparisons(group: _Group, members: Mapping[str, Collator]) -> list[Comparison]:
    """Return what the positions of a lesson are compared with: each of its teachers, or the mixture of them."""
    lesson, rows = group.lesson, torch.tensor(group.rows, dtype=torch.int64)
    distilled = {}
    for name in lesson.weights:
        parts = [pair.taught[name].distilled for pair in group.pairs]
        distilled[name] = torch.cat([torch.empty(0, dtype=torch.bool), *parts])

    if lesson.combine != "losses" and len(lesson.weights) > 1:
        by_all = torch.stack(list(distilled.values())).all(0)
        names, weights = tuple(lesson.weights), tuple(lesson.weights.values())
        spans = tuple(group.spans[name] for name in names)
        return [Comparison(names, weights, lesson.combine, 1.0, rows, spans, by_all)]

    found = []
    for name, weight in lesson.weights.items():
        groups = collate_groups([pair.taught[name] for pair in group.pairs]) if members[name].grouped else None
        span = group.spans[name]
        found.append(Comparison((name,), (1.0,), "losses", weight, rows, (span,), distilled[name], groups))
    return found
