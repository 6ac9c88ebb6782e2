"""A run's samples as its models receive them, for ``vlm-distill inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from data.batch import Encoded, Problem
from data.conversation import Conversation, Document
from data.encoding import Pair
from data.errors import BadSample
from data.loader import ProblemLog, problem_of
from data.sample_images import load_images
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.processor import Processor
from vlm_distill.models.weightless import Weightless
from vlm_distill.reporting.inspection_page import InspectedModel, InspectedSample
from vlm_distill.run import Run


@dataclass
class _Read:
    """A sample with what training would learn from it, or why it would be left out.

    Attributes:
        source: the name of its source.
        line: its line there.
        sample: ``None`` if it could not be read.
        images: decoded.
        pairs: the sample for both models: one pair per piece of a document, or per turn of a split conversation.
        problem: why there are no pairs.
    """

    source: str
    line: int
    sample: Conversation | Document | None
    images: list[Image.Image]
    pairs: list[Pair]
    problem: Problem | None = None


class Inspection:
    """Shows a run's training data as its models receive it. No weight is loaded, and no server is asked.

    Args:
        config: the run. What a teacher receives is shown even if its outputs are cached or come from a server.

    Attributes:
        processors: the models' processors by ``student`` and, if a loss learns from it, ``teacher``, or with several
            teachers their names.
        views: what the teachers see, by the same names.
        log: the samples that were left out in the last pass.
        samples: number of samples in the last pass.
    """

    def __init__(self, config: RunConfig) -> None:
        self.log, self.samples = ProblemLog(), 0
        self.run = Run(_without_caches(config))
        self.sources = self.run.sources
        with Weightless():
            self.collator = self.run.collator
            student, teacher = self.run.student, self.run.loss_teacher
            self.processors: dict[str, Processor] = {"student": student.processor}
            taught = {name: member.teacher for name, member in self.run.members.items()} or {"teacher": teacher}
        self.views = {name: member.view for name, member in self.run.members.items()} or {"teacher": self.run.view}
        for name, one in taught.items():
            if teacher is not None and one is not None:
                assert isinstance(one.processor, Processor)  # no cache is opened here
                self.processors[name] = one.processor

    def shown(self, count: int) -> list[InspectedSample]:
        """Return the first ``count`` samples in the order of training, for people to look at."""
        return [shown for read in self._first(count) for shown in self._for_people(read)]

    def lines(self, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield what training would learn, as plain data.

        Each has ``source`` and ``line``, and either ``problem`` or what each model receives: ``text`` (the decoded
        tokens), ``supervised`` (the supervised spans, end tokens included), ``ends`` (the end tokens) and ``images``
        (their number). A long document yields one per piece, a split conversation one per turn.

        Args:
            count: only the samples that :meth:`shown` shows; ``None``: every sample of every source, in file order.
        """
        for read in self._every() if count is None else self._first(count):
            place = {"source": read.source, "line": read.line}
            if read.problem is not None:
                detail = read.problem.detail
                yield place | {"problem": read.problem.reason + (f": {detail}" if detail else "")}
            for pair in read.pairs:
                yield place | {name: _as_learnt(p, row) for name, p, row in self._rows(pair)}

    def summary(self) -> str:
        """Return how many samples can be used, why the others cannot, and which keys of the sources nothing reads."""
        usable = self.samples - self.log.counts.total()
        lines = [f"{usable:,} of {self.samples:,} samples can be used; {self.log.summary()}"]
        for source in self.sources:
            if keys := getattr(source, "not_read", None):
                lines.append(f"{source.name}: keys {', '.join(sorted(keys))} of its records are ignored")
        return "\n".join(lines)

    def _first(self, count: int) -> Iterator[_Read]:
        self.log, self.samples = ProblemLog(), 0
        return (self._read(source, row) for source, row in self.run.first_samples(count))

    def _every(self) -> Iterator[_Read]:
        self.log, self.samples = ProblemLog(), 0
        return (self._read(number, row) for number, source in enumerate(self.sources) for row in range(len(source)))

    def _read(self, number: int, row: int) -> _Read:
        source = self.sources[number]
        read = _Read(source.name, source.line(row), None, [], [])
        self.samples += 1
        try:
            read.sample = source[row]
            read.line = read.sample.line or read.line
            read.sample, read.images = load_images(read.sample, self.run.load_image)
            read.pairs = self.collator.encode(read.sample, read.images, (number, row))
        except BadSample as bad:
            read.problem = problem_of(source, row, bad, "skip")
            self.log.add([read.problem])
        return read

    def _rows(self, pair: Pair) -> list[tuple[str, Processor, Encoded]]:
        """Return a pair's encodings with the models' names and processors."""
        rows = {"student": pair.student, "teacher": pair.teacher}
        rows |= {name: own.teacher for name, own in pair.taught.items()}
        return [(name, p, row) for name, p in self.processors.items() if (row := rows.get(name)) is not None]

    def _for_people(self, read: _Read) -> list[InspectedSample]:
        title = f"{read.source}, line {read.line}"
        if read.problem is not None:
            reason, detail = read.problem.reason, read.problem.detail
            problem = f"{reason}: {detail}" if detail else reason
            return [InspectedSample(title, read.images, self._whole(read), problem)]
        if isinstance(read.sample, Document):
            return [InspectedSample(title, [], self._whole(read))]
        shown = []
        for number, pair in enumerate(read.pairs, start=1):
            part = f", part {number} of {len(read.pairs)}" if len(read.pairs) > 1 else ""
            models = {name: _by_token(p, row) for name, p, row in self._rows(pair)}
            shown.append(InspectedSample(title + part, read.images, models, groups=self._groups(pair)))
        return shown

    def _whole(self, read: _Read) -> dict[str, InspectedModel]:
        """Return a whole sample as far as the models can encode it, whatever training would leave out of it."""
        models: dict[str, InspectedModel] = {}
        try:
            for name, processor in self.processors.items():
                if isinstance(read.sample, Document):
                    models[name] = _by_token(processor, processor.encode_document(read.sample))
                elif read.sample is not None:
                    view = self.views.get(name)
                    seen = (read.sample, read.images) if view is None else view.of(read.sample, read.images)
                    models[name] = _by_token(processor, processor.encode(*seen))
        except BadSample:
            pass  # shown as the sample's problem
        return models

    def _groups(self, pair: Pair) -> list[tuple[str, str]]:
        """Return the tokens of each group in both models, joined by dots."""
        if pair.groups is None:
            return []
        texts = []
        for (_, processor, row), spans in zip(self._rows(pair), pair.groups, strict=True):
            pieces = [processor.tokenizer.decode([token]) for token in row.input_ids[row.supervised].tolist()]
            texts.append(["·".join(pieces[first:stop]) for first, stop in spans.tolist()])
        return list(zip(*texts, strict=True))


