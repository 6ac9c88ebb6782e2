"""Optimizer steps: the same for any split over ranks, micro-batches and workers; bad samples skipped or fatal."""

import json
from functools import partial

import pytest
import torch
from PIL import Image

from data.batch import Problem
from data.collate import Collator
from data.errors import UserError
from data.images import load_image
from data.loader import ProblemLog, StepDataset, StepSplit
from data.mixture import Mixture
from data.workers import make_loader


@pytest.fixture
def steps(processor, questions):
    """A step dataset over 21 samples in steps of 8."""
    source = questions(21, length=lambda i: 1 + i % 4)

    def make(world=1, rank=0, micro=2, accumulation=4, source=source, max_length=50, **options):
        mixture = Mixture([source], seed=5, batch_size=8, window=2)
        collator = Collator(processor(), processor(system=1), max_length)
        return StepDataset(mixture, collator, StepSplit(micro, accumulation, rank, world), **options)

    return make


def content(batch):
    return [
        batch.samples,
        *(t.tolist() for t in (batch.targets, batch.distilled, batch.student.positions, batch.teacher.positions)),
        *(rows.inputs["input_ids"].tolist() for rows in (batch.student, batch.teacher)),
    ]


def contents(loader):
    return [(step.index, step.tokens, step.problems, [content(b) for b in step.batches]) for step in loader]


