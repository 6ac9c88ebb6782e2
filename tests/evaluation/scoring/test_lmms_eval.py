"""lmms-eval's own functions and ours, on the same random answers: run where lmms-eval is installed.

The suite does not depend on it: ``pip install lmms-eval==0.7.3`` in an environment of its own. Its scorers are not
meant to be called from outside, so that another version may need another test.
"""

import importlib
import os
import random

import pytest

pytest.importorskip("lmms_eval")

from vlm_distill.evaluation.scoring import multiple_choice_lmms_eval as lmms_choice
from vlm_distill.evaluation.scoring import text_match, vqa
from vlm_distill.evaluation.scoring.scorers import score

WORDS = (
    *("A", "B", "C", "D", "(A)", "B.", "C:", "D)", "**C**", "A,", "(C).", ":D", "a", "b", "F", "Ｂ"),
    *("the answer is", "I choose", "My choice is", "best option is", "答案是", "not", "\n", "  "),
    *(
        "oak",
        "pine",
        "Birch",
        "Yes",
        "yes.",
        "no",
        "No,",
        "maybe",
        "dog's",
        "don't",
        "dont",
        "two",
        "none",
        "an",
        "the",
    ),
    *("3.5", "1,000", "3,,5", "20%", "0", "$5", "-2", "1e3", "1_0", "inf", "İ", "é", "ß", "?", "!", "'", '"', "."),
)
OPTIONS = ["oak", "pine", "a birch", "3.5"]
ROUNDS = 400


def task(name, module="utils"):
    os.environ.setdefault("OPENAI_API_KEY", "none")  # asked for on import; nothing is ever sent
    return importlib.import_module(f"lmms_eval.tasks.{name}.{module}")


@pytest.fixture
def drawn():
    """``drawn(n)``: a text of up to n words, stripped, as lmms-eval strips a model's answers."""
    draw = random.Random(0)

    def make(longest=6):
        return draw.choice(("", " ")).join(draw.choices(WORDS, k=draw.randint(0, longest))).strip()

    make.choice = draw.choice
    return make


def ours(name, **row):
    return score(name, [row], "lmms-eval").rows[0]


def test_vqav2_and_textvqa(drawn):
    vqav2, textvqa = task("vqav2"), task("textvqa")
    for _ in range(ROUNDS):
        pool = [drawn(2) for _ in range(3)]
        answers, answer = [drawn.choice(pool) for _ in range(10)], drawn.choice([*pool, drawn()])
        records = [{"answer": text, "answer_id": i} for i, text in enumerate(answers)]
        theirs = vqav2.vqav2_process_results({"answers": [dict(r) for r in records], "question_id": 0}, [answer])
        assert ours("vqa", answers=records, prediction=answer) == pytest.approx(theirs["exact_match"])
        assert vqa.normalize(answer, "lmms-eval") == theirs["submission"]["answer"]
        theirs = textvqa.textvqa_process_results({"answers": list(answers), "question_id": 0}, [answer])
        assert ours("textvqa", answers=answers, prediction=answer) == pytest.approx(theirs["exact_match"])
        assert vqa.normalize(answer, "lmms-eval-textvqa") == theirs["submission"]["answer"]


def test_chartqa_docvqa_and_gqa(drawn):
    chartqa, metrics = task("chartqa"), importlib.import_module("lmms_eval.api.metrics")
    for _ in range(ROUNDS):
        answer, right = drawn(1), drawn(1)
        theirs = chartqa.chartqa_process_results({"answer": right, "type": "human_test"}, [answer])
        row = {"answers": [right], "prediction": answer}
        assert ours("chartqa", **row, type="human_test") == theirs["relaxed_overall"]
        answer, right = drawn(3), [drawn(3) for _ in range(2)]
        assert text_match.anls(answer, right, rules="lmms-eval") == pytest.approx(metrics.anls(right, [answer])["anls"])
        theirs = metrics.exact_match_hf_evaluate([answer], right[:1], ignore_case=True, ignore_punctuation=True)
        assert ours("gqa", answers=right[:1], prediction=answer) == theirs["exact_match"]


