"""Settings that are given but have no effect in this run; each is named when the run begins."""

from __future__ import annotations

from typing import Any

from vlm_distill.config.fields import Section
from vlm_distill.config.sections import AnyRun, OptimizerSection

# Which optimizers of the VLM path read a setting.
_READ_BY = {
    "betas": ("adamw", "adamw8bit", "muon"),
    "eps": ("adamw", "adamw8bit", "muon"),
    "momentum": ("sgd", "muon"),
    "muon_lr": ("muon",),
}


def idle_settings(config: AnyRun) -> list[str]:
    """Return a remark on every given setting that has no effect and is not refused either."""
    return [
        *_of_evaluation(config),
        *_of_data(config),
        *_of_the_optimizer(config),
        *_of_the_teacher(config),
        *_of_deepspeed(config),
    ]


def late_warmup(key: str, warmup: float, run: float, unit: str) -> list[str]:
    """Return a remark on a warm-up that is longer than the run, if it is.

    Args:
        key: the setting.
        warmup: length of the warm-up.
        run: length of the run.
        unit: of both lengths.
    """
    if warmup <= run:
        return []
    return [f"{key}: the warm-up ({warmup:g} {unit}) is longer than the run ({run:g}): its full value is never reached"]


def _given(section: Section, *names: str) -> list[str]:
    """Return those of these settings whose value is not the default."""
    fields = type(section).model_fields
    return [name for name in names if name in fields and getattr(section, name) != fields[name].default]


def _of_evaluation(config: Any) -> list[str]:
    section, remarks = config.evaluation, []
    period = "every" if hasattr(section, "every") else "every_epochs"
    if _given(section, "limit") and getattr(section, period) is None and not config.training.smoke:
        remarks.append(
            f"evaluation.limit: is for evaluations during training; set evaluation.{period}, or leave it out"
        )
    if not getattr(section, "benchmarks", []):
        for name in _given(section, "benchmark_data", "rules"):
            remarks.append(f"evaluation.{name}: is for benchmarks, and none is named; leave it out")
    for number, source in enumerate(config.data.eval):
        for name in _given(source, "weight", "labelled"):
            remarks.append(f"data.eval.{number}.{name}: is for training data; leave it out")
    return remarks


def _of_data(config: Any) -> list[str]:
    data, remarks = config.data, []
    if len(data.train) == 1 and config.training.steps is not None and _given(data.train[0], "weight"):
        remarks.append("data.train.0.weight: with a single source it changes nothing but the length of an epoch")
    if data.workers == 0 and _given(data, "prefetch"):
        remarks.append("data.prefetch: nothing is read ahead with data.workers=0")
    return remarks


def _of_the_optimizer(config: Any) -> list[str]:
    section = config.optimizer
    needed = {
        "min_lr_ratio": ("cosine", "linear"),
        "min_lr": ("cosine",),
        "decay_epochs": ("step",),
        "decay_rate": ("step", "multistep"),
    }
    said = [
        f"optimizer.{name}: has no effect with schedule: {section.schedule}"
        for name in _given(section, *needed)
        if section.schedule not in needed[name]
    ]
    if isinstance(section, OptimizerSection):
        said += [
            f"optimizer.{name}: has no effect with name: {section.name}"
            for name in _given(section, *_READ_BY)
            if section.name not in _READ_BY[name]
        ]
    return said


def _of_the_teacher(config: Any) -> list[str]:
    remarks = []
    policy = getattr(config, "on_policy", None)
    if policy is not None and policy.fraction == 0 and policy.adaptive is None:
        remarks.append("on_policy: with fraction 0 no step is on-policy; raise it, or leave the section out")
    return remarks


def _of_deepspeed(config: AnyRun) -> list[str]:
    stage, zero = config.deepspeed.stage, config.deepspeed.zero
    if stage == 0:
        names = [name for name, value in zero.items() if value != {"device": "none"}]
        return [f"deepspeed.zero_optimization: {', '.join(names)} has no effect at stage 0"] if names else []
    remarks = []
    sharded = [name for name in zero if stage < 3 and name.startswith("stage3_")]
    if stage < 3 and config.deepspeed.offloads_parameters:
        sharded.append("offload_param")
    if sharded:
        remarks.append(f"deepspeed.zero_optimization: {', '.join(sharded)} has no effect at stage {stage}, only at 3")
    if stage < 3 and zero.get("offload_optimizer", {}).get("device") == "nvme":
        remarks.append(
            f"deepspeed.zero_optimization.offload_optimizer: at stage {stage} nvme means main memory; only stage 3 "
            "writes to NVMe"
        )
    return remarks
