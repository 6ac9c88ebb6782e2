"""What must hold for any answers, without a reference to compare with."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill.evaluation.scoring import mmmu, text_match, vqa, yes_no
from vlm_distill.evaluation.scoring import multiple_choice_lmms_eval as lmms_choice
from vlm_distill.evaluation.scoring import multiple_choice_vlmevalkit as kit_choice
from vlm_distill.evaluation.scoring.hallusion import score_hallusion
from vlm_distill.evaluation.scoring.scorers import score
from vlm_distill.evaluation.scoring.text_match import levenshtein

TEXTS = st.text(alphabet="aAbB01 .,'%ßé\n", max_size=8)
ANSWERS = st.lists(st.sampled_from(["cat", "Dog", "a dog", "2", "two", "yes."]), min_size=2, max_size=10)
YES_NO = st.sampled_from(["Yes", "No", "yes, it is", "no.", "perhaps", "yes and no", ""])
few = settings(max_examples=60, deadline=None)


# --- text ------------------------------------------------------------------------------------------------------------


@few
@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


@few
@given(TEXTS, TEXTS)
def test_anls_is_symmetric_where_raw_lengths_are(a, b):
    """Under VLMEvalKit always; lmms-eval strips one side only."""
    assert text_match.anls(a, [b]) == text_match.anls(b, [a])
    assert text_match.anls(a, [b], rules="lmms-eval") == pytest.approx(text_match.anls(a.strip(), [b]))
    assert 0 <= text_match.anls(a, [b]) <= 1
    assert text_match.anls(a, [a.upper() if len(a.upper()) == len(a) else a]) == 1


@few
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_another_reference_never_lowers_a_best_of_score(answer, references, more):
    assert text_match.anls(answer, [*references, more]) >= text_match.anls(answer, references)

    def chartqa(answers):
        return score("chartqa", [{"answers": answers, "prediction": answer}]).main

    assert chartqa([*references, more]) >= chartqa(references)


@given(st.floats(0.01, 1e6), st.floats(-0.2, 0.2))
def test_relaxed_accuracy_is_five_per_cent(right, error):
    if abs(abs(error) - 0.05) > 1e-6:
        assert text_match.relaxed_match(repr(right * (1 + error)), repr(right)) == (abs(error) < 0.05)


@few
@given(st.sampled_from(["cat", "two dogs", "yes", "2"]), ANSWERS, st.randoms())
def test_soft_accuracy_does_not_depend_on_the_order_of_references(answer, references, random):
    shuffled = list(references)
    random.shuffle(shuffled)
    for rules in ("official", "vlmevalkit", "lmms-eval", "lmms-eval-textvqa"):
        first = vqa.leave_one_out(answer, references, rules)
        assert first == pytest.approx(vqa.leave_one_out(answer, shuffled, rules))
        assert 0 <= first <= 1


@few
@given(st.text(alphabet="abc theone1,.'-/ ", max_size=20))
def test_normalised_answers_are_lower_case_words_without_articles(raw):
    for rules in ("official", "vlmevalkit", "lmms-eval", "lmms-eval-textvqa"):
        words = vqa.normalize(raw, rules).split()
        assert not {"a", "an", "the", "one"} & set(words)
        assert " ".join(words) == vqa.normalize(raw, rules)


# --- yes or no -------------------------------------------------------------------------------------------------------


def f1_by_definition(true, found):
    """F1 of "Yes" as the harmonic mean of two fractions of sets of positions."""
    positive = {i for i, answer in enumerate(true) if answer == "Yes"}
    said = {i for i, answer in enumerate(found) if answer == "Yes"}
    if not positive & said:
        return 0.0
    return 2 / (len(said) / len(positive & said) + len(positive) / len(positive & said))


@few
@given(st.lists(st.tuples(st.sampled_from(["Yes", "No"]), YES_NO), min_size=1, max_size=20))
def test_pope_is_f1(pairs):
    rows = [
        {"index": i, "category": "random", "answer": right, "prediction": answer}
        for i, (right, answer) in enumerate(pairs)
    ]
    scores = yes_no.score_pope(rows)
    found = [yes_no.yes_no(answer) for _, answer in pairs]
    assert scores.main == pytest.approx(100 * f1_by_definition([right for right, _ in pairs], found))
    assert scores.groups["random"] == scores.overall
    clear = [
        {"answer": right, "prediction": answer, "question_id": i}
        for i, (right, answer) in enumerate(pairs)
        if answer in ("Yes", "No")
    ]
    if clear:  # where all answers are plain, all rules agree
        ours = {rules: score("pope", [row | {"category": "x"} for row in clear], rules).main for rules in RULES}
        assert len({round(value, 9) for value in ours.values()}) == 1


RULES = ("vlmevalkit", "lmms-eval", "official")


def mme(answers):
    tasks = (*yes_no.MME_PERCEPTION, *yes_no.MME_REASONING)
    for number, pair in enumerate(answers):
        for right, answer in zip(("Yes", "No"), pair, strict=True):
            image = f"{number}.jpg"
            row = {"category": tasks[number % len(tasks)], "image_path": image, "question_id": image, "answer": right}
            yield row | {"prediction": answer}


@few
@given(st.lists(st.tuples(YES_NO, YES_NO), min_size=14, max_size=30))
def test_mme_accuracy_plus_is_at_most_accuracy(answers):
    rows = list(mme(answers))
    for rules in ("vlmevalkit", "lmms-eval"):
        scores = yes_no.score_mme(rows, rules=rules)
        assert all(task["acc+"] <= task["acc"] for task in scores.groups.values())
        assert scores.main == pytest.approx(sum(task["score"] for task in scores.groups.values()))
        assert 0 <= scores.main <= 2800


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), YES_NO), min_size=1, max_size=20))
def test_hallusionbench_groups_are_no_easier_than_their_worst(rows):
    table = [
        {"index": f"hb_VD_math_{a}_{b}_{c}-{i}", "answer": "Yes", "prediction": answer, "l2-category": "math"}
        for i, (a, b, c, answer) in enumerate(rows)
    ]
    overall = score_hallusion(table).overall
    if overall["aAcc"] in (0, 100):
        assert overall["fAcc"] == overall["qAcc"] == overall["aAcc"]
    # A figure that is all right has a right answer.
    assert (overall["fAcc"] > 0) <= (overall["aAcc"] > 0)


# --- multiple choice -------------------------------------------------------------------------------------------------

OPTIONS = ("oak", "pine", "birch", "maple")


def rotations(index, right, answer_of):
    """A question's circular copies; ``answer_of(letters)`` answers one, letter → text."""
    for k in range(len(OPTIONS)):
        texts = OPTIONS[k:] + OPTIONS[:k]
        options = dict(zip(string.ascii_uppercase, texts, strict=False))
        letter = next(name for name, option in options.items() if option == right)
        prediction = answer_of(options)
        yield {"index": index + k * 1_000_000, **options, "answer": letter, "prediction": prediction, "category": "c"}


