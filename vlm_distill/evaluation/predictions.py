"""One answered and scored question, and ``predictions.jsonl``, the file that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.conversation import Conversation, ImageSource, VideoFile
from data.errors import UserError
from vlm_distill.models.thinking import split_thought

from .kept_answers import Kept, kept_answer
from .scoring.vqa import exact_match, soft_accuracy


@dataclass(frozen=True)
class Prediction:
    """One answered and scored question.

    Attributes:
        index: row in the source, from 0.
        source, line: the question's place in the data, for messages.
        question, references: the last user text and the right answers.
        answer: the model's answer without its reasoning; empty if the reasoning never ended.
        probability: the model's probability of its whole answer, end token included.
        exact, soft: scores in 0…1; 0 if there is no right answer to compare with.
        question_type: the data's own class of the question, or ``None``.
        image: path of the first image; ``sha256:…`` if the data hold bytes; ``None`` without an image. Questions with
            equal values are about the same picture.
        score: by a benchmark's rules, 0…1; ``None`` without such rules, or if they leave the question out.
        complete: whether the answer, and any reasoning in it, ended within the allowed length.
        generated: the whole text, if it includes reasoning; ``answer`` is what remains without it.
        asked: digest of the question (:func:`~.kept_answers.question_digest`); empty if answers are not kept.
        by: digest of the model and the settings that gave the answer.
    """

    index: int
    source: str
    line: int
    question: str
    references: list[str]
    answer: str
    probability: float
    exact: float
    soft: float
    question_type: str | None = None
    image: str | None = None
    score: float | None = None
    complete: bool = True
    generated: str | None = None
    asked: str = ""
    by: str = ""


def score_answer(
    index: int, conversation: Conversation, text: str, probability: float, complete: bool = True, asked: str = ""
) -> Prediction:
    """Return a scored answer.

    Args:
        text: everything the model wrote; its reasoning is not scored.
    """
    kind = conversation.metadata.get("question_type")
    references = conversation.references
    answer, thought_ended = split_thought(text)
    return Prediction(
        index=index,
        source=conversation.source,
        line=conversation.line,
        question=conversation.question,
        references=references,
        answer=answer,
        probability=probability,
        exact=exact_match(answer, references) if references else 0.0,
        soft=soft_accuracy(answer, references) if references else 0.0,
        question_type=None if kind is None else str(kind),
        image=next((image_key(image) for image in conversation.prompt().images), None),
        complete=complete and thought_ended,
        generated=text if text != answer else None,
        asked=asked,
    )


def score_kept(index: int, conversation: Conversation, answer: Kept) -> Prediction:
    """Return a kept answer, scored against the current right answers."""
    return score_answer(index, conversation, answer.text, answer.probability, answer.complete, answer.asked)


def image_key(image: ImageSource) -> str:
    """Return what identifies an image in :class:`Prediction`: its path, or ``sha256:…`` of its bytes."""
    if isinstance(image, VideoFile):
        image = image.source
    if isinstance(image, str):
        return image
    content = image if isinstance(image, bytes) else image.tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one :class:`Prediction` per line. Replaces the file in one step, because it may hold kept answers."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions), "utf-8")
    unfinished.replace(path)


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions in a file that :func:`write_predictions` wrote.

    Raises:
        UserError: a line is damaged.
    """
    predictions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                predictions.append(_prediction(json.loads(line.decode())))
            except (ValueError, TypeError, RecursionError):
                raise UserError(
                    f"{path}, line {number}: damaged, not a prediction; evaluate again to repeat this question"
                ) from None
    return predictions


def _prediction(line: Any) -> Prediction:
    """Return the prediction in a line; raise ``ValueError`` or ``TypeError`` if it holds none."""
    kept_answer(line)
    found = Prediction(**line)
    numbers, text = (int, float), (str, type(None))
    types: dict[str, Any] = {"source": str, "question": str, "references": list, "answer": str, "line": int, "by": str}
    types |= {"exact": numbers, "soft": numbers, "score": (*numbers, type(None)), "question_type": text, "image": text}
    for name, expected in types.items():
        if not isinstance(getattr(found, name), expected):
            raise ValueError(f"{name} has another type")
    return found
