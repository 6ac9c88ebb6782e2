"""Compare VLMEvalKit's scorers with ours on the same random answers: every overall number, group and row.

``make test-peers`` runs it in an environment of its own. VLMEvalKit reads the table, writes the prediction file and
scores it by its own code; packages that its scorers do not use are stood in for (``stubs.py``).
"""

from __future__ import annotations

import ast
import contextlib
import io
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import stubs
import tables

PACKAGES = stubs.install()

import vlmeval

stubs.bare_package("vlmeval.dataset")

from vlmeval.dataset import image_mcq, image_vqa, image_yorn
from vlmeval.dataset.utils.multiple_choice import can_infer
from vlmeval.dataset.utils.vqa_eval import hit_calculate
from vlmeval.smp import dump

from vlm_distill.evaluation.benchmark_lookup import find_questions, get_benchmark
from vlm_distill.evaluation.benchmark_scores import judged
from vlm_distill.evaluation.scoring.scores import Scores

ROUNDS = 3
ROWS = 84

CLASSES = {
    "MMMU_DEV_VAL": image_mcq.MMMUDataset,
    **dict.fromkeys(("POPE", "MME", "HallusionBench"), image_yorn.ImageYORNDataset),
    "OCRBench": image_vqa.OCRBench,
    "MathVista_MINI": image_vqa.MathVista,
    "MMVet": image_vqa.MMVet,
    **dict.fromkeys(
        ("TextVQA_VAL", "DocVQA_VAL", "InfoVQA_VAL", "ChartQA_TEST", "OCRVQA_TEST", "GQA_TestDev_Balanced"),
        image_vqa.ImageVQADataset,
    ),
}
#: Columns of the files that it leaves, with a row's score.
_SCORES = ("hit", "score")
#: Whether this version reads the letter after "answer is", as VLMEvalKit does since 2026-06-17 (commit e8e78f0).
ANSWER_IS = can_infer("The answer is A, for it is the oldest of all trees", {"A": "x", "B": "y"}) == "A"


class Judge:
    """Its judge: grades MM-Vet's answers by a number in them, and says nothing about any other."""

    def working(self) -> bool:
        return True

    def generate(self, prompt: str, temperature: float = 0.0) -> str:
        found = re.findall(r"graded ([01]\.[0-9])", prompt)
        return found[-1] if found else "Failed to obtain answer via API."


image_vqa.build_judge = lambda **options: Judge()
# In this process, so that a stand-in need not be found again in another.
image_vqa.mp.Pool = lambda count: __import__("multiprocessing.pool").pool.ThreadPool(1)


def theirs(name: str, folder: Path, predictions: list[str]) -> tuple[Any, dict[str, float]]:
    """Return VLMEvalKit's result and its score of each row by index."""
    kind = CLASSES.get(name, image_mcq.ImageMCQDataset)
    kind.DATASET_MD5 = {}
    dataset = kind(name)
    data = dataset.data
    data["prediction"] = predictions
    data.pop("image")
    work = Path(tempfile.mkdtemp(dir=folder))
    dump(data, str(work / f"model_{name}.xlsx"))
    judge = "judge" if name in ("MathVista_MINI", "MMVet") else "exact_matching"
    result = dataset.evaluate(str(work / f"model_{name}.xlsx"), model=judge, nproc=1)
    return result, _rows(work, name)


def _rows(work: Path, name: str) -> dict[str, float]:
    for path in sorted(work.glob("*.xlsx")):
        frame = pd.read_excel(path)
        if "eval_match" in frame.columns:
            matches = ({"match": ast.literal_eval(cell)} for cell in frame["eval_match"])
            frame["score"] = [hit_calculate([match], name)[0] for match in matches]
        column = next((name for name in _SCORES if name in frame.columns), None)
        if column is not None:
            return {str(index): float(score) for index, score in zip(frame["index"], frame[column], strict=True)}
    return {}


