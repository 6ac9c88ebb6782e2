"""The way in by name, what falls back or waits for a judge, and the average of the suite."""

import math

import pytest

from data.errors import UserError
from vlm_distill.evaluation.scoring import mmvet
from vlm_distill.evaluation.scoring.leaderboard import SUITE, suite_average
from vlm_distill.evaluation.scoring.scorers import SCORERS, rules_of, score
from vlm_distill.evaluation.scoring.scores import Scores

CHOICE = {"index": 1, "A": "cat", "B": "dog", "answer": "B", "prediction": "B", "category": "c"}
MME = [
    {"category": task, "image_path": "i", "question_id": task, "answer": right, "prediction": right}
    for task in (
        *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
        *("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"),
    )
    for right in ("Yes", "No")
]
HALLUSION = {
    **{"index": "hb_VD_math_0_1_0", "category": "VD", "l2-category": "math", "answer": "Yes", "gt_answer": "1"},
    **{"subcategory": "math", "set_id": "0", "figure_id": "1", "question_id": "0", "prediction": "Yes"},
}
OCR = {"category": "Doc-oriented VQA", "question_type": "Doc-oriented VQA", "dataset": "x", "prediction": "It is 5"}
VISTA = {
    **{"question_type": "free_form", "answer_type": "integer", "answer": "5", "choices": None, "precision": None},
    **{"task": "geometry", "skills": "['algebra']", "metadata": {"task": "geometry"}, "prediction": "5"},
}
MMMU = {"id": "validation_Art_1", "question_type": "multiple-choice", "options": "['cat', 'dog']", "answer": "B"}

# One table for each scorer in which every answer is right, by all its rules.
RIGHT = {
    "vqa": [{"answers": ["cat"] * 10, "prediction": "cat"}],
    "textvqa": [{"answers": ["cat"] * 10, "prediction": "cat"}],
    "anls": [{"answers": ["cat"], "prediction": "cat"}],
    "chartqa": [{"answer": "20", "type": "human_test", "prediction": "20.5"}],
    "gqa": [{"answer": "cat", "prediction": "Cat"}],
    "ocrvqa": [{"answer": "cat", "prediction": "Cat"}],
    "pope": [{"index": i, "category": "random", "answer": a, "prediction": a} for i, a in enumerate(["Yes", "No"])],
    "mme": MME,
    "hallusionbench": [HALLUSION],
    "ocrbench": [OCR | {"answer": ["5"]}],
    "choice": [CHOICE],
    "mmbench": [CHOICE | {"C": None, "D": None}],
    "mmstar": [CHOICE | {"l2_category": "x"}],
    "ai2d": [CHOICE],
    "scienceqa": [CHOICE],
    "seedbench": [CHOICE | {"data_type": "image"}],
    "realworldqa": [CHOICE],
    "mmmu": [CHOICE | MMMU],
    "mathvista": [VISTA],
    "mmvet": [{"answer": "5<AND>cats<OR>five cats", "capability": ["ocr", "math"], "prediction": "Five  cats."}],
}
FULL = {"mme": 2800, "ocrbench": 1}  # the others are per cent


@pytest.mark.parametrize(("name", "rules"), [(name, rules) for name in SCORERS for rules in SCORERS[name]])
def test_right_answers_score_full_marks(name, rules):
    table = RIGHT[name]
    if rules == "lmms-eval" and name in ("ai2d", "scienceqa"):  # where the reference is an index
        table = [row | {"answer": 1, "options": ["cat", "dog"], "choices": ["cat", "dog"]} for row in table]
    scores = score(name, table, rules)
    assert isinstance(scores, Scores)
    assert scores.main == pytest.approx(FULL.get(name, 100))
    assert len(scores.rows) == len(table)
    assert all(value == 1 for value in scores.rows)
    assert not sum(scores.fallbacks.values())


@pytest.mark.parametrize(("name", "rules"), [(name, rules) for name in SCORERS for rules in SCORERS[name]])
def test_an_empty_table_scores_nothing(name, rules):
    if (name, rules) == ("mme", "vlmevalkit"):
        with pytest.raises(UserError, match="incomplete"):
            score(name, [], rules)
        return
    main = score(name, [], rules).main
    assert math.isnan(main) or main == 0
    assert not score(name, [], rules).rows


@pytest.mark.parametrize("rules", ["vlmevalkit", "lmms-eval"])
@pytest.mark.parametrize("name", ["pope", "mme", "hallusionbench", "ocrbench", "mmbench", "mathvista", "anls"])
def test_an_empty_prediction_is_wrong_and_no_crash(name, rules):
    table = [row | {"prediction": None} for row in RIGHT[name]]
    if name == "mathvista":
        table = [row | {"prediction": math.nan} for row in table]
    assert score(name, table, rules).main == 0


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="no scorer 'telepathy'; there are vqa"):
        score("telepathy", [])
    with pytest.raises(UserError, match="mme has no rules 'official'; it has vlmevalkit, lmms-eval"):
        score("mme", [], "official")
    assert rules_of("pope") == ("vlmevalkit", "lmms-eval", "official")


def test_missing_columns_are_named():
    with pytest.raises(UserError, match="row 1 has no column 'category'"):
        score("pope", [{"category": "x", "answer": "Yes", "prediction": "Yes"}, {"answer": "No", "prediction": "No"}])


