"""Compares the scoring rules with cases that the reference scorers computed; see ``golden/scoring/README.md``.

``check_golden.py scoring [FOLDER ...]`` runs it. Each adapter below turns a case's input into the shape of its
expectation by calling the suite. A case that the reference crashes on passes if the suite refuses it with a
``UserError``; where the reference guesses, the suite must say that it has no answer.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.errors import UserError
from data.images import load_image
from data.tsv import TsvTable
from vlm_distill.evaluation.benchmark_entry import Benchmark
from vlm_distill.evaluation.benchmark_layouts import Tsv
from vlm_distill.evaluation.prompts import options
from vlm_distill.evaluation.scoring import cells, hallusion, mathvista, mmmu, ocrbench, text_match, vqa, yes_no
from vlm_distill.evaluation.scoring import multiple_choice_lmms_eval as lmms_choice
from vlm_distill.evaluation.scoring import multiple_choice_vlmevalkit as kit_choice
from vlm_distill.evaluation.scoring import scores as score_types
from vlm_distill.evaluation.vlmevalkit_files import read_prediction_file, write_prediction_file

GOLDEN = Path(__file__).resolve().parent / "golden" / "scoring"
TOLERANCE = 1e-9
Adapter = Callable[[dict[str, Any]], Any]

#: (rules of the file name, scorer) → adapter.
ADAPTERS: dict[tuple[str, str], Adapter] = {}


@dataclass(frozen=True)
class Case:
    """One line of a file: ``where`` is the file and the line, from 1."""

    where: str
    rules: str
    scorer: str
    input: dict[str, Any]
    expected: Any


def read_cases(file: Path) -> list[Case]:
    lines = file.read_text("utf-8").splitlines()
    parsed = [(number, json.loads(line)) for number, line in enumerate(lines, 1)]
    for _, case in parsed:
        if "file" in case["input"]:  # which stands beside the cases
            case["input"]["file"] = str(file.parent / case["input"]["file"])
    return [Case(f"{file.stem}:{n}", c["rules"], c["scorer"], c["input"], c["expected"]) for n, c in parsed]


def left_out(case: Case) -> bool:
    """Whether the case shows a fault that the suite does not reproduce; ``docs/evaluation.md`` names them.

    lmms-eval's OCRBench adds its totals up over calls within one process.
    """
    return (case.rules, case.scorer) == ("lmms-eval", "ocrbench") and "calls" in case.input


def built(case: Case) -> bool:
    return (case.rules, case.scorer) in ADAPTERS


def fault(case: Case) -> str | None:
    """What is wrong with our result, or ``None``."""
    want = case.expected
    try:
        got = ADAPTERS[case.rules, case.scorer](case.input)
    except UserError as error:
        return None if "error" in want else f"refused ({error}), expected {want}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if "error" in want:
        return f"gave {got}, but the reference fails with {want['error']}"
    return None if same(got, want) else f"gave {got}, expected {want}"


def same(got: Any, want: Any) -> bool:
    """Equality, with numbers to 1e-9 and non-finite ones as text in ``want``."""
    if isinstance(want, str) and want in ("NaN", "Infinity", "-Infinity") and isinstance(got, float):
        return math.isnan(got) if want == "NaN" else got == float(want)
    if isinstance(want, dict):
        return isinstance(got, dict) and got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    if isinstance(want, list):
        return isinstance(got, list | tuple) and len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, bool) or isinstance(got, bool) or want is None or isinstance(want, str):
        return got is want if want is None else type(got) is type(want) and got == want
    return isinstance(got, int | float) and abs(got - want) <= TOLERANCE * max(1.0, abs(want))


def check(folder: Path) -> bool:
    """Compares all cases of a folder and prints a table. True if none failed."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        print(f"FAIL {folder} holds no *.jsonl file")
        return False
    passed = True
    print(f"{'rules and scorer':44} {'cases':>6} {'left out':>9} {'failed':>7}")
    for file in files:
        cases = read_cases(file)
        # One file holds one scorer, but nothing in the format says so.
        for scorer in dict.fromkeys((case.rules, case.scorer) for case in cases):
            of_scorer = [case for case in cases if (case.rules, case.scorer) == scorer]
            line = f"{' '.join(scorer):44} {len(of_scorer):6}"
            if scorer not in ADAPTERS:
                print(f"{line}   not built")
                continue
            compared = [case for case in of_scorer if not left_out(case)]
            faults = [(case, found) for case in compared if (found := fault(case)) is not None]
            print(f"{line} {len(of_scorer) - len(compared):9} {len(faults):7}")
            for case, found in faults:
                passed = False
                print(f"  FAIL {case.where}: {found}")
    return passed


