"""One rank and several agree, broken images are counted, and what is written reads well."""

import json
from threading import Barrier, Thread

import pytest
import torch
from listed_images import Says, Tiny, broken, numbered, picture
from timm.data import create_transform

from data.errors import UserError
from vision.predict import Inference, Labels, in_words, predict
from vlm_distill.evaluation.compare import paired
from vlm_distill.evaluation.predictions import read_predictions
from vlm_distill.runtime.rank_share import RankShare


@pytest.fixture
def source():
    return broken()


def on_ranks(world, work):
    """Runs ``work(rank, all_gather)`` on threads that wait for each other as ranks do."""
    barrier, lists, results = Barrier(world), [None] * world, [None] * world

    def run(rank):
        def all_gather(mine):
            lists[rank] = mine
            barrier.wait()
            found = list(lists)
            barrier.wait()
            return found

        results[rank] = work(rank, all_gather)

    threads = [Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_a_classifier_sees_what_timm_shows_it(source):
    classifier = Tiny()
    predict(classifier, source, Inference(batch_size=64))
    i = classifier.inputs
    view = create_transform((3, *i.size), interpolation=i.interpolation, crop_pct=i.crop_pct, mean=i.mean, std=i.std)
    expected = torch.stack([view(picture(row)) for row in range(23) if row not in (4, 9)])
    assert torch.equal(classifier.seen[0], expected)


@pytest.mark.parametrize(("world", "batch"), [(2, 4), (3, 2), (5, 16)])
def test_any_number_of_ranks_gives_the_same_scores_and_files(source, tmp_path, world, batch):
    alone = predict(Tiny(), source, Inference(batch_size=batch))
    alone.write(tmp_path / "alone")
    seen = []

    def work(rank, all_gather):
        classifier = Tiny()
        found = predict(classifier, source, Inference(batch_size=batch), ranks=RankShare(rank, world, all_gather))
        seen.append(len(classifier.seen))
        found.write(tmp_path / f"rank{rank}")
        return found.scores

    results = on_ranks(world, work)
    assert all(scores == alone.scores for scores in results)
    assert len(set(seen)) == 1  # ranks that wait for each other would hang otherwise
    for name in ("scores.json", "predictions.jsonl"):
        for rank in range(world):
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / f"rank{rank}" / name).read_bytes()


def test_images_that_cannot_be_read_are_counted_and_told(source):
    found = predict(Tiny(), source, Inference(batch_size=5))
    assert found.scores["n"] == 21
    assert found.scores["skipped"] == {"not an image": 1, "label is missing": 1}
    assert [(p.source, p.line) for p in found.problems] == [("listed", 5), ("listed", 10)]


def test_workers_change_nothing(source):
    one, two = (predict(Tiny(), source, Inference(batch_size=5, workers=workers)) for workers in (0, 2))
    assert two.scores == one.scores
    assert two.predictions() == one.predictions()


def test_what_is_written(source, tmp_path):
    classifier = Tiny()
    classifier.train()
    found = predict(classifier, source)
    found.write(tmp_path / "student")
    found.write_gallery(tmp_path / "pictures")
    scores = found.scores
    assert classifier.training
    assert json.loads((tmp_path / "student" / "scores.json").read_text()) == scores
    assert set(scores) == {"kind", "n", "exact", "top5", "interval", "nll", "ece", "calibration", "by_type", "skipped"}
    predictions = read_predictions(tmp_path / "student" / "predictions.jsonl")
    assert [p.index for p in predictions] == [row for row in range(23) if row not in (4, 9)]
    assert sum(p.exact for p in predictions) / 21 == scores["exact"]
    assert all((p.answer == p.references[0]) == p.exact for p in predictions)
    assert all(p.image.startswith("sha256:") for p in predictions)
    assert len(list((tmp_path / "pictures").iterdir())) == 21
    assert paired(predictions, predictions).difference == 0


def test_a_limit_takes_an_even_share(source):
    found = predict(Tiny(), source, limit=4, keep_logits=True)
    assert sorted(found.logits) == [0, 5, 11, 17]


def test_a_student_is_compared_with_its_teacher():
    ours = torch.tensor([[2.0, 0, 1], [0, 1, 0], [0, 0, 3]])
    theirs = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 3]])
    source = numbered([0, 1, 2], "abc")
    # The teacher's outputs stand in another order, and it has one more.
    teacher = Says(torch.cat([theirs[:, [2, 0, 1]], torch.full((3, 1), 9.0)], 1))
    wrong = predict(teacher, source, labels=Labels([1, 2, 0]), keep_logits=True)
    assert wrong.scores["exact"] == 0
    scores = predict(Says(ours), source, teacher=wrong.logits).scores
    assert scores["agreement"] == 2 / 3
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    assert scores["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert "agrees with the teacher on 66.67%" in in_words(scores)
    with pytest.raises(ValueError, match="row 2"):
        predict(Says(ours), source, teacher={0: ours[0], 1: ours[1]})


def test_outputs_that_the_data_lack_compete_unless_told_otherwise(tmp_path):
    logits = torch.tensor([[0.0, 1, 5], [0, 3, 5]])
    source = numbered([0, 1], ["cat", "dog"])
    classifier = Says(logits, ("dog", "cat", "owl"))
    predict(classifier, source, labels=Labels([1, 0])).write(tmp_path)
    assert [p.answer for p in read_predictions(tmp_path / "predictions.jsonl")] == ["owl", "owl"]
    found = predict(classifier, source, labels=Labels([1, 0], only_mapped=True))
    found.write(tmp_path)
    scores = found.scores
    assert [p.answer for p in read_predictions(tmp_path / "predictions.jsonl")] == ["cat", "cat"]
    assert scores["exact"] == 0.5
    assert scores["nll"] == pytest.approx(
        float(-torch.tensor([[1.0, 0], [3, 0]]).log_softmax(-1)[[0, 1], [0, 1]].mean())
    )


def test_several_labels_may_be_right():
    source = numbered([0, 1, 2], "abc")
    right = {0: [1, 2], 1: [0], 2: [2]}
    scores = predict(Says(torch.eye(3)), source, labels=Labels(references=lambda item: right[item.label])).scores
    assert scores["exact"] == 1 / 3
    p = torch.eye(3).double().softmax(-1)
    assert scores["nll"] == pytest.approx(float(-(p[0, 1:].sum().log() + p[1, 0].log() + p[2, 2].log()) / 3))


def test_too_few_outputs_are_refused():
    with pytest.raises(UserError, match="4 classes need 4 outputs, but the classifier has 3") as error:
        predict(Says(torch.eye(3)), numbered([0], "abcd"))
    assert "\n" not in str(error.value)


def test_nothing_to_read_gives_no_score(source):
    source.items = [source.items[4], source.items[9]]
    scores = predict(Tiny(), source).scores
    assert (scores["n"], scores["exact"]) == (0, None)
    assert in_words(scores) == "no image could be read"


def test_training_draws_the_same_numbers_with_and_without_it(source):
    before = torch.get_rng_state()
    predict(Tiny(), source, Inference(batch_size=5, workers=1))
    assert torch.equal(torch.get_rng_state(), before)
