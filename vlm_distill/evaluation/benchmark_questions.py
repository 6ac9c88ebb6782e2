"""Turn a benchmark's table into questions to ask, and into rows that a scorer takes."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.conversation import Conversation
from data.tables import SourceTable, Table

from .benchmark_layouts import Layout
from .prompts import as_list, ask, options, parts
from .question_source import evenly_spaced
from .scoring.scores import Rules


@dataclass(frozen=True)
class Wording:
    """How the rules put a benchmark's questions, and which form of its rows their scorers take.

    Attributes:
        prompt: a name or template (:func:`~.prompts.ask`).
        interleave: whether images go where the text says ``<image k>``.
        rules: whose scorers take the rows.
        numbered: whether they take the right answer of a multiple-choice question as an option's number, not a letter.
    """

    prompt: str
    interleave: bool = False
    rules: Rules = "vlmevalkit"
    numbered: bool = False


@dataclass(frozen=True)
class Groups:
    """Which questions are scored together (``Benchmark.together``).

    Attributes:
        columns: rows with equal values here form a group; without columns, each row is a group of its own.
        least: smaller groups are not scored.
    """

    columns: Sequence[str] = ()
    least: int = 1


class BenchmarkQuestions:
    """The questions of an open benchmark under one set of rules (a :class:`~.question_source.Questions`).

    Args:
        name: shown in reports.
        table: the rows.
        layout: names the file's columns.
        wording: how the rules put a question.
        groups: which questions are scored together; by default each by itself.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        layout: Layout,
        wording: Wording,
        groups: Groups = Groups(),
    ) -> None:
        self.name = name
        self.table = table
        self.layout = layout
        self._wording = wording
        self._groups = groups

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        """Return the cells of a row for scorers, without images.

        If the file has no ``index``, it is the row's number. Multiple-choice rows have their options as columns A to Z
        and, unless the rules are VLMEvalKit's, as lists too. If ``answer`` is the text of an option, ``answer_option``
        is its letter.
        """
        index = range(len(self))[index]
        row = self.layout.complete(self.table[index])
        row.setdefault("index", index)
        choices = as_list(row.get("choices")) or as_list(row.get("options"))
        if choices and not options(row):
            row.update(zip(string.ascii_uppercase, choices, strict=False))
            if not self.layout.index_answers and row.get("answer") in choices:
                row.setdefault("answer_option", string.ascii_uppercase[choices.index(row["answer"])])
        if self._wording.rules != "vlmevalkit":
            self._as_lists(row)
        if self._wording.numbered and options(row) and (letter := _as_letter(row.get("answer"))):
            row["answer"] = string.ascii_uppercase.index(letter)
        elif self.layout.index_answers and not self._wording.numbered:
            row["answer"] = _letter(row) or row.get("answer")
        return row

    def _as_lists(self, row: dict[str, Any]) -> None:
        """Add the columns of lmms-eval's and the official files, made from VLMEvalKit's."""
        for column in self.layout.lists:
            row[column] = as_list(row.get(column)) or row.get(column)
        texts = options(row)
        if texts and "choices" not in row and "options" not in row:
            # The k-th element belongs to the k-th letter, so empty options keep their place, even the right one.
            last = max(*texts, *_as_letter(row.get("answer")))
            row["choices"] = row["options"] = [texts.get(name) for name in string.ascii_uppercase[: ord(last) - 64]]
            row.setdefault("question_type", "multiple-choice")

    def rows(self, indices: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """Return several rows, by default all."""
        return [self.row(index) for index in (range(len(self)) if indices is None else indices)]

    def __getitem__(self, index: int) -> Conversation:
        """Return the question as the rules put it. Its metadata are the row and, in ``answers``, the right answers.

        Raises:
            BadSample: the row's images are broken, or do not match the places for them.
        """
        index = range(len(self))[index]
        row = self.row(index)
        line = self.line(index)
        if self._wording.prompt == "question" and isinstance(self.table, SourceTable):
            own = self.table.conversation(index).prompt()  # it may have several messages, with images between them
            return Conversation(own.messages, own.images, self.name, line, row)
        content, images = parts(ask(self._wording.prompt, row), self.table.images(index), self._wording.interleave)
        metadata = row | {"answers": self._references(row)}
        return Conversation(({"role": "user", "content": content},), images, self.name, line, metadata)

    def line(self, index: int) -> int:
        """Return the 1-based line of a question in its file, for messages."""
        return self.table.line(range(len(self))[index])

    def size(self, index: int) -> int:
        if isinstance(self.table, SourceTable):  # may have unreadable rows
            return self.table.source.size(index)
        return len(ask(self._wording.prompt, self.row(index)))

    def share(self, limit: int) -> list[int]:
        """Return at least ``limit`` questions, evenly spaced and in order; of each group all or none."""
        every = self.scored_together()
        members = [group for group in every if len(group) >= self._groups.least] or every
        chosen = evenly_spaced(len(members), math.ceil(limit * len(members) / max(1, len(self))))
        return sorted(index for number in chosen for index in members[number])

    def scored_together(self) -> list[list[int]]:
        """Return the rows in groups that are scored together; a row scored by itself is a group of one."""
        groups: dict[Any, list[int]] = {}
        for index in range(len(self)):
            row = self.row(index) if self._groups.columns else {}
            groups.setdefault(tuple(_group(row, column) for column in self._groups.columns) or index, []).append(index)
        return list(groups.values())

    def incomplete(self, answered: Iterable[int]) -> set[int]:
        """Return the answered rows that cannot be scored because another of their group has no answer."""
        found = set(answered)
        if not self._groups.columns:
            return set()
        broken = [g for g in self.scored_together() if len(g) < self._groups.least or not found.issuperset(g)]
        return {index for group in broken for index in group} & found

    def _references(self, row: dict[str, Any]) -> list[Any]:
        for column in ("answers", "answer"):
            if row.get(column) is not None:
                if column == "answer" and (self.layout.index_answers or self._wording.numbered) and options(row):
                    letter = _letter(row)
                    return [] if letter is None else [letter]
                found = as_list(row[column])
                return [str(row[column])] if found is None else [a if isinstance(a, dict) else str(a) for a in found]
        return []


def _group(row: dict[str, Any], column: str) -> str:
    name, _, parts = column.partition(":")
    value = str(row.get(name))
    if parts:
        return "_".join(value.split("_")[: int(parts)])
    return str(int(value) % 1_000_000) if column == "index" and value.isdecimal() else value


def _as_letter(answer: Any) -> str:
    """Return an answer that is a capital letter; for any other answer an empty text."""
    return answer if isinstance(answer, str) and len(answer) == 1 and answer in string.ascii_uppercase else ""


def _letter(row: dict[str, Any]) -> str | None:
    """Return the letter of the option that ``answer`` numbers or names; ``None`` if it is not an option."""
    answer, choices = str(row.get("answer")), options(row)
    if answer in choices:
        return answer
    letter = string.ascii_uppercase[int(answer)] if answer.isdecimal() and int(answer) < 26 else ""
    return letter if letter in choices else None
