"""Runs that differ by their seed alone are one training, compared across seeds and questions."""

import numpy as np
import pytest
import yaml
from run_files import GOOD

from vlm_distill.evaluation.crossed import compare_crossed, crossed_interval
from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.evaluation.seed_groups import compare_groups, group_by_seed
from vlm_distill.evaluation.source_scores import write_answers


def answers(right, images=None):
    """Predictions to questions, right where ``right`` is true."""
    found = []
    for k, value in enumerate(right):
        image = None if images is None else images[k]
        said, score = "a" if value else "b", float(value)
        found.append(Prediction(k, "test", k + 1, f"q{k}", ["a"], said, 1.0, score, score, image=image))
    return found


def by_seed(rows, images=None):
    return {seed: answers(row, images) for seed, row in enumerate(rows)}


def write_run(folder, right, seed, loss="taid", **more):
    folder.mkdir(parents=True)
    settings = GOOD | {"loss": [{"name": loss}], "training": {"seed": seed, "steps": 10}, "output": str(folder)} | more
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    write_answers(folder / "evaluation/test/student", answers(right))
    return folder


def draw(rng, skill, questions=300):
    return rng.random(questions) < skill


def test_runs_are_grouped_by_what_they_share_but_the_seed(tmp_path):
    right = [True] * 4
    runs = [write_run(tmp_path / "runs" / loss / f"seed{k}", right, k, loss) for k in (0, 1) for loss in ("taid", "kd")]
    groups = group_by_seed(runs)
    assert [(group.name, list(group.members)) for group in groups] == [("taid", [0, 1]), ("kd", [0, 1])]
    # Other folders are grouped alike; equal runs, perhaps of two versions, stay apart.
    others = [write_run(tmp_path / name, right, seed) for name, seed in (("a", 0), ("b", 1), ("again", 0))]
    assert [list(group.members.values()) for group in group_by_seed(others)] == [others[:2], others[2:]]


def test_models_without_a_configuration_are_groups_of_their_own(tmp_path):
    for name in "ab":
        write_answers(tmp_path / name, answers([True]))
    assert [group.name for group in group_by_seed([tmp_path / "a", tmp_path / "b"])] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]


def test_compare_says_better_worse_and_how_many_seeds(tmp_path, command):
    rng = np.random.default_rng(0)
    skills = {"taid": 0.9, "kd": 0.7, "ctkd": 0.71}
    runs = []
    for loss, skill in skills.items():
        runs += [write_run(tmp_path / loss / f"seed{k}", draw(rng, skill), k, loss) for k in range(4)]
    code, said, _ = command("compare", *runs)
    assert code == 0
    lines = [line.split() for line in said.splitlines()]
    (taid,) = [line for line in lines if line[:2] == ["taid", "kd"]]
    (none,) = [line for line in lines if line[:2] == ["kd", "ctkd"]]
    assert "better" in taid
    assert none[-4:-1] == ["no", "difference", "shown"]
    assert none[-1] == "1,000" or int(none[-1]) > 1
    assert said.count("taid") == 3  # its mean, and two pairs


def test_one_seed_is_never_compared_with_another(tmp_path, command):
    rng = np.random.default_rng(0)
    runs = [write_run(tmp_path / "taid" / f"seed{k}", draw(rng, 0.8), k) for k in range(3)]
    _, said, _ = command("compare", *runs)
    assert "differ only by their seed" in said
    assert "McNemar" not in said


def test_only_questions_that_all_runs_answered_count(tmp_path):
    runs = [write_run(tmp_path / "a" / f"seed{k}", [1, 1, 0, 0], k) for k in (0, 1)]
    runs += [write_run(tmp_path / "b" / f"seed{k}", [0, 1], k, "kd") for k in (0, 1)]
    groups, (pair,) = compare_groups(group_by_seed(runs))
    assert [group.mean for group in groups] == [1.0, 0.5]
    assert pair.crossed.questions == 2


def test_shared_seeds_alone_are_paired():
    rng = np.random.default_rng(1)
    a = {seed: answers(draw(rng, 0.8)) for seed in (0, 1, 2)}
    b = {seed: answers(draw(rng, 0.8)) for seed in (1, 2, 3)}
    whole = compare_crossed(a, b)
    shared = compare_crossed({s: a[s] for s in (1, 2)}, {s: b[s] for s in (1, 2)})
    assert whole == shared
    assert compare_crossed({0: a[0]}, b) is None
    other = compare_crossed({0: a[0], 1: a[1]}, {2: b[2], 3: b[3]})
    assert other.low < other.difference < other.high


def test_questions_about_one_picture_are_drawn_together():
    rng = np.random.default_rng(2)
    right = np.repeat(rng.random((3, 10)) < 0.5, 20, axis=1)
    wrong = np.repeat(rng.random((3, 10)) < 0.5, 20, axis=1)
    images = [f"{k // 20}.png" for k in range(200)]
    by_picture = compare_crossed(by_seed(right, images), by_seed(wrong, images))
    by_question = compare_crossed(by_seed(right), by_seed(wrong))
    assert (by_picture.questions, by_picture.pictures) == (200, 10)
    assert by_question.pictures == 200
    assert by_picture.high - by_picture.low > by_question.high - by_question.low


def simulate(rng, seeds, questions, seed_effect, question_effect):
    """Differences of single answers ``[seeds, questions]`` of two settings that are equal on average."""
    parts = []
    for _ in range(2):
        size = rng.normal(0, seed_effect, (seeds, 1)) + rng.normal(0, question_effect, (1, questions))
        parts.append(size + rng.normal(0, 1, (seeds, questions)) > 0)
    return parts[0].astype(float) - parts[1]


@pytest.mark.parametrize(("seeds", "seed_effect", "question_effect"), [(3, 0.3, 0.3), (5, 0.1, 0.5)])
def test_intervals_hold_the_true_difference_in_19_of_20_studies(seeds, seed_effect, question_effect):
    rng, studies, questions = np.random.default_rng(seeds), 2000, 200
    counts = np.ones(questions, int)
    held = 0
    for _ in range(studies):
        _, low, high = crossed_interval([simulate(rng, seeds, questions, seed_effect, question_effect)], counts, 1000)
        held += low <= 0 <= high
    assert held / studies == pytest.approx(0.95, abs=0.02)
