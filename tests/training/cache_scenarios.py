"""Runs with a cached teacher and the same with the teacher itself, several in one launch.

    deepspeed --num_gpus 2 tests/training/cache_scenarios.py FOLDER          two ranks
    python tests/training/cache_scenarios.py FOLDER                          one

Writes FOLDER/ranks{world}/{scenario}.json: metrics, some weights and the samples left out.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import scenarios
import tiny
import torch

from vlm_distill.caching.fill import fill
from vlm_distill.caching.image_features import FeatureCache
from vlm_distill.caching.token_records import TokenCache
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import TopKTargets
from vlm_distill.models.teacher import ModelTeacher, TeacherOutputs
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer
from vlm_distill.training import engine

K = 5
# Runs with the teacher itself; each is followed by one from a cache, NAME_cached.
LIVE = {
    "mixed": {"data": "mixed"},
    "alone": {"data": "mixed", "training__micro_batch_size": 1},
    "text": {"data": "text", "family": "language", "deepspeed__stage": 2},
    "pieces": {"data": "mixed", "family": "pieces", "loss": [{"name": "uld"}, {"name": "alm", "tau": 5.0}]},
    "token": {"data": "mixed", "family": "pieces", "loss": [{"name": "alm", "tau": 5.0, "mean": "sequences"}]},
    "bf16": {"data": "mixed", "training__dtype": "bf16", "deepspeed__stage": 2},
    "topk": {"data": "mixed", "loss": [{"name": "forward_kl"}]},
    # Of the student's frozen vision encoder, too.
    "seen": {"data": "mixed", "family": "frozen", "deepspeed__stage": 3},
}
# Filled by one rank and read by two.
BY_ONE = ["mixed", "text", "topk"]
TWO_RANKS = {"shard": {"data": "mixed", "teacher": "shard", "deepspeed__stage": 3}}


def main(folder: Path) -> None:
    engine._inference_config = scenarios.sharded_inference
    processes = Processes("cpu")
    if processes.first:
        tiny.write_data(folder / "mixed", text_only=(0, 1, 2, 3, 8, 9, 14, 15), broken=(4, 5, 6, 7, 20))
        tiny.write_data(folder / "text", text_only=tuple(range(24)))
        tiny.write_text(folder / "text")
        tiny.write_teacher(folder / "teacher")
        tiny.write_language_model(folder / "language_teacher")
        tiny.write_student(folder / "student")
        tiny.write_pieces_teacher(folder / "pieces_teacher")
    processes.barrier()
    out = folder / f"ranks{processes.world}"
    out.mkdir(exist_ok=True)
    for name, changes in (LIVE | (TWO_RANKS if processes.world > 1 else {})).items():
        results: dict[str, Any] = {}
        try:
            cache = {"folder": str(out / f"{name}_cache")}
            if name == "topk":
                cache |= {"form": "topk", "k": K}
            elif name == "token":
                cache["form"] = "token"
            results[name] = run(config(folder, out / name, dict(changes)), processes)
            cached = config(folder, out / f"{name}_cached", dict(changes), cache)
            fill(cached, processes)
            results[f"{name}_cached"] = run(cached, processes)
            if processes.world > 1 and name in BY_ONE:
                cache["folder"] = str(folder / f"ranks1/{name}_cache")
                results[f"{name}_by_one"] = run(config(folder, out / f"{name}_other", dict(changes), cache), processes)
            results[f"{name}_cached"]["shards"] = len(list((out / f"{name}_cache").glob("*.index")))
            results[f"{name}_cached"]["tokens"] = TokenCache(out / f"{name}_cache").tokens
            if cached.student.vision_cache is not None:
                entries = FeatureCache(Path(cached.student.vision_cache))._files.entries
                results[f"{name}_cached"]["images"] = entries["images"].tolist()
        except Exception:
            results[f"{name}_error"] = {"error": traceback.format_exc()}
        if processes.first:
            for key, result in results.items():
                (out / f"{key}.json").write_text(json.dumps(result))
        if f"{name}_error" in results:
            print(name, results[f"{name}_error"]["error"], file=sys.stderr, flush=True)
            sys.exit(1)
    processes.close()


def config(folder: Path, out: Path, changes: dict, cache: dict | None = None) -> RunConfig:
    family, placement = changes.pop("family", ""), changes.pop("teacher", "replicate")
    data = folder / changes.pop("data") / "data.jsonl"
    if family == "language":
        changes["student"] = {"decoder": tiny.settings()["decoder"]}
    elif family == "frozen":
        changes["student"] = {"path": str(folder / "student"), "train": ["projector", "decoder"]}
        changes["student"] |= {"vision_cache": cache["folder"] + "_of_images"} if cache else {}
        family = ""
    elif family == "pieces":
        changes["student"] = {**tiny.settings(), "tokenizer": str(folder / "pieces_teacher" / "student")}
    teacher = folder / (f"{family}_teacher" if family else "teacher")
    plain = tiny.config(out, data, teacher, training__steps=3, **changes)
    plain["training"] = {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "device": "cpu", **plain["training"]}
    plain["training"]["steps"] = 3
    plain["teacher"] |= {"placement": placement}
    if cache is not None:
        plain["teacher"]["cache"] = cache
    if "train" in plain["student"]:
        # An odd number of micro-batches before the same rows again: each of two ranks comes upon all images.
        plain["data"]["train"] = [{"path": str(data), "name": "some", "limit": 22}, {"path": str(data)}]
    if family == "language":
        text = {"path": str(data.with_name("text.jsonl")), "format": "text", "name": "text"}
        plain["data"] |= {"train": [*plain["data"]["train"], text], "answers": "last", "max_length": 12}
    return RunConfig.model_validate(plain)


class LiveTopK(ModelTeacher):
    """The teacher itself, of which only the likeliest tokens are looked at."""

    @torch.no_grad()
    def outputs(self, batch: Any, features: Any = ()) -> TeacherOutputs:
        found = super().outputs(batch, features).targets
        return TeacherOutputs(TopKTargets.of(found.head.logits(found.hidden), K))


def run(settings: RunConfig, processes: Processes) -> dict[str, Any]:
    trainer = Trainer(settings, processes)
    if "topk" in settings.output and settings.teacher.cache is None:
        trainer.loss_teacher = LiveTopK(trainer.teacher.model)
    assert (settings.teacher.cache is None) == isinstance(trainer.teacher, ModelTeacher)
    folder = trainer.run()
    state = trainer.engine.whole_state(trainer.student)
    if not processes.first:
        return {}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if "/" in k or k in ("loss", "grad_norm", "samples")} for line in lines]
    problems = folder / "problems.jsonl"
    return {
        "metrics": kept,
        "weights": {name: tensor.float().flatten()[:64].tolist() for name, tensor in state.items()},
        "problems": sorted(problems.read_text().splitlines()) if problems.exists() else [],
        "parameters": trainer.parameters,
    }


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    main(Path(sys.argv[-1]))
    leave(0)
