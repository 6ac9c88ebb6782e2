"""Trainings of classifiers that tests compare, several in one launch because a launch costs twenty seconds.

    deepspeed --num_gpus 2 tests/vision/runs.py FOLDER          two ranks
    python tests/vision/runs.py FOLDER                          one

Writes FOLDER/ranks{world}/{name}.json: the metrics of every step, the weights, and what each rank saw.
"""

import json
import shutil
import sys
import traceback
from pathlib import Path

import pictures
import torch
from launches import is_slow
from safetensors.torch import load_file

from vision.classifier import load_classifier
from vision.config import ClassifierConfig
from vision.trainer import Trainer
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes

# ZeRO-3 shards the smallest parameters too, which DeepSpeed would keep whole.
WHOLLY_SHARDED = {"stage3_param_persistence_threshold": 0}
# With every micro-batch on another rank, those of all ranks together are one rank's.
GATHERED = {"training__gather": True, "training__micro_batch_size": None}
VIEWS = [
    {"crop": "pad", "color_jitter": 0},
    {"crop": "random_resized", "auto_augment": "rand-m9-mstd0.5-inc1"},
]
FEATURES = [
    {"name": "kd"},
    {"name": "attention_transfer", "layers": {1: 1, 2: 2}, "weight": 10.0},
    {"name": "similarity_preserving", "layers": {-1: -1}},
    {"name": "relational_kd", "weight": 0.1},
]
MIXED = {
    "data__mixing": {"mixup": 0.8, "cutmix": 1.0},
    "data__erasing": {"probability": 0.5},
    "loss": [{"name": "dkd", "warmup_epochs": 2}, {"name": "cross_entropy", "label_smoothing": 0.1}],
}
SHARED = {
    **{f"zero{stage}": {"deepspeed__stage": stage} for stage in range(4)},
    **{f"adamw_zero{s}": {"deepspeed__stage": s, "optimizer": {"name": "adamw", "lr": 1e-2}} for s in (0, 2)},
    **{
        f"ctkd_zero{s}": {"deepspeed__stage": s, "loss": [{"name": "ctkd", "grl_coefficient": -1.0, "t_range": 4.0}]}
        for s in (0, 2, 3)
    },
    "taid_zero0": {"loss": [{"name": "taid", "schedule": "adaptive"}, {"name": "cross_entropy"}]},
    "standardised_zero0": {"loss": [{"name": "kd", "standardise": True, "temperature": 2.0}]},
    "mixed_zero0": MIXED,
    "deit_zero0": {
        "student": pictures.vit(name="deit_tiny_distilled_patch16_224"),
        "loss": [{"name": "hard_labels"}, {"name": "cross_entropy"}],
        "data__repeats": 2,
    },
    # Losses of a batch, on the rows of all ranks.
    **{f"dist_zero{s}": {**GATHERED, "deepspeed__stage": s, "loss": [{"name": "dist"}]} for s in (0, 2)},
    "mlkd_zero0": {**GATHERED, "data__views": VIEWS, "loss": [{"name": "mlkd"}, {"name": "cross_entropy"}]},
    **{f"features_zero{s}": {**GATHERED, "deepspeed__stage": s, "loss": FEATURES} for s in (0, 3)},
    # A teacher of another size and normalisation.
    "other_teacher_zero0": {"teacher": "large"},
    # Some images cannot be read: a rank's micro-batch may hold nothing.
    "broken_zero0": {"images": "broken", "data__max_bad": 1.0},
    "broken_gathered_zero0": {
        **GATHERED,
        "images": "broken",
        "data__max_bad": 1.0,
        "loss": [*FEATURES, {"name": "dist"}],
        "optimizer__lr": 1e-3,
    },
    "cached_zero0": {"cache": "memory", "data__fixed_views": 2, "data__views": VIEWS, "training__steps": 12},
    "views_zero0": {"data__fixed_views": 2, "data__views": VIEWS, "training__steps": 12},
    "averaged_zero2": {"deepspeed__stage": 2, "training__ema": 0.5},
    "probe_zero0": {"student": pictures.vit(train="head"), "teacher": "large"},
    "checkpointing_zero0": {"training__activation_checkpointing": True},
}
BATCH_NORM = {
    "student": {"name": "cifar_resnet8x4", "image_size": 16},
    "loss": [{"name": "kd"}, {"name": "fitnet", "layers": {2: 1}}],
    "training__checkpoint_every": 2,
}
TWO_RANKS = {
    **{f"bf16_zero{s}": {"deepspeed__stage": s, "training__dtype": "bf16"} for s in range(4)},
    "batchnorm_zero2": {**BATCH_NORM, "deepspeed__stage": 2},
    "averaged_batchnorm_zero0": {**BATCH_NORM, "training__ema": 0.5},
    "channels_last_zero0": {**BATCH_NORM, "training__channels_last": True},
    "lamb_zero0": {"optimizer": {"name": "lamb", "lr": 1e-2}},
    "layer_decay_zero2": {"deepspeed__stage": 2, "optimizer": {"name": "adamw", "lr": 1e-2, "layer_decay": 0.5}},
}
# Stopped after two steps and started again, to be compared with the run that was not.
RESUMED = [*(f"zero{s}" for s in range(4)), "bf16_zero0", "bf16_zero2", "bf16_zero3", "batchnorm_zero2", "mixed_zero0"]
RESUMED += ["averaged_zero2", "averaged_batchnorm_zero0", "taid_zero0", "ctkd_zero2", "mlkd_zero0", "cached_zero0"]
TWO_RANKS |= {f"resumed_{name}": {**(SHARED | TWO_RANKS)[name], "stop": 2} for name in RESUMED}

