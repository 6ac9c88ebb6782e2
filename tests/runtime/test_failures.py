"""How a run ends when something breaks, in one line that names the cause and with nothing broken saved, or goes on."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from vlm_distill import train
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer
from vlm_distill.training.engine import Engine

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("failures") / "teacher")


@pytest.fixture
def run(tmp_path, teacher, capsys):
    """Trains in this process; gives the exit code and the last line of standard error."""

    def start(**changes):
        data = tmp_path / "data" / "data.jsonl"
        if not data.exists():
            tiny.write_data(tmp_path / "data")
        plain = tiny.config(tmp_path / "out", data, teacher, training__checkpoint_every=1, **changes)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
        code = train.main([str(tmp_path / "run.yaml")])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    return start


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (
            ("step_4", {"data": "24 rows"}),
            "/out: rank 0 finds no checkpoint there, rank 1 step_4; all machines",
        ),
        (
            ("no checkpoint", {"data": "20 rows"}),
            "data: data: rank 0 finds 24 rows, rank 1 20 rows; every machine",
        ),
    ],
)
def test_ranks_that_see_other_files_do_not_train_together(run, tmp_path, monkeypatch, others, says):
    """As where the run's folder, or the data, are on each machine's own disk and one of these is behind."""
    gather = Processes.gather
    monkeypatch.setattr(
        Processes, "gather", lambda self, item: [item, others] if isinstance(item, tuple) else gather(self, item)
    )
    code, line = run()
    assert code == 2
    assert says in line


def steps_saved(folder):
    return sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(run, tmp_path, monkeypatch):
    learn = Trainer.forward_batch

    def broken(self, step, micro, scales):
        loss, terms = learn(self, step, micro, scales)
        if step.index == 2 and micro is step.batches[1]:
            terms["cross_entropy"].loss.mul_(math.nan)
        return loss, terms

    monkeypatch.setattr(Trainer, "forward_batch", broken)
    code, line = run()
    assert code == 2
    rows = [row + 1 for _, row in third_step(tmp_path)[2:4]]
    place = f"rank 0, micro-batch 2 (data, lines {rows[0]}, {rows[1]})"
    assert f"step 3: cross_entropy is not finite, in {place}; nothing of this step is saved" in line
    assert steps_saved(tmp_path) == ["step_1", "step_2"]


def third_step(folder):
    """(source, row) of the third step."""
    from data.mixture import Mixture
    from data.opening import open_source

    source = open_source(folder / "data" / "data.jsonl")
    return Mixture([source], seed=0, batch_size=8, longest_first=True).samples_of(2)


def test_a_step_of_bad_samples_alone_says_nothing_to_the_losses(tmp_path, teacher):
    """TAID's t, which goes by how the loss changes, takes no step without a sample for one without a loss."""
    data = tiny.write_data(tmp_path / "data", broken=tuple(range(12)))
    changes = {"training__batch_size": 1, "training__micro_batch_size": 1, "training__steps": 12}
    changes["data__max_bad"] = 0.9
    processes = Processes("cpu")
    trainer = Trainer(RunConfig.model_validate(tiny.config(tmp_path / "out", data, teacher, **changes)), processes)
    trainer.run()
    processes.close()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["supervised_tokens"] > 0 for line in lines if line["kind"] == "train"} == {True, False}
    state = trainer.terms[0].loss.get_extra_state()
    assert state["previous"] > 0
    assert abs(state["momentum"]) < 0.1


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved(run, tmp_path, monkeypatch, stage, dtype):
    backward, calls = Engine.backward, []

    def broken(self, loss):
        calls.append(loss)
        # The value of the loss stays, and its gradient is 0 · infinity.
        backward(self, loss + torch.sqrt(0.0 * loss) if len(calls) == 9 else loss)

    monkeypatch.setattr(Engine, "backward", broken)
    code, line = run(deepspeed__stage=stage, training__dtype=dtype)
    assert code == 2
    assert "step 3: the gradient is not finite, though every loss is; nothing of this step is saved" in line
    assert steps_saved(tmp_path) == ["step_1", "step_2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_data_file_is_named(run, tmp_path, monkeypatch, workers):
    after_update = Trainer.after_update
    path = tmp_path / "data" / "data.jsonl"

    def remove(self, step):
        after_update(self, step)
        path.unlink(missing_ok=True)

    monkeypatch.setattr(Trainer, "after_update", remove)
    code, line = run(data__workers=workers, data__prefetch=1, training__steps=20)
    assert code == 2
    assert f"{path} cannot be read any more: No such file or directory; put it back" in line


def test_a_data_file_cut_short_is_named_and_not_taken_for_bad_samples(run, tmp_path, monkeypatch):
    path = tmp_path / "data" / "data.jsonl"

    def cut(self, step):
        os.truncate(path, 10)

    monkeypatch.setattr(Trainer, "after_update", cut)
    code, line = run()
    assert code == 2
    assert f"{path} ends before its line " in line
    assert not (tmp_path / "out" / "problems.jsonl").exists()


def test_a_killed_worker_is_told_in_one_line(run, monkeypatch):
    def kill(self, step):
        import multiprocessing

        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(Trainer, "after_update", kill)
    code, line = run(data__workers=1, data__prefetch=1, training__steps=50)
    assert code == 2
    assert "a worker that reads the data (process " in line
    assert "fewer data.workers" in line


def test_a_clock_set_back_turns_no_duration_negative(run, tmp_path, monkeypatch):
    hours = iter(range(100_000, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    data = [{"path": str(tmp_path / "data" / "data.jsonl"), "name": "questions", "limit": 4}]
    code, line = run(data__eval=data, evaluation__every=2)
    assert code == 0, line
    for line in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()):
        assert all(0 <= value < 300 for key, value in line.items() if key in ("seconds", "waiting"))
        assert all(value >= 0 for key, value in line.items() if key.endswith("_per_second"))
    assert 0 < json.loads((tmp_path / "out" / "summary.json").read_text())["seconds"] < 300


class Full:
    """A student's forward for which memory ends where a micro-batch has more than so many rows."""

    def __init__(self, rows):
        self.rows, self.forward = rows, Trainer.forward_batch

    def __get__(self, trainer, _):
        def forward_batch(step, micro, scales):
            if step.index >= 2 and micro.samples > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return self.forward(trainer, step, micro, scales)

        return forward_batch


def test_out_of_memory_names_the_micro_batch_and_remedies(run, monkeypatch):
    monkeypatch.setattr(Trainer, "forward_batch", Full(1))
    code, line = run()
    assert code == 3
    assert "out of memory in step 3, the forward of micro-batch 1 of 4, a micro-batch of 2 rows × " in line
    assert "with 2 images" in line
    assert "try training.micro_batch_size=1, training.recompute_logits=true" in line


def test_memory_that_ends_while_answers_are_drawn(run, monkeypatch):
    def full(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VisionLanguageModel, "answer", full)
    code, line = run(loss=[{"name": "jsd"}], on_policy={"fraction": 1.0})
    assert code == 3
    assert "out of memory in step 1, drawing answers: " in line
    assert "lower on_policy.batch_size, " in line


def test_the_cpus_memory_ends_alike(run, monkeypatch):
    monkeypatch.setattr(Trainer, "forward_batch", lambda *_: torch.empty(10**15))
    code, line = run(training__micro_batch_size=1, training__on_oom="halve")
    assert code == 3
    assert "training.on_oom: halve cannot help, the micro-batch is already 1" in line


def command(broken, *words):
    """``vlm-distill WORDS``, whose ranks are those of ``broken_ranks.py``."""
    code = f"import sys; sys.argv[0] = 'vlm-distill'; from vlm_distill import cli; {PATCHED}; cli.main()"
    paths = os.pathsep.join(map(str, [_ROOT, Path(__file__).parent, _ROOT / "tests" / "support"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "BROKEN": broken}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stderr


PATCHED = (
    "from vlm_distill.runtime import launch; real = launch.launch; "
    "launch.launch = lambda module, words, n: real('broken_ranks', words, n)"
)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_gpu_halves_the_micro_batch_and_resumes(tmp_path, teacher, ranks):
    data = tiny.write_data(tmp_path / "data")
    stories = []
    for name in ("straight", "full"):
        plain = tiny.config(
            tmp_path / name,
            data,
            teacher,
            training__checkpoint_every=1,
            training__on_oom="halve",
            deepspeed__stage=2 if ranks > 1 else 0,
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(plain))
        if name == "straight" and ranks == 1:
            assert train.main([str(tmp_path / f"{name}.yaml")]) == 0
        else:
            code, errors = command(name, "train", str(tmp_path / f"{name}.yaml"), "--nproc", str(ranks))
            assert code == 0, errors[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        stories.append([json.loads(line) for line in lines])
    assert "out of memory in step 3, " in errors
    assert "starting again with training.micro_batch_size=1 training.resume=true" in errors
    assert "resumed after step 2" in errors
    saved = yaml.safe_load((tmp_path / "full" / "config.yaml").read_text())
    assert saved["training"]["micro_batch_size"] == 1
    straight, full = ([line["loss"] for line in story if line["kind"] == "train"] for story in stories)
    assert full == pytest.approx(straight, rel=1e-5)


def test_a_killed_rank_ends_the_run_with_the_cause(tmp_path, teacher):
    plain = tiny.config(tmp_path / "out", tiny.write_data(tmp_path / "data"), teacher)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    code, errors = command("killed", "train", str(tmp_path / "run.yaml"), "--nproc", "2")
    assert code == 128 + signal.SIGKILL, errors[-3000:]
    said = [line for line in errors.splitlines() if line.startswith("vlm-distill")]
    assert len(said) == 1, errors
    assert re.search(r"rank 1 \(process \d+\) was killed by SIGKILL, .*; start the command again", said[0])
    assert "Traceback" not in errors
    assert "stopping: " not in errors
    assert not (tmp_path / "out" / "student").exists()