def adapter(scorer: str, *rules: str) -> Callable[[Adapter], Adapter]:
    def register(function: Adapter) -> Adapter:
        for name in rules:
            ADAPTERS[name, scorer] = function
        return function

    return register


def answered(given: dict[str, Any]) -> str:
    """A prediction as VLMEvalKit's and the official per-answer functions take it: no null."""
    return cells.as_text(given["prediction"], "the prediction")


def row_of(given: dict[str, Any]) -> dict[str, Any]:
    return {key: given[key] for key in ("answers", "answer", "prediction") if key in given}


# --- VQA -------------------------------------------------------------------------------------------------------------


def _vqa(rules: vqa.Normaliser, suffix: str = "") -> None:
    reference = "official-vqa" if rules == "official" else rules.removesuffix("-textvqa")

    @adapter("vqa_normalize" + suffix, reference)
    def normalised(given: dict[str, Any]) -> Any:
        return {"normalized": vqa.normalize(given["text"], rules)}

    @adapter("vqa_soft_accuracy" + suffix, reference)
    def soft(given: dict[str, Any]) -> Any:
        prediction = (given["prediction"] or "") if reference == "lmms-eval" else answered(given)
        if given.get("answers", ()) is None:  # hidden
            scores = vqa.score_vqa([given], rules="lmms-eval", textvqa=rules.endswith("textvqa"))
            # lmms-eval's VQAv2 leaves such an answer as it is.
            shown = vqa.normalize(prediction, rules) if rules.endswith("textvqa") else prediction
            return {"score": scores.rows[0], "normalized_prediction": shown}
        answers, _ = vqa.reference_records(given)
        score = vqa.leave_one_out(prediction, answers, rules, ids=given.get("answer_ids", True))
        if rules == "official":
            return {"score": score, "percent": round(100 * score, 2)}
        return {"score": score, "normalized_prediction": vqa.normalize(prediction, rules)}


_vqa("official")
_vqa("vlmevalkit")
_vqa("lmms-eval", "_vqav2")
_vqa("lmms-eval-textvqa", "_textvqa")


@adapter("vqa_table", "official-vqa")
def _vqa_table(given: dict[str, Any]) -> Any:
    scores = vqa.score_vqa(given["rows"], rules="official")
    kinds: dict[str, dict[str, float]] = {"answer_type": {}, "question_type": {}}
    for name, metrics in scores.groups.items():
        kind, key = name.split(": ", 1)
        kinds[kind][key] = metrics["accuracy"]
    accuracy = {
        "overall": scores.main,
        "perAnswerType": kinds["answer_type"],
        "perQuestionType": kinds["question_type"],
    }
    percents = [round(100 * score, 2) for score in scores.rows]
    per_question = {str(row["question_id"]): p for row, p in zip(given["rows"], percents, strict=True)}
    return {"accuracy": accuracy, "per_question": per_question}


@adapter("vqa_table", "vlmevalkit")
def _kit_vqa_table(given: dict[str, Any]) -> Any:
    name = given["dataset"]
    scorers = {"DocVQA": text_match.score_anls, "InfoVQA": text_match.score_anls, "ChartQA": text_match.score_relaxed}
    scorers |= {
        "OCRVQA": lambda table, rules: text_match.score_exact(table, rules=rules, best=True),
        "GQA": text_match.score_exact,
    }
    scorer = next((found for key, found in scorers.items() if name.startswith(key)), vqa.score_vqa)
    scores = scorer(given["rows"], rules="vlmevalkit")
    (overall,) = scores.overall.values()
    return {"scores": {"Overall": overall} | {k: next(iter(v.values())) for k, v in scores.groups.items()}}