#: Near to another one, on any number of ranks: `make test-slow` runs them, in a launch of their own.
NEAR = {
    *("zero1", "adamw_zero2", "layer_decay_zero2", "dist_zero2", "bf16_zero1", "bf16_zero2"),
    *("lamb_zero0", "standardised_zero0", "other_teacher_zero0"),
    # Of a run in bf16 also the one that it is compared with: rounding may differ from one launch to another.
    *(f"resumed_{name}" for name in ("zero0", "zero1", "zero2", "bf16_zero2", "batchnorm_zero2", "averaged_zero2")),
    *(f"resumed_{name}" for name in ("mixed_zero0", "ctkd_zero2")),
}


def slow(world: int, name: str) -> bool:
    """Return whether ``make test`` skips a training on this number of ranks."""
    return is_slow(world, name, SHARED.keys(), NEAR)


def main(folder: Path) -> None:
    processes = Processes("cpu")
    if processes.first:
        shutil.rmtree(folder / "plain", ignore_errors=True)
        if not (folder / "teacher").exists():
            pictures.make_images(folder / "images")
            pictures.make_images(folder / "held_out", per_class=2, seed=1)
            pictures.make_images(folder / "broken", broken=tuple(range(0, 40)))
            torch.manual_seed(7)
            names = [f"class{i}" for i in range(pictures.CLASSES)]
            teacher = load_classifier(**_load(pictures.vit(24)), num_classes=10, classes=names)
            teacher.save_pretrained(folder / "teacher")
            large = pictures.vit(24, image_size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
            load_classifier(**_load(large), num_classes=10, classes=names[::-1]).save_pretrained(folder / "large")
    processes.barrier()
    for name, changes in (SHARED | (TWO_RANKS if processes.world > 1 else {})).items():
        if slow(processes.world, name) != folder.name.endswith("slow"):
            continue
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


def _load(section: dict) -> dict:
    return {"name_or_folder": section["name"], **{k: v for k, v in section.items() if k != "name"}}


def run(folder: Path, out: Path, changes: dict, processes: Processes) -> dict:
    stop, cache = changes.pop("stop", None), changes.pop("cache", None)
    images = folder / changes.pop("images", "images")
    teacher = folder / changes.pop("teacher", "teacher")
    changes["deepspeed__zero_optimization"] = WHOLLY_SHARDED
    plain = pictures.config(out, images, teacher, **changes)
    plain["data"]["eval"] = [{"path": str(folder / "held_out"), "name": "held_out"}]
    if cache:
        plain["teacher"]["cache"] = str(out.with_suffix(".cache"))
        if processes.first:
            shutil.rmtree(plain["teacher"]["cache"], ignore_errors=True)
        processes.barrier()
    if plain["training"]["micro_batch_size"] is None:
        plain["training"]["micro_batch_size"] = 16 // processes.world
    config = ClassifierConfig.model_validate(plain)
    if stop:
        Trainer(config, processes).run(stop)
    trainer = Trainer(config, processes)
    asked = count_teacher_calls(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.engine.whole_state(trainer.student).items()}
    trainer.run()
    state = trainer.engine.whole_state(trainer.student)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if processes.first else []
    exported = load_file(out / "student" / "model.safetensors") if processes.first else {}
    return {
        "metrics": metrics,
        "statistics": processes.gather([b.tolist() for n, b in trainer.student.named_buffers() if "running_" in n]),
        "held_out": metrics[-1]["nll"] if processes.first else None,
        "weights": {name: tensor.float().flatten()[:64].tolist() for name, tensor in state.items()},
        "exported": {name: tensor.float().flatten()[:64].tolist() for name, tensor in exported.items()},
        "moved": {name: not torch.equal(tensor, before[name]) for name, tensor in state.items()},
        "dtypes": sorted({str(tensor.dtype) for tensor in exported.values()}),
        "problems": json.loads((out / "summary.json").read_text())["problems"] if processes.first else {},
        "teacher_keys": [k for k in trainer.engine.task.state_dict() if "teacher" in k],
        "asked": processes.gather(asked[0]),
    }


def count_teacher_calls(trainer: Trainer) -> list[int]:
    """How often the teacher's body runs for a batch, from now on."""
    calls, outputs = [0], trainer.teacher.outputs

    def counted(images):
        calls[0] += 1
        return outputs(images)

    trainer.teacher.outputs = counted
    return calls


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    main(Path(sys.argv[-1]))
    leave(0)
