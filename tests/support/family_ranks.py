"""Two steps of unlike families, whole and in shards; tests compare one rank and two.

Four are taught by the next one each. The last is its own teacher and sees with frozen parts: what it sees is seen once.
Then models with experts are loaded whole and in shards, and compared.

    python tests/support/family_ranks.py FOLDER                                       one
    deepspeed --num_gpus 2 tests/support/family_ranks.py FOLDER                       two ranks

In FOLDER: each family's model under its name, and ``data``. Writes FOLDER/ranks{world}/{family}_zero{stage}.json,
and FOLDER/ranks{world}/sharded.json.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import families
import tiny
import torch
from safetensors.torch import load_file

from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer
from vlm_distill.training.engine import load_sharded

FAMILIES = ("qwen2_5_vl", "gemma3", "smolvlm", "internvl", "qwen3_vl")
STAGES = (0, 2, 3)
#: Teachers of which each rank loads its share; `_wide` has expert matrices that are not square.
SHARDED = ("qwen3_vl_moe", "qwen3_vl_moe_wide", "qwen3_5_moe")


def main(folder: Path) -> None:
    processes = Processes("cpu")
    *four, last = FAMILIES
    teachers = dict(zip(four, [*four[1:], four[0]], strict=True)) | {last: last}
    for student, stage in itertools.product(FAMILIES, STAGES):
        out = folder / f"ranks{processes.world}" / f"{student}_zero{stage}"
        if processes.first:
            shutil.rmtree(out, ignore_errors=True)
        processes.barrier()
        plain = tiny.config(
            out,
            folder / "data" / "data.jsonl",
            folder / teachers[student],
            student={"path": str(folder / student), **({"train": ["decoder"]} if student == last else {})},
            loss=[{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}],
            # Moments of tiny gradients make steps of the learning rate whatever their size, rounding too.
            optimizer={"lr": 1e-3, "eps": 1e-4, "schedule": "constant"},
            data__max_length=2048,
            training__steps=2,
            # ZeRO-3 shards the smallest parameters too, which DeepSpeed would keep whole.
            deepspeed={"stage": stage, "zero_optimization": {"stage3_param_persistence_threshold": 0}},
        )
        trainer = Trainer(RunConfig.model_validate(plain), processes)
        assert trainer.shared_vision == (student == last)
        trainer.run()
        state = trainer.engine.whole_state(trainer.student)
        if processes.first:
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            result = {
                "lines": [line for line in lines if line["kind"] == "train"],
                "weights": {name: tensor.float().flatten()[:64].tolist() for name, tensor in state.items()},
                "saved": sorted(load_file(out / "student" / "model.safetensors")),
            }
            out.with_suffix(".json").write_text(json.dumps(result))
    differences = {name: sharded_difference(folder / name, processes) for name in SHARDED}
    if processes.first:
        (folder / f"ranks{processes.world}" / "sharded.json").write_text(json.dumps(differences))
    processes.close()


def sharded_difference(folder: Path, processes: Processes) -> float:
    """The largest difference of hidden states between a model loaded whole and in shards, over their largest."""
    whole = load_vlm(folder, dtype="fp32").eval()
    _, forward = load_sharded(lambda: load_vlm(folder, dtype="fp32"), torch.float32, processes)
    inputs = whole.processor.collate([whole.processor.dummy()])
    positions = torch.arange(inputs["input_ids"].numel())
    with torch.no_grad():
        expected, got = whole(inputs, positions).hidden, forward(inputs, positions).hidden
    return float((got - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    with families.num2words():
        main(Path(sys.argv[-1]))
    leave(0)
