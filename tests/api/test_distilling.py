"""Distillation from Python: models and samples in memory, and a process that is left as it was."""

import json
import multiprocessing
import os
import signal
import warnings

import pytest
import tiny
import torch
import torch.distributed as dist
import tracker_clients
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import vlm_distill as vd

SECTIONS = {
    "training": {"batch_size": 8, "micro_batch_size": 4, "device": "cpu"},
    "optimizer": {"lr": 1e-2},
    "deepspeed": {"stage": 0},
    "evaluation": {"max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    tiny.write_llava(folder / "teacher", layers=3)
    tiny.write_llava(folder / "student", layers=2)
    tiny.write_data(folder / "data", text_only=(3,))
    return folder


def pair(path):
    """A model of Transformers with its processor, as a notebook has them."""
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)


def samples(folder):
    """The samples of the file, with Pillow images in place of paths."""
    records = [json.loads(line) for line in (folder / "data" / "data.jsonl").read_text().splitlines()]
    for record in records:
        if "image" in record:
            record["image"] = Image.open(folder / "data" / record["image"])
    return records


def distil(folder, output, data=None, **changes):
    data = folder / "data" / "data.jsonl" if data is None else data
    if type(data) is not dict:
        data = {"train": data, "workers": 0, "max_length": 64}
    models = {"student": folder / "student", "teacher": folder / "teacher"}
    return vd.distill(**{**models, **SECTIONS, "data": data, "steps": 3, "output": folder / output, **changes})


def losses_of(run):
    return [entry["loss"] for entry in run.metrics if entry["kind"] == "train"]


@pytest.fixture(scope="module")
def from_paths(folder):
    return distil(folder, "paths")


def surroundings():
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment, signals, torch.get_num_threads(), torch.get_rng_state().tolist(), dist.is_initialized()


def test_what_is_in_memory_teaches_as_files_do_and_stays_as_it_was(folder, from_paths, capfd):
    student, teacher = pair(folder / "student"), pair(folder / "teacher")
    student[0].model.vision_tower.requires_grad_(False)
    teacher[0].train()
    before = {name: weight.clone() for name, weight in student[0].state_dict().items()}
    around = surroundings()
    capfd.readouterr()

    run = distil(folder, "memory", student=student, teacher=teacher, data=samples(folder))

    assert capfd.readouterr() == ("", "")
    assert surroundings() == around
    assert losses_of(run) == losses_of(from_paths)
    assert all(torch.equal(weight, before[name]) for name, weight in student[0].state_dict().items())
    assert not any(p.requires_grad for p in student[0].model.vision_tower.parameters())
    assert all(p.requires_grad for p in teacher[0].parameters())
    assert teacher[0].training
    taught = run.student.model.state_dict()
    assert not torch.equal(taught["lm_head.weight"], before["lm_head.weight"])
    assert run.report().read_text().startswith("<!doctype html>")


def test_a_language_model_learns_from_a_data_set(folder, capfd):
    tiny.write_language_model(folder / "talks")
    texts = Dataset.from_list(
        [{"prompt": f"say {colour}", "completion": colour} for colour in tiny.COLOURS for _ in range(3)]
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "talks"),
        AutoTokenizer.from_pretrained(folder / "talks"),
    )
    teacher, loss = vd.load_vlm(folder / "talks"), [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}]
    capfd.readouterr()
    run = distil(folder, "texts", student=(model, tokenizer), teacher=teacher, loss=loss, data=texts)
    assert capfd.readouterr() == ("", "")
    first = run.metrics[0]
    assert first["forward_kl/loss"] == pytest.approx(0, abs=1e-5)
    assert first["cross_entropy/loss"] > 0