# --- text and numbers ------------------------------------------------------------------------------------------------


def _anls_as(rules: score_types.Rules) -> Adapter:
    def compare(given: dict[str, Any]) -> Any:
        found = answered(given) if rules == "vlmevalkit" else given["prediction"] or ""
        return {"score": text_match.anls(found, cells.references(row_of(given)), rules=rules)}

    return compare


def _relaxed_as(rules: score_types.Rules) -> Adapter:
    def compare(given: dict[str, Any]) -> Any:
        if rules == "vlmevalkit":
            answered(given)
        scores = text_match.score_relaxed([given], rules=rules)
        if rules == "vlmevalkit":
            return {"score": scores.rows[0]}
        return dict(scores.overall) | {k: v["relaxed_accuracy"] for k, v in scores.groups.items()}

    return compare


def _exact_as(rules: score_types.Rules, best: bool) -> Adapter:
    def compare(given: dict[str, Any]) -> Any:
        if rules == "vlmevalkit":
            answered(given)
        return {"score": text_match.score_exact([row_of(given)], rules=rules, best=best).rows[0]}

    return compare


for _rules in ("vlmevalkit", "lmms-eval"):
    ADAPTERS[_rules, "anls"] = _anls_as(_rules)
    ADAPTERS[_rules, "relaxed_accuracy"] = _relaxed_as(_rules)
    ADAPTERS[_rules, "exact_match_gqa"] = _exact_as(_rules, best=False)
    ADAPTERS[_rules, "exact_match_ocrvqa"] = _exact_as(_rules, best=True)


# --- yes or no -------------------------------------------------------------------------------------------------------


@adapter("yes_no", "vlmevalkit")
def _yes_no(given: dict[str, Any]) -> Any:
    return {"extracted": yes_no.yes_no(answered(given))}


@adapter("yes_no_pope", "lmms-eval")
def _yes_no_pope(given: dict[str, Any]) -> Any:
    found, right = yes_no.yes_no_whole(given["prediction"] or ""), yes_no.reference(given["answer"])
    return {"extracted": found, "score": float(found == right)}


@adapter("yes_no_mme", "lmms-eval")
def _yes_no_mme(given: dict[str, Any]) -> Any:
    found, right = yes_no.yes_no_start(given["prediction"] or ""), yes_no.reference(given["answer"], periods=True)
    return {"extracted": found, "score": float(found == right)}


@adapter("pope", "vlmevalkit")
def _kit_pope(given: dict[str, Any]) -> Any:
    scores = yes_no.score_pope(given["rows"], rules="vlmevalkit")
    return {"Overall": dict(scores.overall), **{k: dict(v) for k, v in scores.groups.items()}}


@adapter("pope", "lmms-eval")
def _pope(given: dict[str, Any]) -> Any:
    return dict(yes_no.score_pope(given["rows"], rules="lmms-eval").overall)


@adapter("mme", "vlmevalkit")
def _kit_mme(given: dict[str, Any]) -> Any:
    scores = yes_no.score_mme(given["rows"], rules="vlmevalkit")
    return dict(scores.overall) | {task: metrics["score"] for task, metrics in scores.groups.items()}


@adapter("mme", "lmms-eval")
def _mme(given: dict[str, Any]) -> Any:
    return dict(yes_no.score_mme(given["rows"], rules="lmms-eval").overall)


@adapter("yes_no_hallusionbench", "lmms-eval")
def _yes_no_hallusion(given: dict[str, Any]) -> Any:
    found = hallusion.has_yes(given["prediction"] or "")
    return {"extracted": found, "score": float(found == given["gt_answer"])}


