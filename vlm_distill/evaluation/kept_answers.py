"""Keep answers on disk by what was asked, so that an evaluation resumes with the questions that are still open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.conversation import Conversation, ImageSource, VideoFile
from data.saved_json import append_line, readable_lines

from .prompts import options

#: In an evaluation's folder: the answers, how they were asked, and each rank's answers while it is unfinished.
PREDICTIONS, ASKED, UNFINISHED = "predictions.jsonl", "asked.json", "unfinished"
#: In a run's ``evaluation/DATA``, the folder of a single teacher's answers; several have ``teacher_NAME``.
TEACHER = "teacher"


def teacher_folder(name: str) -> str:
    """Return the folder of a teacher's answers; ``name`` is empty for a single one."""
    return f"{TEACHER}_{name}" if name else TEACHER


def teacher_name(folder: str) -> str | None:
    """Return the name of the teacher whose answers a folder holds, empty for a single one; ``None``: no teacher's."""
    if folder == TEACHER:
        return ""
    return folder.removeprefix(f"{TEACHER}_") if folder.startswith(f"{TEACHER}_") else None


@dataclass(frozen=True)
class Kept:
    """An answer, as the model gave it.

    Attributes:
        index: row in the source at that time, from 0.
        asked: digest of the question (:func:`question_digest`).
        text: the whole answer, reasoning included.
        probability, complete: as in :class:`~.predictions.Prediction`.
    """

    index: int
    asked: str
    text: str
    probability: float
    complete: bool


@dataclass(frozen=True)
class AnswerFolder:
    """Where an evaluation keeps its answers, and whose they are.

    Attributes:
        path: the folder.
        model: the model's name, for VLMEvalKit's prediction file.
        identity: plain values that tell this model, with its settings, from others. Answers are kept and reused only
            under equal values; without an identity nothing is reused.
        about: written to ``asked.json`` beside the settings; without it, a finished evaluation is not reused.
        pictures: folder for small copies of pictures that are not files (:func:`~.pictures.write_pictures`).
    """

    path: Path
    model: str = "model"
    identity: Mapping[str, Any] | None = None
    about: Mapping[str, Any] | None = None
    pictures: Path | None = None

    def store(self, max_new_tokens: int, rank: int) -> AnswerStore | None:
        """Return the store of the answers kept here; ``None`` without an identity."""
        if self.identity is None:
            return None
        return AnswerStore(self.path, {**self.identity, "max_new_tokens": max_new_tokens}, rank)


@dataclass
class AnswerStore:
    """The answers kept in an evaluation's folder, including those of an unfinished evaluation.

    Args:
        folder: the evaluation's.
        settings: what an answer depends on besides the question: the model's files, precision, length, …. Answers
            given under other settings are ignored.
        rank: this process's rank; each rank writes a file of its own.
    """

    folder: Path
    settings: Mapping[str, Any]
    rank: int
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = digest_of(self.settings)

    def answers(self) -> list[Kept]:
        """Return the answers given under these settings, in any order."""
        lines = [answer for entry in self._journals() for answer in entry["answers"]]
        if (path := self.folder / PREDICTIONS).is_file():
            entries = readable_lines(path)
            lines += [line for line in entries if isinstance(line, dict) and line.get("by") == self.key]
        found = []
        for line in lines:
            with suppress(ValueError):  # a damaged line: its question is asked again
                found.append(kept_answer(line))
        return found

    def unusable(self) -> set[int]:
        """Return the rows that could not be asked. By now they may be readable."""
        found = [index for entry in self._journals() for index in entry["unusable"]]
        return {*found, *unusable_rows(read_asked(self.folder))}

    def _journals(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / UNFINISHED).glob(f"{self.key}-*.jsonl")):
            yield from (entry for entry in readable_lines(path) if isinstance(entry, dict))

    def add(self, answers: Sequence[Kept], unusable: Sequence[int]) -> None:
        """Append a batch's answers, and the rows of the batch that could not be asked."""
        entry = {"answers": [*map(asdict, answers)], "unusable": list(unusable)}
        append_line(self.folder / UNFINISHED / f"{self.key}-{self.rank}.jsonl", entry)

    def set_aside(self, answers: Sequence[Kept]) -> None:
        """Keep answers that ``predictions.jsonl`` will not hold, because a limit now leaves their questions out."""
        path = self._aside()
        if not answers:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"answers": [*map(asdict, answers)], "unusable": []}) + "\n", "utf-8")
        unfinished.replace(path)

    def _aside(self) -> Path:
        return self.folder / UNFINISHED / f"{self.key}-aside.jsonl"

    def finish(self, about: Mapping[str, Any] | None, unusable: Sequence[int]) -> None:
        """Write ``asked.json`` if there is ``about``, and remove the journals; called on one rank.

        The answers are in ``predictions.jsonl`` by now. Those that were set aside stay.
        """
        if about is not None:
            write_asked(self.folder, {**about, "settings": self.settings, "unusable": sorted(unusable)})
        for path in (self.folder / UNFINISHED).glob("*.jsonl"):
            if path != self._aside():
                path.unlink()
        if (self.folder / UNFINISHED).is_dir() and not self._aside().exists():
            (self.folder / UNFINISHED).rmdir()


