"""Runs on videos: student and teacher of different families see the same moments, and broken files are counted."""

import json

import clips
import families
import pytest
import tiny
import torch
from byte_tokenizer import make_tokenizer

from data.sample_images import load_images
from vlm_distill.config.sections import RunConfig
from vlm_distill.eval import main as evaluate
from vlm_distill.inspection import Inspection
from vlm_distill.planning import plan
from vlm_distill.run import Run
from vlm_distill.trainer import Trainer

pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    clips.write_data(folder)
    maker = families.Maker(make_tokenizer)
    for name in ("qwen2_5_vl", "llava_onevision", "llava"):
        maker.write(name, folder / name)
    return folder


def settings(folder, name, teacher="llava_onevision", **changes):
    changes = {
        "student": {"path": str(folder / "qwen2_5_vl")},
        "training__steps": 2,
        "data__max_length": 512,
        **changes,
    }
    plain = tiny.config(folder / name, folder / "data.jsonl", folder / teacher, **changes)
    plain["data"]["video"] = {"fps": 1, "max_frames": 4}
    plain["loss"] = [{"name": "forward_kl"}]
    return RunConfig.model_validate(plain)


@pytest.mark.parametrize(
    ("student", "changes"),
    [
        ("qwen2_5_vl", {"data__packing": True, "data__workers": 1}),
        ("qwen2_5_vl", {"student": {"train": ["projector", "decoder"]}}),
        ("llava", {}),
    ],
)
def test_a_run_learns_from_videos_and_counts_broken_ones(folder, processes, student, changes):
    changes = {**changes, "student": {"path": str(folder / student), **changes.get("student", {})}}
    teacher = "qwen2_5_vl" if "train" in changes["student"] else "llava_onevision"
    path = Trainer(settings(folder, f"{student}{len(changes)}{teacher}", teacher=teacher, **changes), processes).run()
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if line["kind"] == "train"]
    # A student that is its teacher, with one vision encoder for both, has nothing to learn.
    assert losses[0] < 1e-6 if teacher == student else all(0 < loss < 20 for loss in losses)
    problems = [json.loads(line) for line in (path / "problems.jsonl").read_text().splitlines()]
    assert {problem["line"]: problem["reason"] for problem in problems} == dict.fromkeys((4, 8, 12), "video is broken")


def test_both_models_see_the_same_moments(folder, processes):
    run = Run(settings(folder, "moments"), processes)
    run.prepare()
    conversation, frames = load_images(run.sources[0][0], run.load_image)
    (pair,) = run.collator.encode(conversation, frames)
    assert len(frames) == 3
    assert (pair.student.videos, pair.teacher.videos) == (1, 1)
    assert pair.student.tensors["video_grid_thw"].tolist() == [[2, 4, 4]]  # two pairs of frames, the last one twice
    shown = pair.teacher.tensors["pixel_values_videos"][0]
    assert len(shown) == 4  # of max_frames: LLaVA-OneVision stacks videos
    assert torch.equal(shown[2], shown[3])
    # A batch without a video or without an image gets a blank one of each: every rank runs the same modules.
    both = {"pixel_values", "pixel_values_videos"}
    for row in (0, 1, 2):
        batch = run.collator.batch(run.collator.encode(*load_images(run.sources[0][row], run.load_image)))
        assert both <= batch.student.inputs.keys()
        assert both <= batch.teacher.inputs.keys()


def test_a_plan_counts_the_tokens_of_videos(folder, processes):
    run = Run(settings(folder, "counted"), processes)
    run.prepare()
    rows = [run.collator.encode(*load_images(run.sources[0][row], run.load_image))[0] for row in range(3)]
    found = plan(settings(folder, "planned"), memory=1.0, device="cpu")
    assert found.sequences.longest == max(len(row.student.input_ids) for row in rows)
    assert found.flops > 0


def test_questions_about_videos_are_asked(folder, command, tmp_path):
    model, clip = folder / "qwen2_5_vl", folder / "clip.mp4"
    code, told, _ = command("ask", model, "-", "Which colour?", "--video", clip, "--max-new-tokens", "2")
    assert (code, told.count("%)")) == (0, 1)
    words = ["--model", str(model), "--data", str(folder / "data.jsonl"), "--max-new-tokens", "2", "--max-bad", "1"]
    sampled = ["--video-sampling", "{fps: 1, max_frames: 4}"]
    for more, left_out in (([], {"video file": 6}), (sampled, {"video is broken": 3})):
        out = tmp_path / str(len(more))
        assert evaluate([*words, *more, "--out", str(out)]) == 0
        scores = json.loads((out / "data" / "scores.json").read_text())
        assert (scores["n"], scores["skipped"]) == (12 - sum(left_out.values()), left_out)


def test_sampling_that_cannot_be_is_refused(command):
    code, _, said = command("eval", "m", "--data", "d", "--video-sampling", "{fps: 0}")
    assert code == 2
    assert "fps" in said


def test_an_inspection_shows_the_frames(folder):
    shown = Inspection(settings(folder, "inspected")).shown(12)
    assert sorted(len(sample.images) for sample in shown) == [0] * 6 + [1] * 3 + [3] * 3