def ours(name: str, folder: Path, predictions: list[str]) -> tuple[Scores, dict[str, float]]:
    entry = get_benchmark(name)
    # Our MMMU has the validation rows alone.
    whole = find_questions(entry.model_copy(update={"where": {}}), folder)
    rows = [row | {"prediction": text} for row, text in zip(whole.rows(), predictions, strict=True)]
    if name == "MMVet":
        for row in rows:
            row["judge"] = Judge().generate(row["prediction"])
    scores = judged(entry.model_copy(update={"scorer_options": {}}), rows, "vlmevalkit", None)
    hits = {str(row["index"]): hit for row, hit in zip(rows, scores.rows, strict=True) if hit is not None}
    return scores, hits


def their_numbers(name: str, result: Any) -> dict[tuple[str, str], float]:
    """Return VLMEvalKit's numbers as (group, metric), the overall ones under ""."""
    if isinstance(result, Mapping):
        return {("", str(key)): float(value) for key, value in result.items()}
    numbers = {}
    named = next((column for column in ("split", "Task&Skill", "Category") if column in result.columns), None)
    for row in result.to_dict("records"):
        group = str(row[named]) if named else ""
        for column, value in row.items():
            if column != named and not (name == "MMVet" and column == "tot"):
                numbers["" if group == "Overall" else group, str(column)] = float(value)
    return numbers


def our_numbers(name: str, scores: Scores) -> dict[tuple[str, str], float]:
    """Return ours with the names that VLMEvalKit's tables have."""
    numbers = {("", key): value for key, value in scores.overall.items()}
    kind = CLASSES.get(name, image_mcq.ImageMCQDataset)
    if kind is image_vqa.ImageVQADataset:
        (overall,) = scores.overall.values()
        return {("", "Overall"): overall} | {("", group): next(iter(m.values())) for group, m in scores.groups.items()}
    if name == "MME":
        return numbers | {("", task): metrics["score"] for task, metrics in scores.groups.items()}
    if issubclass(kind, image_mcq.ImageMCQDataset):
        numbers = {}
    if name == "OCRBench":
        return numbers
    return numbers | {(group, key): value for group, metrics in scores.groups.items() for key, value in metrics.items()}


def differences(mine: Mapping[Any, float], other: Mapping[Any, float]) -> list[str]:
    """Return what differs in the keys that VLMEvalKit has."""
    found = []
    for key, value in other.items():
        if key not in mine:
            found.append(f"{key}: theirs {value}, ours missing")
        elif not (abs(mine[key] - value) < 1e-6 or (math.isnan(value) and math.isnan(mine[key]))):
            found.append(f"{key}: theirs {value}, ours {mine[key]}")
    return found


def main() -> int:
    totals = {"tables": 0, "predictions": 0, "numbers": 0, "rows": 0, "differences": 0}
    for name in tables.TABLES:
        for turn in range(ROUNDS):
            draw = random.Random(f"{name} {turn}")
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                os.environ["LMUData"] = place  # noqa: SIM112
                rows = tables.write(folder, name, draw, ROWS)
                predictions = tables.answers(rows, draw)
                if not ANSWER_IS:
                    predictions = [re.sub("answer is", "answer was", text, flags=re.I) for text in predictions]
                if name == "MMVet":
                    predictions = [f"graded {draw.choice(['0.0', '0.3', '1.0'])}" for _ in rows]
                with contextlib.redirect_stdout(io.StringIO()):
                    result, their_rows = theirs(name, folder, list(predictions))
                    scores, our_rows = ours(name, folder, predictions)
                numbers = their_numbers(name, result)
                found = differences(our_numbers(name, scores), numbers) + differences(our_rows, their_rows)
            totals["tables"] += 1
            totals["predictions"] += len(predictions)
            totals["numbers"] += len(numbers)
            totals["rows"] += len(their_rows)
            totals["differences"] += len(found)
            print(
                f"{name:22} {len(predictions):5} predictions {len(numbers):4} numbers {len(their_rows):4} rows",
                flush=True,
            )
            for line in found[:5]:
                print(f"  DIFFERENT {line}")
    print(", ".join(f"{count:,} {what}" for what, count in totals.items()))
    if not ANSWER_IS:
        print("this version has no rule for the letter after 'answer is': these words are in no answer")
    print(f"VLMEvalKit {vlmeval.__version__}; stood in for: {', '.join(sorted(PACKAGES))}")
    return int(totals["differences"] > 0)


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # PyTorch would look for what is stood in for when it ends