def test_the_same_call_returns_the_finished_run(folder, from_paths):
    written = (folder / "paths" / "student" / "model.safetensors").stat().st_mtime_ns
    again = distil(folder, "paths")
    assert again.folder == from_paths.folder
    assert (folder / "paths" / "student" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(vd.UserError, match=r"holds a run with other settings: loss\.0\.name"):
        distil(folder, "paths", loss="forward_kl")
    # Nothing is held: the folder can be used by another run at once.
    distil(folder, "paths")


def test_other_weights_under_the_same_name_do_not_resume(folder):
    student = pair(folder / "student")
    distil(folder, "named", student=student)
    with torch.no_grad():
        student[0].lm_head.weight.mul_(2)
    with pytest.raises(vd.UserError, match=r"student\.path: other weights in memory:student"):
        distil(folder, "named", student=student)


def test_ctrl_c_writes_a_checkpoint_and_the_same_call_continues(folder, from_paths, monkeypatch, capfd):
    from vlm_distill.training import loop

    plain, shown = loop.headline, []

    def interrupted(*args):
        shown.append(args)
        if len(shown) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(loop, "headline", interrupted)
    around = surroundings()
    capfd.readouterr()
    with pytest.raises(KeyboardInterrupt, match="make the same call again to continue"):
        distil(folder, "stopped")
    assert capfd.readouterr() == ("", "")
    assert surroundings() == around
    assert (folder / "stopped" / "checkpoints" / "step_2").is_dir()
    assert losses_of(distil(folder, "stopped")) == losses_of(from_paths)


def test_a_process_group_of_the_program_s_own_stays_open(folder, from_paths):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert losses_of(distil(folder, "grouped")) == losses_of(from_paths)
        assert dist.is_initialized()
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()


def test_workers_end_with_an_error(folder):
    data = {"train": samples(folder), "workers": 1, "bad_samples": "fail", "max_length": 64}
    data["train"][20] = {"conversations": "broken"}
    with pytest.raises(vd.UserError, match="data, line 21") as caught:
        distil(folder, "failed", data, steps=9)
    assert caught.tb is not None  # a notebook keeps it, and with it the frames
    assert multiprocessing.active_children() == []


def test_progress_and_trackers_are_shown_when_asked_for(folder, capfd, monkeypatch):
    clients = tracker_clients.install(monkeypatch)
    distil(folder, "shown", progress=True, training={**SECTIONS["training"], "trackers": ["trackio"]})
    assert [step for step, _ in clients.metrics["trackio"]] == [1, 2, 3]
    shown = capfd.readouterr().err
    assert "shown: 100%" in shown
    assert "3/3" in shown
    assert "student written to" in shown
    assert "trackio shows the run: this machine" in shown


def test_warnings_are_pythons_own(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distil(folder, "large", student=folder / "teacher", teacher=folder / "student", steps=1)
    assert "the student is larger than its teacher" in [str(warning.message) for warning in caught]


def test_several_sources_and_evaluation_data(folder):
    records = samples(folder)
    data = {
        "train": [records[:8], {"path": records[8:], "weight": 2.0, "name": "rest"}],
        "eval": Dataset.from_list([{"question": "say red", "answer": "red"}]),
        "workers": 0,
        "max_length": 64,
    }
    run = distil(folder, "two", data, steps=1)
    assert [entry["data"] for entry in run.metrics if entry["kind"] == "eval"] == ["eval"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": lambda f: pair(f / "student")[0]},
            r"^student: a Llava\w+ without its processor; give \(model, proc",
        ),
        ({"student": lambda f: 3}, "^student: give a name, a folder, .* found a int"),
        (
            {"teacher": lambda f: (pair(f / "teacher")[0].half(), pair(f / "teacher")[1])},
            "^teacher: is in torch.float16",
        ),
        (
            {"teacher": lambda f: {"path": pair(f / "teacher"), "chat_template": "x"}},
            "^chat_template: memory:teacher is loaded already",
        ),
        (
            {"data": lambda f: DatasetDict(train=Dataset.from_list([{"a": 1}]))},
            "^data: these are several splits, train",
        ),
        (
            {"data": lambda f: IterableDataset.from_generator(lambda: iter([]))},
            "^data: an IterableDataset has no length",
        ),
        ({"data": lambda f: 3}, "^data: give paths, lists of samples"),
        (
            {"data": lambda f: [{"nothing": "known"}]},
            "^data.train: none of the first 1 samples can be used: unknown lay",
        ),
        ({"optimiser": lambda f: {"lr": 1}}, "^optimiser: unknown key; did you mean 'optimizer'"),
        (
            {"training": lambda f: {"trackers": [{"name": "mlflow", "server": "https://me:hush@host"}]}},
            "^distill: training.trackers.0.server: holds user and password in a URL",
        ),
        ({"steps": lambda f: None}, "^training: say how long to train: set epochs or steps"),
        (
            {"student": lambda f: {"path": pair(f / "student"), "lora": {"merge": False}}},
            "^student.lora.merge: an adapter refers to a base on disk",
        ),
    ],
)
def test_mistakes_are_one_line(folder, changes, message):
    given = {name: make(folder) for name, make in changes.items()}
    models = {"student": folder / "student", "teacher": folder / "teacher", "data": samples(folder)}
    with pytest.raises(vd.UserError, match=message) as caught:
        vd.distill(**{**models, **SECTIONS, "steps": 1, "output": folder / "no", **given})
    assert "\n" not in str(caught.value)