def letter_of(tree):
    return lambda options: next(name for name, option in options.items() if option == tree)


@few
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(OPTIONS)), min_size=1, max_size=5), st.randoms())
def test_permuting_options_leaves_the_circular_score(questions, random):
    table = [row for i, (right, said) in enumerate(questions) for row in rotations(i, right, letter_of(said))]
    expected = sum(right == said for right, said in questions) / len(questions)
    renamed = []
    for row in table:
        order = random.sample("ABCD", 4)
        new = {name: row[old] for name, old in zip("ABCD", order, strict=True)}
        answer, said = (next(n for n, o in new.items() if o == row[row[key]]) for key in ("answer", "prediction"))
        renamed.append(row | new | {"answer": answer, "prediction": said})
    random.shuffle(renamed)
    for rules in ("vlmevalkit", "lmms-eval"):
        assert score("mmbench", table, rules).main == pytest.approx(100 * expected)
        assert score("mmbench", renamed, rules).main == pytest.approx(100 * expected)


@few
@given(st.lists(st.sampled_from(["A", "B", "C", "D", "oak", "none of them", "A or B"]), min_size=4, max_size=4))
def test_circular_is_at_most_vanilla(answers):
    said = iter(answers)
    table = list(rotations(0, "oak", lambda _: next(said)))
    circular, vanilla = score("mmbench", table), score("choice", table)
    assert circular.main <= vanilla.main
    assert circular.main == 100 * min(vanilla.rows)
    assert [row is None for row in circular.rows] == [False, True, True, True]
    assert set(circular.judge) <= set(vanilla.judge)


@few
@given(st.text(alphabet="ABCD.()[]: aoknpie", max_size=15))
def test_a_letter_is_one_of_the_options(answer):
    options = dict(zip("ABC", OPTIONS, strict=False))
    assert kit_choice.letter(answer, options) in {*options, "Z", None}
    assert lmms_choice.extract_letter(answer, "ABC") in {*options, ""}
    assert lmms_choice.mmbench_letter(answer, options) in {*"ABCDE", None}
    for rules in ("official", "lmms-eval"):
        assert mmmu.choice(answer, options, rules=rules) in {*options, None}


@pytest.mark.parametrize("name", "ABCD")
def test_a_bare_letter_is_itself_by_all_rules(name):
    options = dict(zip("ABCD", OPTIONS, strict=True))
    assert (
        kit_choice.letter(name, options)
        == lmms_choice.extract_letter(name)
        == lmms_choice.mmbench_letter(name, options)
        == name
    )
    assert mmmu.choice(name, options) == mmmu.choice(name, options, rules="lmms-eval") == name