def test_one_rank_by_four_is_two_by_two_is_four_by_one(steps):
    for index in range(6):
        whole = [content(b) for b in steps()[index].batches]
        assert len(whole) == 4
        two = [steps(world=2, rank=rank, accumulation=2)[index].batches for rank in range(2)]
        assert [content(two[g % 2][g // 2]) for g in range(4)] == whole
        four = [steps(world=4, rank=rank, accumulation=1)[index].batches for rank in range(4)]
        assert [content(four[g][0]) for g in range(4)] == whole


def test_an_epoch_sees_each_row_once(steps):
    answers = []
    for index in range(3):
        for batch in steps()[index].batches:
            text = "".join(" " if t == 4 else chr(t) for t in batch.targets.tolist())
            answers += text.split()
    assert sorted(map(int, answers)) == list(range(21))


def test_small_samples_are_encoded_together_and_photographs_alone(steps, write_jsonl, monkeypatch):
    sizes = {"icon.png": (30, 30), "photo.png": (1200, 900)}
    rows = [{"question": "?", "answer": "a", "image": name} for name in sizes for _ in range(4)]
    dataset = steps(
        source=write_jsonl(rows, "train"),
        micro=8,
        accumulation=1,
        load=lambda source: Image.new("RGB", sizes[source.rpartition("/")[2]]),
    )
    together, encode = [], Collator.encode_all
    monkeypatch.setattr(Collator, "encode_all", lambda self, samples: together.append(samples) or encode(self, samples))
    assert dataset[0].batches[0].samples == 8
    assert sum(map(len, together)) == 8
    # A photograph ends a group, so that two are never in one.
    photographs = [[sample.images[0].width for sample in group].count(1200) for group in together]
    assert photographs == [1, 1, 1, 1, 0][: len(photographs)]


def test_the_smaller_last_step_keeps_its_number_of_micro_batches(steps):
    last = steps()[2]
    assert [batch.samples for batch in last.batches] == [2, 2, 1, 0]
    assert len(last.batches[3].student.inputs["input_ids"]) == 1
    assert last.counts() == {
        "supervised": sum(len(b.targets) for b in last.batches),
        "distilled": last.counts()["supervised"],
        "images": sum(b.images for b in last.batches),
        "image_tokens": sum(len(b.student.image_tokens) for b in last.batches),
        "matched_tokens": 0,
        "image_samples": sum(int((b.student.image_counts > 0).sum()) for b in last.batches),
        "supervised_samples": 5,
        "distilled_samples": 5,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_steps(steps, workers):
    expected = contents(make_loader(steps(), 0, 7))
    assert [c[0] for c in expected] == list(range(7))
    assert contents(make_loader(steps(), 0, 7, workers=workers, prefetch=1)) == expected


def test_a_resumed_loader_gives_the_rest(steps):
    expected = contents(make_loader(steps(), 0, 6))
    assert contents(make_loader(steps(), 4, 6, workers=2)) == expected[4:]


def test_the_loader_takes_no_random_number(steps):
    before = torch.get_rng_state()
    list(make_loader(steps(), 0, 2))
    list(make_loader(steps(), 0, 2, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


# Bad samples.


@pytest.fixture
def flawed(write_jsonl, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "big.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    return write_jsonl(
        [
            {"question": "fine", "answer": "a", "image": "good.png"},
            b"{broken",
            {"question": "fine", "answer": "b", "image": "missing.png"},
            {"question": "fine", "answer": "c", "image": "big.png"},
            {"question": "x" * 60, "answer": "d"},
            {"question": "fine", "answer": "e"},
        ]
    )


def read_all(dataset):
    found = [dataset[index] for index in range(dataset.mixture.steps_per_epoch)]
    return found, sorted((p for step in found for p in step.problems), key=lambda p: p.line)


def test_skip_leaves_the_batch_smaller_and_says_what_is_missing(steps, flawed):
    found, problems = read_all(steps(source=flawed, load=partial(load_image, max_pixels=100)))
    assert [(p.source, p.line, p.reason) for p in problems] == [
        ("train", 2, "invalid JSON"),
        ("train", 3, "image not found"),
        ("train", 4, "image is too large"),
        ("train", 5, "too long"),
    ]
    assert sum(batch.samples for step in found for batch in step.batches) == 2
    targets = torch.cat([batch.targets for batch in found[0].batches]).tolist()
    assert sorted(targets) == [4, 4, ord("a"), ord("e")]


def test_roots_are_kept(steps, flawed, tmp_path):
    _, problems = read_all(steps(source=flawed, load=partial(load_image, roots=[tmp_path / "elsewhere"])))
    assert [p.line for p in problems if p.reason == "image outside the roots"] == [1, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_fail_is_one_line_from_any_process(steps, write_jsonl, workers):
    source = write_jsonl([{"question": "q", "answer": str(i)} for i in range(20)] + [{"question": "q", "answer": " "}])
    dataset = steps(source=source, on_bad="fail")
    bad = next(i for i in range(3) if (0, 20) in dataset.mixture.samples_of(i))
    loader = make_loader(dataset, 0, 3, workers=workers)
    for _ in range(bad):
        next(loader)
    with pytest.raises(UserError) as caught:
        next(loader)
    assert str(caught.value).startswith("train, line 21: empty answer: message 2; ")
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_batch_size_must_divide_as_said(steps):
    with pytest.raises(UserError, match="batch size 8 is not"):
        steps(micro=3)


def test_samples_are_kept_when_asked_for(steps, flawed):
    assert steps(source=flawed)[0].conversations == []
    kept = steps(source=flawed, keep_conversations=True, load=partial(load_image, max_pixels=100))[0]
    assert [len(samples) for samples in kept.conversations] == [batch.samples for batch in kept.batches]
    found = [entry for samples in kept.conversations for entry in samples]
    seen = {conversation.references[0]: [image.size for image in images] for conversation, images in found}
    assert seen == {"a": [(2, 2)], "e": []}


def test_problem_log(tmp_path):
    path = tmp_path / "run" / "problems.jsonl"
    log = ProblemLog(path)
    assert log.summary() == "no samples left out"
    first = [Problem("a", 1, "too long", "9 tokens"), Problem("a", 2, "image not found", "x\ud83d.png")]
    log.add(first)
    log.add([first[0], Problem("b", 1, "too long"), Problem("a", 3, "too long")])
    assert log.counts == {("a", "too long"): 2, ("a", "image not found"): 1, ("b", "too long"): 1}
    assert log.summary() == "4 samples left out: a: too long (2), a: image not found (1), b: too long (1)"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"source": "a", "line": 1, "reason": "too long", "detail": "9 tokens"}
    assert [(line["source"], line["line"]) for line in lines] == [("a", 1), ("a", 2), ("b", 1), ("a", 3)]

    # Killed in the middle of a line, resumed, the same samples met again.
    path.write_bytes(path.read_bytes()[:-5])
    log = ProblemLog(path)
    assert log.counts.total() == 3
    log.add([*first, Problem("a", 3, "too long")])
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [1, 2, 1, 3]
