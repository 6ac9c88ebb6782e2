"""Yes or no: POPE and MME, and how VLMEvalKit reads any yes-or-no answer.

Sources: POPE in Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"; MME in Fu et al.
2023, "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import UserError

from .cells import column, prediction
from .scores import Rules, Scores, Table, mean, missing
from .vqa import without_punctuation

#: The tasks of MME. Perception counts 10 × 200 points, reasoning ("cognition") 4 × 200.
MME_PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def yes_no(answer: str) -> str:
    """Return VLMEvalKit's reading: "Yes" or "No" if exactly one of the two words is in the answer, else "Unknown"."""
    words = without_punctuation(answer.lower(), "vlmevalkit").split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def yes_no_whole(answer: str) -> str:
    """Return lmms-eval's reading for POPE: the lower-cased answer, which must be just "yes" or "no"."""
    return answer.lower().strip()


def yes_no_start(answer: str) -> str:
    """Return lmms-eval's reading for MME: "yes", "no" or "other", by the first four characters; "y" and "n" count."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    start = text[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def yes_no_first_sentence(answer: str) -> str:
    """Return POPE's official reading: "no" if the first sentence has the word no, No or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


@dataclass(frozen=True)
class Extracted:
    """VLMEvalKit's reading of a table's answers.

    Attributes:
        words: each row's "Yes", "No" or "Unknown"; the judge's if the answer itself is unknown.
        scores: 1 if it equals the reference, else 0.
        judge: positions of unknown answers that no judge has seen.
    """

    words: list[str]
    scores: list[float]
    judge: list[int]

    @property
    def fallbacks(self) -> dict[str, int]:
        return {"neither yes nor no": self.words.count("Unknown")}


def read_by_index(table: Table) -> Extracted:
    """Read each row's answer by VLMEvalKit's rules.

    VLMEvalKit joins answers and questions by ``index``, so if several rows share an index, the last answer counts.
    """
    indices = [row.get("index", i) for i, row in enumerate(table)]
    by_index: dict[Any, str] = {}
    judged = set()
    for index, row in zip(indices, table, strict=True):
        found = yes_no(prediction(row, "vlmevalkit"))
        if found == "Unknown" and not missing(row.get("judge")):
            judged.add(index)
            found = yes_no(str(row["judge"]))
        by_index[index] = found
    words = [by_index[index] for index in indices]
    right = column(table, "answer")
    scores = [float(found == answer) for found, answer in zip(words, right, strict=True)]
    unseen = [i for i, index in enumerate(indices) if words[i] == "Unknown" and index not in judged]
    return Extracted(words, scores, unseen)


def reference(answer: object, *, periods: bool = False) -> str:
    """Return the right answer in lmms-eval's POPE or, with ``periods`` removed, MME: "yes" or "no".

    Raises:
        UserError: it is neither.
    """
    text = str(answer).lower().strip()
    text = text.replace(".", "") if periods else text
    if text not in ("yes", "no"):
        raise UserError(f"the reference answer {answer!r} is neither yes nor no")
    return text


def precision_recall_f1(true: Sequence[bool], found: Sequence[bool | None]) -> dict[str, float]:
    """Return precision, recall and F1 of "yes", 0…1; 0 if undefined. A ``None`` counts in neither denominator."""
    pairs = list(zip(true, found, strict=True))
    hits = sum(1 for t, f in pairs if t and f)
    wrong = sum(1 for t, f in pairs if not t and f)
    missed = sum(1 for t, f in pairs if t and f is False)
    precision = hits / (hits + wrong) if hits + wrong else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def score_pope(table: Table, *, rules: Rules = "vlmevalkit") -> Scores:
    """Score POPE by the F1 of "yes".

    VLMEvalKit: a row belongs to each category in its cell, and counts once for each in the total; an answer that is
    neither yes nor no counts as "no"; a repeated ``index`` takes the last answer. lmms-eval: an answer that is neither
    is wrong, but left out of precision and recall; ``yes_ratio`` is that of the references.
    """
    return _pope_vlmevalkit(table) if rules == "vlmevalkit" else _pope(table, rules)


def _pope_vlmevalkit(table: Table) -> Scores:
    categories = column(table, "category")
    read = read_by_index(table)
    exploded: list[tuple[str | None, bool, bool, float]] = []
    for cell, row, found, score in zip(categories, table, read.words, read.scores, strict=True):
        names = [None] if missing(cell) else str(cell).split(",")
        exploded += [(name, row["answer"] == "Yes", found == "Yes", score) for name in names]

    def metrics(rows: list[tuple[str | None, bool, bool, float]]) -> dict[str, float]:
        found = precision_recall_f1([row[1] for row in rows], [row[2] for row in rows])
        named = {"Overall": found["f1"], "acc": mean(row[3] for row in rows)}
        named |= {"precision": found["precision"], "recall": found["recall"]}
        return {name: 100 * value for name, value in named.items()}

    overall = metrics(exploded)
    groups = {}
    for name in dict.fromkeys(row[0] for row in exploded if row[0] is not None):
        groups[name] = metrics([row for row in exploded if row[0] == name])
    return Scores("Overall", overall["Overall"], overall, groups, read.scores, read.fallbacks, read.judge)