@adapter("hallusionbench", "vlmevalkit")
def _kit_hallusion(given: dict[str, Any]) -> Any:
    scores = hallusion.score_hallusion(given["rows"], rules="vlmevalkit")
    return {"Overall": dict(scores.overall), **{k: dict(v) for k, v in scores.groups.items()}}


@adapter("hallusionbench_yes_find", "lmms-eval")
@adapter("hallusionbench_judged", "lmms-eval")
def _hallusion(given: dict[str, Any]) -> Any:
    return dict(hallusion.score_hallusion(given["rows"], rules="lmms-eval").overall)


# --- OCRBench --------------------------------------------------------------------------------------------------------


@adapter("ocrbench_item", "vlmevalkit")
def _kit_ocrbench_item(given: dict[str, Any]) -> Any:
    return {"score": int(ocrbench.row_hit(given, "vlmevalkit"))}


@adapter("ocrbench_item", "lmms-eval")
def _ocrbench_item(given: dict[str, Any]) -> Any:
    return {"score": int(ocrbench.row_hit(given, "lmms-eval"))}


@adapter("ocrbench", "vlmevalkit")
def _kit_ocrbench(given: dict[str, Any]) -> Any:
    return dict(ocrbench.score_ocrbench(given["rows"], rules="vlmevalkit").overall)


@adapter("ocrbench", "lmms-eval")
def _ocrbench(given: dict[str, Any]) -> Any:
    return dict(ocrbench.score_ocrbench(given["rows"], rules="lmms-eval").overall)


# --- multiple choice -------------------------------------------------------------------------------------------------


@adapter("mcq_letter", "vlmevalkit")
def _kit_letter(given: dict[str, Any]) -> Any:
    return {
        "letter": kit_choice.letter(given["prediction"], given["choices"], verbose=bool(given.get("verbose_env")))
        or False
    }


@adapter("mcq_letter", "lmms-eval")
def _letter(given: dict[str, Any]) -> Any:
    return {"letter": lmms_choice.extract_letter(given["response"] or "", given["choices"])}


def _choice_table(scorer: Callable[..., score_types.Scores]) -> Adapter:
    def compare(given: dict[str, Any]) -> Any:
        options = {"mmmu": True} if "MMMU" in given["dataset"] else {}
        scores = scorer(given["rows"], meta=given.get("meta"), **options)
        pairs = zip(given["rows"], scores.rows, strict=True)
        hits = {str(row["index"]): int(hit) for row, hit in pairs if hit is not None}
        return {"hits": hits, "scores": {k: dict(v) for k, v in scores.groups.items()}}

    return compare


for _name, _scorer in (
    ("mcq_vanilla", kit_choice.score_choice),
    ("mmmu", kit_choice.score_choice),
    ("mcq_circular", kit_choice.score_circular),
):
    ADAPTERS["vlmevalkit", _name] = _choice_table(_scorer)


@adapter("ai2d", "lmms-eval")
def _ai2d(given: dict[str, Any]) -> Any:
    filtered = lmms_choice.ai2d_letter(given["prediction"] or "")
    return {"filtered": filtered, "exact_match": lmms_choice.score_ai2d([given]).rows[0]}


@adapter("scienceqa", "lmms-eval")
def _scienceqa(given: dict[str, Any]) -> Any:
    return {"exact_match": lmms_choice.score_scienceqa([given]).rows[0]}


@adapter("realworldqa", "lmms-eval")
def _realworldqa(given: dict[str, Any]) -> Any:
    return {"exact_match": lmms_choice.score_realworldqa([given]).rows[0]}


@adapter("mmstar_item", "lmms-eval")
def _mmstar_item(given: dict[str, Any]) -> Any:
    return {"score": float(lmms_choice.mmstar_match(given["prediction"] or "", given["answer"]))}


@adapter("seedbench_item", "lmms-eval")
def _seedbench_item(given: dict[str, Any]) -> Any:
    answer = given["prediction"] or ""
    hit = lmms_choice.seedbench_match(answer, given["answer"])
    return {"extracted": lmms_choice.seedbench_letter(answer), "score": float(hit)}


