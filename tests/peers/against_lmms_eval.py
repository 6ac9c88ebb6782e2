"""Compare lmms-eval's scorers with ours on the same random answers, and its tasks' answer lengths.

``make test-peers`` runs it in an environment of its own. Rows come from the same tables as for VLMEvalKit; what
lmms-eval imports and its scorers do not use is stood in for (``stubs.py``). HallusionBench and MM-Vet are left out:
there a judge scores them alone.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import stubs
import tables

PACKAGES = stubs.install()
os.environ.setdefault("OPENAI_API_KEY", "none")  # asked for on import; nothing is ever sent

import lmms_eval
import yaml

stubs.bare_package("lmms_eval.tasks")

from lmms_eval.api import metrics

from vlm_distill.evaluation.benchmark_lookup import find_questions, get_benchmark
from vlm_distill.evaluation.scoring.cells import cell_text
from vlm_distill.evaluation.scoring.scorers import score

ROUNDS = 3
ROWS = 84
Row = dict[str, Any]
#: Main score (0…1, or as its aggregation has it) and score of each row (``None``: it has none of its own).
Found = tuple[float, list[float | None]]


def task(name: str, module: str = "utils") -> Any:
    return importlib.import_module(f"lmms_eval.tasks.{name}.{module}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _each(process: Callable[[Row, list[str]], Mapping[str, Any]], key: str) -> Callable[[list[Row], list[str]], Found]:
    """Score row by row, by a key of what its function returns."""

    def run(rows: list[Row], answers: list[str]) -> Found:
        hits = [float(process(row, [text])[key]) for row, text in zip(rows, answers, strict=True)]
        return _mean(hits), list(hits)

    return run


def _exact(rows: list[Row], answers: list[str], letter: bool = False) -> Found:
    if letter:
        named = task("ai2d").MultiChoiceRegexFilter("x").apply([[text] for text in answers], rows)
        answers, rights = list(named), [tables.LETTERS[int(row["answer"])] for row in rows]
    else:
        rights = [cell_text(row["answer"]) for row in rows]
    pairs = zip(answers, rights, strict=True)
    options = {"ignore_case": True, "ignore_punctuation": True}
    hits = [float(metrics.exact_match_hf_evaluate([a], [b], **options)["exact_match"]) for a, b in pairs]
    return _mean(hits), list(hits)


def _anls(rows: list[Row], answers: list[str]) -> Found:
    pairs = zip(rows, answers, strict=True)
    hits = [float(metrics.anls(row["answers"], [text])["anls"]) for row, text in pairs]
    return _mean(hits), list(hits)


def _mmbench(rows: list[Row], answers: list[str]) -> Found:
    evaluator = task("mmbench", "mmbench_evals").MMBench_Evaluator()
    given = [{**row, "prediction": text} for row, text in zip(rows, answers, strict=True)]
    overall, _, _ = evaluator.eval_result(given, eval_method="static")
    return float(overall), [None] * len(rows)


def _mmstar(rows: list[Row], answers: list[str]) -> Found:
    results = [task("mmstar").mmstar_process_results(r, [t])["average"] for r, t in zip(rows, answers, strict=True)]
    return task("mmstar").mmstar_aggregate_results(results), [float(result["score"]) for result in results]


def _seedbench(rows: list[Row], answers: list[str]) -> Found:
    pairs = zip(rows, answers, strict=True)
    results = [task("seedbench").seed_process_result({**r, "question_id": 0}, [t])["seed_all"] for r, t in pairs]
    return task("seedbench").seed_aggregation_result(results), [None] * len(rows)


def _mmmu(rows: list[Row], answers: list[str]) -> Found:
    utils = task("mmmu")
    # Where an answer names nothing it guesses: here a letter that is never right.
    task("_task_utils", "mmmu_mcq_utils").random.choice = lambda choices: "?"
    hits = []
    for row, text in zip(rows, answers, strict=True):
        doc = row | {"options": str(row.get("options")), "answer": row["answer"]}
        hits.append(_mean(list(map(float, _mmmu_hits(utils, doc, text)))))
    return round(_mean(hits), 5), list(hits)


def _mmmu_hits(utils: Any, doc: Row, text: str) -> list[bool]:
    sample = utils.mmmu_process_results(doc, [text])["mmmu_acc"]
    verdicts, _ = utils.evaluate_mmmu([sample])
    return [verdict == "Correct" for verdict in verdicts.values()]


def _ocrbench(rows: list[Row], answers: list[str]) -> Found:
    pairs = zip(rows, answers, strict=True)
    hits = [task("ocrbench").ocrbench_process_results(r, [t])["ocrbench_accuracy"]["score"] for r, t in pairs]
    return sum(hits) / 1000, [float(hit) for hit in hits]


def _pope(rows: list[Row], answers: list[str]) -> Found:
    utils = task("pope")
    pairs = zip(rows, answers, strict=True)
    results = [utils.pope_process_results({**row, "question_id": 0}, [text]) for row, text in pairs]
    f1 = utils.pope_aggregate_f1_score([result["pope_f1_score"] for result in results])
    return f1, [float(result["pope_accuracy"]["score"]) for result in results]


def _mme(rows: list[Row], answers: list[str]) -> Found:
    utils = task("mme")
    results = [utils.mme_process_results(row, [text]) for row, text in zip(rows, answers, strict=True)]
    names = dict.fromkeys(name for result in results for name in result)
    totals = [utils.mme_aggregate_results([result[name] for result in results if name in result]) for name in names]
    return sum(totals) / 100, [float(next(iter(result.values()))["score"]) for result in results]


def _chartqa(rows: list[Row], answers: list[str]) -> Found:
    given = [row | {"answer": row["answers"][0]} for row in rows]
    return _each(task("chartqa").chartqa_process_results, "relaxed_overall")(given, answers)


def _mathvista(rows: list[Row], answers: list[str]) -> Found:
    utils = task("mathvista")
    utils.mathvista_evaluator.get_chat_response = lambda *given, **options: ""
    utils.config = {"metadata": {"quick_extract": False}}
    results = []
    for row, text in zip(rows, answers, strict=True):
        doc = {**row, "pid": 0, "query": "", "metadata": {}, "precision": row.get("precision")}
        results.append(bool(utils.mathvista_process_results(doc, [text])["submission"]["true_false"]))
    return round(_mean(list(map(float, results))), 4), [float(hit) for hit in results]


#: Benchmark → their way, and what their rows need that the table does not have.
WAYS: dict[str, tuple[str, Callable[[list[Row], list[str]], Found]]] = {
    "mmbench": ("MMBench_DEV_EN_V11", _mmbench),
    "mmstar": ("MMStar", _mmstar),
    "mmmu": ("MMMU_DEV_VAL", _mmmu),
    "mathvista": ("MathVista_MINI", _mathvista),
    "ocrbench": ("OCRBench", _ocrbench),
    "ai2d": ("AI2D_TEST", lambda rows, answers: _exact(rows, answers, letter=True)),
    "scienceqa": ("ScienceQA_TEST", _each(task("scienceqa").sqa_process_results, "exact_match")),
    "seedbench": ("SEEDBench_IMG", _seedbench),
    "realworldqa": ("RealWorldQA", _each(task("realworldqa").realworldqa_process_results, "exact_match")),
    "textvqa": ("TextVQA_VAL", _each(task("textvqa").textvqa_process_results, "exact_match")),
    "vqav2": ("VQAv2", _each(task("vqav2").vqav2_process_results, "exact_match")),
    "docvqa": ("DocVQA_VAL", _anls),
    "infovqa": ("InfoVQA_VAL", _anls),
    "chartqa": ("ChartQA_TEST", _chartqa),
    "gqa": ("GQA_TestDev_Balanced", _exact),
    "pope": ("POPE", _pope),
    "mme": ("MME", _mme),
}


def rows_of(name: str, dataset: str, draw: random.Random, folder: Path) -> list[Row]:
    """Return rows as lmms-eval's rules take them."""
    if name in ("docvqa", "infovqa", "textvqa", "chartqa", "vqav2"):
        rows = tables.TABLES[dataset if dataset in tables.TABLES else "TextVQA_VAL"](draw, ROWS)
        lists = [ast.literal_eval(row["answer"]) for row in rows]
        if name == "chartqa":
            lists = [found[:1] for found in lists]
        if name == "vqav2":
            lists = [[{"answer": text, "answer_id": i} for i, text in enumerate(found)] for found in lists]
        return [{"question_id": 0, "answers": found, "type": "human_test"} for found in lists]
    tables.write(folder, dataset, draw, ROWS)
    rows = find_questions(name, folder, rules="lmms-eval").rows()
    if name == "mmbench":
        return [{**row, "L2-category": row["l2-category"]} for row in rows]
    if name == "ocrbench":
        formula = "Handwritten Mathematical Expression Recognition"
        return [row | {"dataset": "HME100k" if row["question_type"] == formula else "x"} for row in rows]
    if name == "mathvista":
        # Its data have lists and texts, and a precision for every float.
        return [{**row, "answer": str(row["answer"]), "precision": 1, "choices": _literal(row)} for row in rows]
    if name == "mmmu":
        # Its data have no empty options. Open questions are left out: 0.7.3 compares them in another way than ours.
        rows = [row for row in rows if row.get("options") and all(row["options"])]
        return [row | {"question_type": "multiple-choice", "id": f"validation_Art_{i}"} for i, row in enumerate(rows)]
    return rows