def _without_caches(config: RunConfig) -> RunConfig:
    """Return the run with the models themselves in place of what is stored of them, and with samples in rows alone."""
    plain = {"cache": None, "quantize": None}
    teachers = {name: section.model_copy(update=plain) for name, section in config.teachers.items()}
    return config.model_copy(
        update={
            "teacher": None if config.teacher is None else config.teacher.model_copy(update=plain),
            "teachers": teachers,
            "student": config.student.model_copy(update={"vision_cache": None}),
            "data": config.data.model_copy(update={"packing": False}),
        }
    )


def _by_token(processor: Processor, row: Encoded) -> InspectedModel:
    """Return an encoding token by token, for people."""
    return InspectedModel(
        pieces=[processor.tokenizer.decode([token]) for token in row.input_ids.tolist()],
        supervised=row.supervised.tolist(),
        ends=row.ends.tolist(),
        image=processor.image_tokens(row).tolist(),
    )


def _as_learnt(processor: Processor, row: Encoded) -> dict[str, Any]:
    """Return an encoding as plain data."""
    ids = row.input_ids.tolist()
    spans = []
    for supervised, positions in groupby(range(len(ids)), key=row.supervised.tolist().__getitem__):
        if supervised:
            spans.append(_decoded(processor, [ids[position] for position in positions]))
    return {
        "text": _decoded(processor, ids),
        "supervised": spans,
        "ends": [_decoded(processor, [ids[i]]) for i in row.ends.nonzero().flatten().tolist()],
        "images": row.images,
    }


def _decoded(processor: Processor, ids: list[int]) -> str:
    """Return the text of tokens as the model receives them, with special tokens and blanks."""
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