def kept_answer(line: Any) -> Kept:
    """Return the answer in a line of ``predictions.jsonl`` or a journal.

    Raises:
        ValueError: the line is damaged.
    """
    if not isinstance(line, dict):
        raise ValueError("not an object")
    names = {"asked": "", "text": None, "answer": None, "generated": None, "complete": True}
    index, chance = line.get("index"), line.get("probability")
    asked, text, answer, generated, complete = (line.get(name, default) for name, default in names.items())
    text = next((given for given in (text, generated, answer) if given is not None), None)
    if not isinstance(index, int) or index < 0 or not isinstance(chance, int | float):
        raise ValueError("no index or no probability")
    if not isinstance(text, str) or not isinstance(asked, str) or not isinstance(complete, bool):
        raise ValueError("no answer, or values of another type")
    return Kept(index, asked, text, chance, complete)


def unusable_rows(about: Mapping[str, Any]) -> list[int]:
    """Return the rows that could not be asked, from the content of ``asked.json``."""
    rows = about.get("unusable")
    return [row for row in rows if type(row) is int and row >= 0] if isinstance(rows, list) else []


def matched(kept: Sequence[Kept], rows: Sequence[int], digest: Callable[[int], str | None]) -> dict[int, Kept]:
    """Return the kept answers to a source's rows.

    A row takes the answer to the same question at the same place, or else at a place that now holds another question.
    So if rows were inserted or removed, only the new ones are asked.

    Args:
        kept: answers to earlier questions.
        rows: of the source.
        digest: returns the digest of the question that a row asks now; ``None`` if it asks none.
    """
    kept = [answer for answer in kept if answer.asked]
    places = {answer.index for answer in kept}
    current = {row: digest(row) for row in places}
    here = {answer.index: answer for answer in kept if current[answer.index] == answer.asked}
    moved = {answer.asked: answer for answer in kept if current[answer.index] != answer.asked}
    found = {row: here[row] for row in rows if row in here}
    # Reading every row takes time, so do it only if some answer's question has moved.
    for row in rows if moved else ():
        asked = current[row] if row in current else digest(row)
        if row not in found and asked in moved:
            found[row] = moved[asked]
    return found


def question_digest(conversation: Conversation) -> str:
    """Return a digest of a question as asked: the prompt's text, the options, and the content of the images.

    Right answers are not part of it. An image that cannot be read counts by its name.
    """
    prompt = conversation.prompt()
    digest = hashlib.sha256(_json([prompt.messages, prompt.tools, options(conversation.metadata)]))
    for image in prompt.images:
        digest.update(_image_digest(image))
    return digest.hexdigest()[:32]


def _image_digest(image: ImageSource) -> bytes:
    if isinstance(image, VideoFile):
        image = image.source
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if not isinstance(image, str):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
    path = Path(image)
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError):  # an impossible file name, or a file without read permission
        pass
    return hashlib.sha256(image.encode(errors="surrogatepass")).digest()


def digest_of(settings: Any) -> str:
    """Return a digest of plain values."""
    return hashlib.sha256(_json(settings)).hexdigest()[:16]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def read_asked(folder: Path) -> dict[str, Any]:
    """Return the content of ``asked.json``; an empty dict if it is missing or damaged."""
    path = folder / ASKED
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_asked(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``asked.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ASKED).write_text(json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