def test_where_the_reference_guesses_the_answer_is_wrong_and_counted():
    rows = [CHOICE | MMMU | {"prediction": said} for said in ("B", "no idea")]
    for rules in ("official", "lmms-eval"):
        scores = score("mmmu", rows, rules)
        assert list(scores.rows) == [1, 0]
        assert scores.fallbacks == {"random": 1}


def test_a_judge_decides_what_has_no_letter():
    row = CHOICE | {"prediction": "It barks."}
    assert (score("choice", [row]).main, list(score("choice", [row]).judge)) == (0, [0])
    judged = score("choice", [row | {"judge": "B"}])
    assert (judged.main, list(judged.judge)) == (100, [])
    # An answer that names its letter is not the judge's.
    assert score("choice", [CHOICE | {"judge": "A"}]).main == 100


def test_a_judge_extracts_for_mathvista():
    row = VISTA | {"prediction": "The answer is 5."}
    for rules in ("vlmevalkit", "lmms-eval"):
        assert (score("mathvista", [row], rules).main, list(score("mathvista", [row], rules).judge)) == (0, [0])
        judged = score("mathvista", [row | {"judge": "5"}], rules)
        assert (judged.main, list(judged.judge)) == (100, [])


def test_a_judge_scores_mmvet():
    rows = [{"answer": "a cat", "capability": "rec,ocr", "prediction": "nothing"} for _ in range(2)]
    rows[0]["judge"] = 0.4
    scores = score("mmvet", rows)
    assert scores.main == pytest.approx(20)
    assert list(scores.judge) == [1]
    assert set(scores.groups) == {"rec", "ocr"}
    with pytest.raises(UserError, match="0 to 1"):
        score("mmvet", [rows[0] | {"judge": 4}])


@pytest.mark.parametrize(
    ("answer", "right"),
    [("x=1 and y = 2", True), ("y = 2", False), ("the\norigin", True), ("", False)],
)
def test_mmvet_wants_all_parts_of_one_alternative(answer, right):
    assert mmvet.contains_answer(answer, "x=1<AND>y = 2<OR>the origin") == right


@pytest.mark.parametrize(
    ("answer", "said"),
    [("No", "no"), ("There is not. Yes", "no"), ("Perhaps", "yes"), ("yes. no", "yes"), ("Yes, no dog", "no")],
)
def test_the_official_pope_takes_all_but_no_for_yes(answer, said):
    rows = [{"answer": "yes", "prediction": answer}]
    assert score("pope", rows, "official").rows[0] == (said == "yes")


def test_mmmu_scores_the_split_that_is_asked_for():
    sentence = "the value that one reads off is 3.5"  # more than twice as long as the answer and "Other Answers"
    rows = [
        CHOICE | {"index": 1, "split": "dev", "prediction": "A"},
        CHOICE | {"index": 2, "split": "validation"},
        {"index": 3, "A": None, "B": None, "answer": "3.5", "prediction": sentence, "split": "validation"},
    ]
    assert score("mmmu", rows, split="validation").main == 50
    assert score("mmmu", rows).main == pytest.approx(100 / 3)
    with pytest.raises(UserError, match="no split 'test'; it has dev, validation"):
        score("mmmu", rows, split="test")


def test_the_suite_is_the_mean_of_eight_on_one_scale():
    scores = dict.fromkeys(SUITE, 50.0) | {"OCRBench": 820.0, "AI2D": 80.25}
    # (6 × 50 + 82 + 80.25) / 8 = 57.78125
    assert suite_average(scores) == 57.8
    assert suite_average(scores | {"MMVet": None}) is None
    assert suite_average(dict.fromkeys(SUITE[1:], 1.0)) is None
    assert suite_average(scores | {"AI2D": math.nan}) is None
    assert suite_average({"MME": 2100.0, "AI2D": 25.0}, ("MME", "AI2D")) == 50.0


def test_vlmevalkit_counts_a_lone_ability_of_mm_vet_twice():
    rows = [
        {"answer": "a", "prediction": "", "judge": grade, "category": c} for grade, c in ((1, "rec"), (0, "rec,ocr"))
    ]
    assert score("mmvet", rows, "vlmevalkit").groups["rec"]["acc"] == pytest.approx(200 / 3)
    assert score("mmvet", rows, "lmms-eval").groups["rec"]["acc"] == 50
    assert score("mmvet", rows, "vlmevalkit").main == 50


def test_an_extraction_that_failed_is_nan_to_vlmevalkit():
    row = {"question_type": "multi_choice", "answer_type": "text", "choices": "['oak', 'an']", "answer_option": "B"}
    row |= {"answer": "an", "prediction": "hm", "task": "t", "skills": "['s']"}
    assert score("mathvista", [row], "vlmevalkit").main == 100


def test_an_empty_reference_is_nan_as_pandas_has_it():
    for name in ("gqa", "ocrvqa"):
        rows = [{"answer": None, "prediction": text} for text in ("nan", "None")]
        assert list(score(name, rows, "vlmevalkit").rows) == [1, 0]


@pytest.mark.parametrize("rules", ["vlmevalkit", "lmms-eval"])
def test_a_column_that_is_missing_is_named(rules):
    with pytest.raises(UserError, match="mathvista: a row has no column 'question_type'"):
        score("mathvista", [{"prediction": "3", "answer": "3", "skills": "['a']", "task": "b"}], rules)
