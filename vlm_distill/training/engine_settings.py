"""The settings of DeepSpeed's engine: what the section says, and over it what the run sets itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_distill.config.sections import AnyRun

DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's default


def deepspeed_config(config: AnyRun, micro: int, accumulation: int, parameters: int, autocast: bool) -> dict[str, Any]:
    """Return the engine's settings: those of the ``deepspeed`` section, and over them what the run sets itself."""
    # DeepSpeed allocates whole buckets, two gigabytes each by default; a small model needs less. The size must be even.
    bucket = min(DEFAULT_BUCKET, parameters + parameters % 2)
    settings: dict[str, Any] = {
        "zero_optimization": {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        # Keep DeepSpeed's own progress lines out of the log.
        "steps_per_print": 2**31,
    }
    not_passed_on = ("train_batch_size", "optimizer", "scheduler", "fp16")
    settings = _merged(settings, {key: v for key, v in config.deepspeed.extra.items() if key not in not_passed_on})
    bf16 = config.training.dtype == "bf16"
    autocast = autocast or config.deepspeed.stage == 0
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "zero_optimization": {"stage": config.deepspeed.stage},
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW is as good on the CPU as DeepSpeed's own, which needs a compiler on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16 and not autocast},
        "torch_autocast": {"enabled": bf16 and autocast, "dtype": "bfloat16"},
    }
    if bf16 and not autocast:
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(settings, own)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings key by key; where both have a value, take the upper one's."""
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