def test_pope(drawn):
    pope = task("pope")
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    for _ in range(ROUNDS // 10):
        answers = [drawn.choice(["Yes", "no", "yes.", "No", ""]) for _ in range(12)]
        rows = [
            {"question_id": i, "answer": drawn.choice(["Yes", "no"]), "prediction": a} for i, a in enumerate(answers)
        ]
        results = [pope.pope_process_results(row, [row["prediction"]]) for row in rows]
        found = score("pope", rows, "lmms-eval").overall
        for name in names:
            theirs = getattr(pope, f"pope_aggregate_{name}")([result[f"pope_{name}"] for result in results])
            assert found[f"pope_{name}"] == pytest.approx(theirs)


def test_mme(drawn):
    mme = task("mme")
    for _ in range(ROUNDS // 10):
        rows = [
            {"question_id": str(i // 2), "category": ("OCR", "color", "code_reasoning")[i // 2 % 3], "answer": right}
            | {"prediction": drawn(2) or "yes"}
            for i in range(12)
            for right in [("Yes", "No.")[i % 2]]
        ]
        results = [mme.mme_process_results(row, [row["prediction"]]) for row in rows]
        theirs = {}
        for name in dict.fromkeys(name for result in results for name in result):
            theirs[name] = mme.mme_aggregate_results([result[name] for result in results if name in result])
        assert sum(theirs.values()) == pytest.approx(score("mme", rows, "lmms-eval").main)


def test_multiple_choice(drawn):
    mmstar, scienceqa, realworldqa, seed, ai2d = map(task, ("mmstar", "scienceqa", "realworldqa", "seedbench", "ai2d"))
    for _ in range(ROUNDS):
        answer, letter, index = drawn(), drawn.choice("ABCD"), drawn.choice(range(4))
        assert lmms_choice.mmstar_match(answer, letter) == mmstar.exact_match(answer, letter)
        row = {"answer": index, "choices": OPTIONS, "prediction": answer}
        assert ours("scienceqa", **row) == scienceqa.sqa_process_results(row, [answer])["exact_match"]
        row = {"answer": drawn.choice([letter, "no", "4"]), "prediction": answer}
        assert ours("realworldqa", **row) == realworldqa.realworldqa_process_results(row, [answer])["exact_match"]
        result = seed.seed_process_result({"answer": letter, "data_type": "image", "question_id": 0}, [answer])
        assert lmms_choice.seedbench_match(answer, letter) == seed.seed_aggregation_result([result["seed_all"]])
        assert lmms_choice.ai2d_letter(answer) == ai2d.MultiChoiceRegexFilter().apply([[answer]], [{}])[0]


def test_mmbench(drawn):
    evaluator = task("mmbench", "mmbench_evals").MMBench_Evaluator()
    for _ in range(ROUNDS // 20):
        rows = [
            {"index": i + k * 1_000_000, "A": "oak", "B": "pine", "C": drawn.choice(["Birch", None]), "D": None}
            | {"answer": drawn.choice("AB"), "category": drawn.choice("xy"), "l2-category": drawn.choice("uv")}
            | {"question": "q", "prediction": drawn.choice(["A", "B", "oak", drawn(3)])}
            for i in range(8)
            for k in range(2)
        ]
        overall, by_category, _ = evaluator.eval_result([dict(row) for row in rows], "static")
        found = score("mmbench", rows, "lmms-eval")
        assert found.overall["overall"] == pytest.approx(overall)
        for name, value in by_category.items():
            assert found.groups[f"category: {name}"]["accuracy"] == pytest.approx(value)


def test_ocrbench_and_hallusionbench(drawn):
    ocr, hallusion = task("ocrbench"), task("hallusion_bench", "evaluate_hb")
    for _ in range(ROUNDS):
        row = {"answer": [drawn(1), drawn(2)], "dataset": drawn.choice(["HME100k", "IIIT5K"]), "prediction": drawn()}
        row["question_type"] = "Doc-oriented VQA"
        theirs = ocr.ocrbench_process_results(row, [row["prediction"]])["ocrbench_accuracy"]["score"]
        assert ours("ocrbench", **row) == theirs
    for _ in range(ROUNDS // 10):
        rows = [
            {"category": "VS", "subcategory": "map", "set_id": drawn.choice("01"), "figure_id": drawn.choice("012")}
            | {"question_id": drawn.choice("01"), "gt_answer": drawn.choice("01"), "prediction": drawn(2)}
            for _ in range(10)
        ]
        for name, value in score("hallusionbench", rows, "lmms-eval").overall.items():
            given = [{**row, "model_prediction": row["prediction"]} for row in rows]
            assert value == pytest.approx(hallusion.hb_aggregation_result_intern(given, name))