def _pope(table: Table, rules: Rules) -> Scores:
    read = yes_no_first_sentence if rules == "official" else yes_no_whole
    extracted = [read(prediction(row, rules)) for row in table]
    right = [reference(answer) for answer in column(table, "answer")]
    scores = [float(found == answer) for found, answer in zip(extracted, right, strict=True)]

    def metrics(rows: Sequence[int]) -> dict[str, float]:
        true = [right[i] == "yes" for i in rows]
        found = precision_recall_f1(true, [{"yes": True, "no": False}.get(extracted[i]) for i in rows])
        return {
            "pope_accuracy": mean(scores[i] for i in rows),
            **{f"pope_{'f1_score' if name == 'f1' else name}": value for name, value in found.items()},
            "pope_yes_ratio": mean(true),
        }

    overall = metrics(range(len(table)))
    categories = dict.fromkeys(row["category"] for row in table if not missing(row.get("category")))
    groups = {}
    for category in categories:
        groups[str(category)] = metrics([i for i, row in enumerate(table) if row.get("category") == category])
    unclear = sum(found not in ("yes", "no") for found in extracted)
    f1 = 100 * overall["pope_f1_score"]
    return Scores("pope_f1_score", f1, overall, groups, scores, {"neither yes nor no": unclear})


def score_mme(table: Table, *, rules: Rules = "vlmevalkit", partial: bool = False) -> Scores:
    """Score MME: each task's acc + acc+ (both questions about an image right), in per cent; the main score is the sum.

    Questions are paired by ``image_path`` (VLMEvalKit) or ``question_id`` (lmms-eval). ``groups`` has each task's acc,
    acc+ and their sum. With ``partial``, VLMEvalKit's totals are over the tasks in the table.

    Raises:
        UserError: by VLMEvalKit, one of the 14 tasks is missing, or an image has one question; by lmms-eval, an image
            does not have two questions, or a reference is neither yes nor no.
    """
    kit = rules == "vlmevalkit"
    read = read_by_index(table) if kit else Extracted([], [], [])
    scores = read.scores
    if not kit:
        scores = [
            float(yes_no_start(prediction(row, rules)) == reference(answer, periods=True))
            for row, answer in zip(table, column(table, "answer"), strict=True)
        ]
    tasks: dict[str, dict[str, list[float]]] = {}
    images = column(table, "image_path" if kit else "question_id")
    for task, image, score in zip(column(table, "category"), images, scores, strict=True):
        tasks.setdefault(str(task), {}).setdefault(str(image), []).append(score)
    groups = {}
    for task, pairs in tasks.items():
        for image, pair in pairs.items():
            if len(pair) < 2 or (len(pair) > 2 and not kit):
                raise UserError(f"MME needs two questions about each image; {image!r} in {task!r} has {len(pair)}")
        # VLMEvalKit averages over questions, lmms-eval over images: the same unless an image has more than two.
        accuracy = 100 * mean(score for pair in pairs.values() for score in pair)
        both = 100 * mean(pair[0] * pair[1] for pair in pairs.values())
        groups[task] = {"score": accuracy + both, "acc": accuracy, "acc+": both}
    overall = _mme_kit_totals(groups, partial) if kit else _mme_totals(groups)
    fallbacks = read.fallbacks if kit else {}
    return Scores("perception + reasoning", sum(overall.values()), overall, groups, scores, fallbacks, read.judge)


def _mme_kit_totals(groups: dict[str, dict[str, float]], partial: bool) -> dict[str, float]:
    lacking = [task for task in (*MME_PERCEPTION, *MME_REASONING) if task not in groups]
    if lacking and not partial:
        raise UserError(f"MME is incomplete: no question of {', '.join(lacking)}")
    totals = {"perception": MME_PERCEPTION, "reasoning": MME_REASONING}
    sums = {}
    for name, tasks in totals.items():
        sums[name] = sum(groups[task]["score"] for task in tasks if task not in lacking)
    return sums


def _mme_totals(groups: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return lmms-eval's totals: an unknown task counts as cognition; a total without tasks is left out."""
    totals: dict[str, float] = {}
    for task, metrics in groups.items():
        name = "mme_perception_score" if task in MME_PERCEPTION else "mme_cognition_score"
        totals[name] = totals.get(name, 0.0) + metrics["score"]
    return totals
