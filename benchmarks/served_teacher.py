"""How long a step waits for a teacher on a server: a tiny model behind the tests' server, each reply delayed.

    PYTHONPATH=.:tests/support python benchmarks/served_teacher.py [--delay 0.2] [--steps 8]

Prints the mean seconds of a step of 4 micro-batches of 4 samples: one request at a time, all of a
micro-batch at once, and those of the next step under way too, as `vlm-distill train` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import tiny
from scoring_server import serving

from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.models.served import ServedTeacher
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    ahead = ServedTeacher.prefetch
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = tiny.write_data(folder / "data", rows=64, text_only=tuple(range(64)))
        teacher = tiny.write_language_model(folder / "teacher")
        processes = Processes("cpu")
        with serving(load_vlm(teacher, dtype="float32").eval()) as server:
            for name, workers, way in (("alone", 1, None), ("micro-batch", 32, None), ("ahead", 32, ahead)):
                plain: dict[str, Any] = tiny.config(folder / name, data, teacher, loss=[{"name": "forward_kl"}])
                plain["student"] = {"decoder": tiny.settings()["decoder"], "tokenizer": "teacher"}
                plain["training"] |= {"steps": options.steps, "batch_size": 16, "micro_batch_size": 4}
                plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "workers": workers}
                plain["evaluation"]["teacher"] = False
                server.delay = 0.0
                trainer = Trainer(RunConfig.model_validate(plain), processes)
                server.delay = options.delay
                ServedTeacher.prefetch = way or (lambda self, steps: iter(steps))  # type: ignore[method-assign]
                trainer.run()
                lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
                ends = [line["seconds"] for line in lines if line["kind"] == "train"]
                spent = (ends[-1] - ends[0]) / (len(ends) - 1)
                print(f"{name}: {spent:.2f} s a step of 16 requests of {options.delay} s")
        processes.close()


if __name__ == "__main__":
    main()
