"""The question-only baseline: how well the questions can be answered without looking at the image."""

from __future__ import annotations

from collections import Counter

from data.conversation import Conversation
from data.errors import UserError

from .predictions import Prediction, score_answer
from .question_source import Questions, evenly_spaced, read_question


def question_only_baseline(train: Questions, test: Questions, *, limit: int | None = None) -> list[Prediction]:
    """Answer each question with the commonest training answer to its text.

    A question that does not occur in training gets the commonest answer overall; ties go to the answer met first.
    ``probability`` is the answer's share of the training answers it was chosen from. Bad samples are skipped.

    Raises:
        UserError: the training source has no answers.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for i in range(len(train)):
        row = read_question(train, i)
        if isinstance(row, Conversation):
            by_question.setdefault(row.question, Counter()).update(row.references)
            overall.update(row.references)
    if not overall:
        raise UserError(f"{train.name}: no answers to learn a baseline from; give a training source with answers")
    predictions = []
    for i in evenly_spaced(len(test), limit):
        row = read_question(test, i)
        if isinstance(row, Conversation):
            counts = by_question.get(row.question, overall)
            answer, count = counts.most_common(1)[0]
            predictions.append(score_answer(i, row, answer, count / counts.total()))
    return predictions