@adapter("mmstar", "lmms-eval")
def _mmstar(given: dict[str, Any]) -> Any:
    scores = lmms_choice.score_mmstar(given["rows"])
    return dict(scores.overall) | {name: metrics["average"] for name, metrics in scores.groups.items()}


@adapter("seedbench", "lmms-eval")
def _seedbench(given: dict[str, Any]) -> Any:
    scores = lmms_choice.score_seedbench(given["rows"])
    return dict(scores.overall) | {name: metrics["accuracy"] for name, metrics in scores.groups.items()}


@adapter("mmbench_static", "lmms-eval")
def _mmbench(given: dict[str, Any]) -> Any:
    scores = lmms_choice.score_mmbench(given["rows"])
    kinds: dict[str, dict[str, float]] = {"category": {}, "l2-category": {}}
    for name, metrics in scores.groups.items():
        kind, key = name.split(": ", 1)
        kinds[kind][key] = metrics["accuracy"]
    return {
        "overall": scores.overall["overall"],
        "gpt_eval_score": scores.main,
        "category": kinds["category"],
        "l2_category": kinds["l2-category"],
    }


# --- MMMU ------------------------------------------------------------------------------------------------------------


def _mmmu(rules: score_types.Rules, reference: str) -> None:
    @adapter("mmmu_parse_multi_choice", reference)
    def parse_choice(given: dict[str, Any]) -> Any:
        letter = mmmu.choice(cells.as_text(given["response"], "a response"), given["index2ans"], rules=rules)
        return {"random": True} if letter is None else {"letter": letter}

    @adapter("mmmu_parse_open", reference)
    def parse_open(given: dict[str, Any]) -> Any:
        parsed = mmmu.open_answers(cells.as_text(given["response"], "a response"))
        numbers = sorted(value for value in parsed if isinstance(value, float))
        return {"parsed": numbers + sorted(value for value in parsed if isinstance(value, str))}

    @adapter("mmmu_eval_open", reference)
    def eval_open(given: dict[str, Any]) -> Any:
        parsed = mmmu.open_answers(cells.as_text(given["response"], "a response"))
        return {"correct": mmmu.open_match(parsed, given["gold"], rules=rules)}

    @adapter("mmmu_eval_multi_choice", reference)
    def eval_choice(given: dict[str, Any]) -> Any:
        return {"correct": mmmu.choice_match(given["pred"], given["gold"])}


_mmmu("official", "official-mmmu")
_mmmu("lmms-eval", "lmms-eval")


@adapter("mmmu", "official-mmmu")
def _official_mmmu(given: dict[str, Any]) -> Any:
    rows = given["rows"]
    scores = mmmu.score_mmmu(rows, rules="official")
    if not rows:  # the reference's return value has another shape then
        return {"return_type": "dict", "value": dict(scores.overall)}
    words = {1.0: "Correct", 0.0: "Wrong"}
    return {
        "overall": scores.overall["acc"],
        "per_subject": {name: metrics["acc"] for name, metrics in scores.groups.items()},
        "judge": {row["id"]: words[hit] for row, hit in zip(rows, scores.rows, strict=True)},
    }


@adapter("mmmu", "lmms-eval")
def _lmms_mmmu(given: dict[str, Any]) -> Any:
    return {"overall": mmmu.score_mmmu(given["rows"], rules="lmms-eval").overall["acc"]}


# --- MathVista -------------------------------------------------------------------------------------------------------


@adapter("mathvista_post_check", "vlmevalkit")
def _post_check(given: dict[str, Any]) -> Any:
    if given["prefetch"]:
        found = mathvista.prefetched(given, given["prediction"])
        return {"result": False if found is None else found}
    found = mathvista.found_value(given, given["res"])
    return {"result": found is not None and found == mathvista.right_value(given)}