def _literal(row: Row) -> list[str]:
    return list(ast.literal_eval(row["choices"])) if row.get("choices") else []


def our_score(name: str, rows: list[Row], answers: list[str]) -> Found:
    scorer = get_benchmark(name).scorer
    found = score(scorer, [row | {"prediction": text} for row, text in zip(rows, answers, strict=True)], "lmms-eval")
    return found.main / {"ocrbench": 1000}.get(name, 100), list(found.rows)


def settings() -> list[str]:
    """Return where a task's answer length is another one."""
    found = []
    folder = Path(lmms_eval.__path__[0]) / "tasks"
    files = {
        **{name: f"{name}/{name}.yaml" for name in ("ai2d", "chartqa", "gqa", "mme", "mmvet", "ocrbench", "pope")},
        "docvqa": "docvqa/_default_template_docvqa_yaml",
        "infovqa": "infovqa/_default_template_infovqa_yaml",
        "mmbench": "mmbench/_default_template_mmbench_en_yaml",
        "mmmu": "mmmu/_default_template_yaml",
        "mmstar": "mmstar/_default_template_yaml",
        "mathvista": "mathvista/mathvista_testmini_format.yaml",
        "okvqa": "ok_vqa/_default_template_vqa_yaml",
        "vqav2": "vqav2/_default_template_vqav2_yaml",
        "textvqa": "textvqa/_default_template_textvqa_yaml",
        "scienceqa": "scienceqa/scienceqa_img.yaml",
        "seedbench": "seedbench/seedbench.yaml",
        "realworldqa": "realworldqa/realworldqa.yaml",
        "hallusionbench": "hallusion_bench/hallusion_bench_image.yaml",
    }
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    for name, file in files.items():
        theirs = yaml.safe_load((folder / file).read_text("utf-8")).get("generation_kwargs") or {}
        length = theirs.get("max_new_tokens", 1024)
        ours = get_benchmark(name).length_for("lmms-eval")
        if length != ours:
            found.append(f"{name}: answers of {length} tokens, ours {ours}")
    print(f"answer lengths of {len(files)} tasks compared")
    return found


