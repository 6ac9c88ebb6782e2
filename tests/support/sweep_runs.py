"""Finished runs of a sweep without training: as folders, and as a program in the place of ``vlm-distill``.

``python sweep_runs.py train CONFIG key=value …`` takes training.steps steps of 50 ms, keeps the number of steps it has
done in ``steps``, and resumes there. A student of seed 13 is never finished. ``python sweep_runs.py sweep FILE JOBS``
runs a whole sweep of such runs.
"""

import json
import signal
import sys
import time
from pathlib import Path

from vlm_distill.config.file import load_config, save_config
from vlm_distill.runtime.launch import guarded
from vlm_distill.sweeping.command import run_sweep, show_table
from vlm_distill.sweeping.grid import read_sweep
from vlm_distill.sweeping.record import record_of

BAD_SEED = 13


def finish(run, exact, *, seconds=10.0, teacher=2000, data="test"):
    """Write a sweep's run as if it had been trained."""
    run.folder.mkdir(parents=True)
    config = load_config(run.config, run.overrides)
    return write_finished(config, run.folder, exact, seconds=seconds, teacher=teacher, data=data)


def add_answers(run, rng, questions=80):
    """Give a finished run answers that are right as often as its score says, four to a picture, and curves."""
    # Imported here: a stub that imports PyTorch takes seconds to start.
    from vlm_distill.evaluation.predictions import Prediction
    from vlm_distill.evaluation.source_scores import write_answers

    student = run.folder / "evaluation/test/student"
    exact = json.loads((student / "scores.json").read_text())["exact"]
    answers, lines = [], []
    for k in range(questions):
        right = float(rng.random() < exact)
        answers.append(Prediction(k, "test", k + 1, f"q{k}", ["a"], "a", 1.0, right, right, "kind", f"{k // 4}.png"))
    write_answers(student, answers)
    for step in range(1, 41):
        lines.append({"kind": "train", "step": step, "loss": 1 / step, "taid/t": 0.4 + step / 80 + rng.random() / 50})
        if step % 10 == 0:
            score = exact - 0.3 / step + 0.01 * rng.random()
            lines.append({"kind": "eval", "step": step, "data": "test", "exact": score, "n": questions})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_finished(config, folder, exact, *, seconds=10.0, teacher=2000, data="test"):
    save_config(config, folder / "config.yaml")
    scores = folder / "evaluation" / data / "student" / "scores.json"
    scores.parent.mkdir(parents=True)
    whole = {"n": 100, "exact": exact, "soft": exact, "interval": None}
    scores.write_text(json.dumps(whole | {"by_type": {"kind": whole}}))
    summary = {"seconds": seconds, "steps": 10, "memory": {"peak_bytes": 2**20}}
    summary["parameters"] = {"student": 1000, "trained": 1000, "teacher": teacher}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def stub(words):
    """The words that start a stub in the place of ``vlm-distill``."""
    if words[-2] == "--nproc":
        words = words[:-2]
    return [sys.executable, __file__, *words]


def train(path, overrides):
    config = load_config(path, overrides)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "steps"
    done = int(kept.read_text()) if kept.is_file() else 0
    with (folder / "starts").open("a") as file:
        file.write(f"{done}\n")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    while done < config.training.steps:
        if stopped:
            return 143
        time.sleep(0.05)
        done += 1
        kept.write_text(str(done))
    if config.training.seed == BAD_SEED:
        print("step 3 went well")
        print("vlm-distill: data.train: nothing is there", file=sys.stderr)
        return 2
    exact = 0.5 + 0.01 * config.training.seed + 0.1 * (config.loss[0].name == "taid")
    write_finished(config, folder, exact)
    return 0


def cache(path, overrides):
    config = load_config(path, overrides)
    folder = Path(config.teacher.cache.folder)
    folder.mkdir(parents=True)
    (folder / "filled").touch()
    return 0


def sweep(path, jobs):
    found = read_sweep(Path(path))
    run_sweep(found, int(jobs), 1, stub)
    show_table(record_of(found))


if __name__ == "__main__":
    command, path, *words = sys.argv[1:]
    if command == "sweep":
        sys.exit(guarded(lambda: sweep(path, *words)))
    guarded(lambda: None)  # like a rank, ends with the process that started it
    sys.exit({"train": train, "cache": cache}[command](path, words))