@adapter("mathvista", "vlmevalkit")
def _kit_mathvista(given: dict[str, Any]) -> Any:
    scores = mathvista.score_mathvista(given["rows"], rules="vlmevalkit")
    return {"Overall": dict(scores.overall), **{k: dict(v) for k, v in scores.groups.items()}}


@adapter("mathvista_item", "lmms-eval")
def _mathvista_item(given: dict[str, Any]) -> Any:
    extraction, asks = mathvista.extract(given, (given["response"] or "").strip())
    found = mathvista.normalise(given, extraction)
    right = mathvista.is_right(given, found)
    return {"extraction": extraction, "llm_would_be_called": asks, "prediction": found, "correct": right}


@adapter("mathvista_normalize", "lmms-eval")
def _mathvista_normalize(given: dict[str, Any]) -> Any:
    found = mathvista.normalise(given, given["extraction"])
    return {"normalized": found, "correct": mathvista.is_right(given, found)}


@adapter("mathvista", "lmms-eval")
def _mathvista(given: dict[str, Any]) -> Any:
    # The reference gives nothing for a score of zero.
    return {"accuracy": mathvista.score_mathvista(given["rows"], rules="lmms-eval").overall["accuracy"] or None}


# --- files -----------------------------------------------------------------------------------------------------------


@adapter("prediction_file", "vlmevalkit")
def _prediction_file(given: dict[str, Any]) -> Any:
    rows = [{"index": number} for number in range(len(given["predictions"]))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model_data.{given['format']}"
        write_prediction_file(path, rows, given["predictions"])
        read = read_prediction_file(path)
    texts = [cells.prediction(row, "vlmevalkit") for row in read]
    loaded = [None if score_types.missing(row["prediction"]) else row["prediction"] for row in read]
    return {"loaded": loaded, "as_scored_text": texts}


@adapter("load_tsv", "vlmevalkit")
def _load_tsv(given: dict[str, Any]) -> Any:
    table, kind = TsvTable(Path(given["file"])), given["kind"]
    entry = Benchmark(
        name="golden",
        tsv=Tsv(name="golden"),
        prompt="short" if kind == "vqa" else "options",
        interleave=("vlmevalkit",) if kind == "mmmu" else (),
        scorer="vqa" if kind == "vqa" else "choice",
    )
    assert entry.tsv is not None
    questions = entry.questions(table, entry.tsv)
    has_images = "image" in table.columns
    rows = []
    for number in range(len(table)):
        row, images = table[number], table.images(number)
        names = _image_names(row, len(images))
        # An image of the prompt is known by its bytes, not by its place, which swapped images would share.
        conversation = questions[number]
        placed = iter(conversation.images)
        prompt = [
            {"type": "image", "value": names[images.index(next(placed))]}
            if part["type"] == "image"
            else {"type": "text", "value": part["text"]}
            for part in conversation.messages[0]["content"]
        ]
        shown: dict[str, Any] = row | {"prompt": prompt}
        if kind != "vqa":
            shown["choices"] = {letter: row[letter] for letter in options(row)}
        if has_images:
            shown["image_is_list"] = len(images) > 1
            shown["images"] = [_described(*pair) for pair in zip(images, names, strict=True)]
        rows.append(shown)
    return {"n_rows": len(table), "columns": list(table.columns), "meta_only": not has_images, "rows": rows}


def _image_names(row: dict[str, Any], count: int) -> list[str]:
    """The files that VLMEvalKit writes a row's images to."""
    if row.get("image_path"):
        return row["image_path"] if isinstance(row["image_path"], list) else [row["image_path"]]
    return [f"{row['index']}.png"] if count == 1 else [f"{row['index']}_{k}.png" for k in range(count)]


def _described(image: Any, name: str) -> dict[str, Any]:
    rgb = load_image(image, alpha="drop")
    return {
        "file": name,
        "size": list(rgb.size),
        "mode": "L" if Image.open(io.BytesIO(image)).mode == "L" else "RGB",  # we have no use for grey images
        "sha256_of_rgb_bytes": hashlib.sha256(rgb.tobytes()).hexdigest(),
    }