def main() -> int:
    totals = {"tables": 0, "predictions": 0, "rows": 0, "differences": 0}
    faults = settings()
    for name, (dataset, way) in WAYS.items():
        compared = 0
        for turn in range(ROUNDS):
            draw = random.Random(f"{name} {turn}")
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                rows = rows_of(name, dataset, draw, Path(place))
                asked = [{"answer": row["answers"][0], **row} if "answer" not in row else row for row in rows]
                # lmms-eval strips every answer before it scores.
                answers = [text.strip() for text in tables.answers(asked, draw)]
                if name in ("ai2d", "scienceqa"):
                    answers = [
                        draw.choice([text, draw.choice("ABCDab"), f"{draw.choice('ABCD')}. x"]) for text in answers
                    ]
                (main_theirs, rows_theirs), (main_ours, rows_ours) = way(rows, answers), our_score(name, rows, answers)
            pairs = [(i, a, b) for i, (a, b) in enumerate(zip(rows_theirs, rows_ours, strict=True)) if a is not None]
            faults += [
                f"{name} {turn}, row {i}: {answers[i]!r} theirs {a}, ours {b}" for i, a, b in pairs if abs(a - b) > 1e-6
            ]
            if abs(main_theirs - main_ours) > 1e-6:
                faults.append(f"{name} {turn}: theirs {main_theirs}, ours {main_ours}")
            compared += len(answers)
            totals["tables"] += 1
            totals["predictions"] += len(answers)
            totals["rows"] += len(pairs)
        print(f"{name:12} {compared:5} predictions", flush=True)
    totals["differences"] = len(faults)
    for fault in faults[:40]:
        print(f"  DIFFERENT {fault}")
    print(", ".join(f"{count:,} {what}" for what, count in totals.items()))
    print(f"lmms-eval 0.7.3; stood in for: {', '.join(sorted(PACKAGES))}")
    return int(bool(faults))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # PyTorch would look for what is stood in for when it ends
