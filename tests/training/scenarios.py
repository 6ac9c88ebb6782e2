"""Training runs that tests compare, several in one launch because a launch costs twenty seconds.

    deepspeed --num_gpus 2 tests/training/scenarios.py FOLDER          two ranks
    python tests/training/scenarios.py FOLDER                          one

Writes FOLDER/ranks{world}/{scenario}.json: the metrics of every step, the weights' digest, and what each rank saw.
"""

import json
import shutil
import sys
import traceback
from pathlib import Path

import tiny
import torch

from vlm_distill.config import RunConfig
from vlm_distill.training.engine import Processes
from vlm_distill.training.trainer import Trainer

SHARED = {
    **{f"zero{stage}": {"deepspeed__stage": stage} for stage in range(4)},
    **{f"tied_zero{stage}": {"deepspeed__stage": stage, "student": tiny.settings(tied=True)} for stage in (0, 2, 3)},
    # One rank's micro-batch has no picture, another's holds nothing at all, and the tower trains.
    **{f"mixed_zero{stage}": {"deepspeed__stage": stage, "data": "mixed"} for stage in (0, 2, 3)},
    "checkpointing_zero2": {"deepspeed__stage": 2, "training__activation_checkpointing": True},
    "frozen_zero2": {"deepspeed__stage": 2, "student": {**tiny.settings(), "train": ["projector", "decoder"]}},
}
TWO_RANKS = {
    "shard_zero2": {"deepspeed__stage": 2, "teacher": "shard"},
    "shard_zero3": {"deepspeed__stage": 3, "teacher": "shard"},
    "bf16_zero0": {"deepspeed__stage": 0, "training__dtype": "bf16"},
    "bf16_zero2": {"deepspeed__stage": 2, "training__dtype": "bf16"},
    "bf16_zero3": {"deepspeed__stage": 3, "training__dtype": "bf16"},
    "eval_zero3": {"deepspeed__stage": 3, "data": "eval"},
    "shard_mixed_zero3": {"deepspeed__stage": 3, "teacher": "shard", "data": "mixed_eval"},
}


def main(folder: Path) -> None:
    processes = Processes("cpu")
    if processes.first:
        tiny.write_data(folder / "plain")
        tiny.write_data(folder / "mixed", text_only=(0, 1, 2, 3, 8, 9, 14, 15), broken=(4, 5, 6, 7, 20))
        tiny.write_teacher(folder / "teacher")
    processes.barrier()
    for name, changes in (SHARED | (TWO_RANKS if processes.world > 1 else {})).items():
        out = folder / f"ranks{processes.world}" / name
        if processes.first:
            shutil.rmtree(out, ignore_errors=True)
        try:
            result = run(folder, out, dict(changes), processes)
        except Exception:
            result = {"error": traceback.format_exc()}
        if processes.first:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".json").write_text(json.dumps(result))
        if "error" in result:
            print(name, result["error"], file=sys.stderr, flush=True)
            sys.exit(1)
    processes.close()


def run(folder: Path, out: Path, changes: dict, processes: Processes) -> dict:
    kind = changes.pop("data", "plain")
    data = folder / kind.removesuffix("_eval").replace("eval", "plain") / "data.jsonl"
    plain = tiny.config(out, data, folder / "teacher", **{k: v for k, v in changes.items() if k != "teacher"})
    if "teacher" in changes:
        plain["teacher"]["placement"] = changes["teacher"]
    if kind.endswith("eval"):
        plain["data"]["eval"] = [{"path": str(data), "name": "questions", "limit": 13}]
    trainer = Trainer(RunConfig.model_validate(plain), processes)
    before = {name: tensor.clone() for name, tensor in trainer.engine.whole_state(trainer.student).items()}
    trainer.run()
    state = {name: tensor.clone() for name, tensor in trainer.engine.whole_state(trainer.student).items()}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if processes.first else []
    return {
        "metrics": metrics,
        "weights": {name: tensor.float().flatten()[:64].tolist() for name, tensor in state.items()},
        "t": processes.gather([t.loss.metrics()["t"] for t in trainer.terms if "t" in t.loss.metrics()]),
        "moved": {name: not torch.equal(tensor, before[name]) for name, tensor in state.items()},
        "teacher_keys": [k for k in trainer.engine.task.state_dict() if "teacher" in k],
    }


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    main(Path(sys.argv[-1]))
