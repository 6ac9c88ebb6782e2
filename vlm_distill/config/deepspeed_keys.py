"""Keys of DeepSpeed's configuration: the known ones with their types, and those that the run sets itself.

Importing DeepSpeed takes seconds, so its keys are listed here; ``tests/config/test_deepspeed_keys.py`` compares the
list with the installed version. DeepSpeed ignores unknown keys at the top level; here they are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

#: In Hugging Face's files: the run's own value.
AUTO = "auto"

_DEVICES = ("none", "cpu", "nvme")
_OFFLOAD_PARAM = {
    "device": _DEVICES,
    "nvme_path": str,
    "buffer_count": int,
    "buffer_size": int,
    "max_in_cpu": int,
    "pin_memory": bool,
}
_OFFLOAD_OPTIMIZER = {
    "device": _DEVICES,
    "nvme_path": str,
    "buffer_count": int,
    "pin_memory": bool,
    "pipeline_read": bool,
    "pipeline_write": bool,
    "fast_init": bool,
    "ratio": float,
    "super_offload": bool,
    "cpuadam_cores_perc": float,
}
_ZENFLOW = {
    "topk_ratio": float,
    "select_strategy": str,
    "select_interval": object,
    "update_interval": object,
    "overlap_step": bool,
    "offload": bool,
    "auto_ratio": float,
    "full_warm_up_rounds": int,
    "pt_reserved_cores_perc": float,
    "steps_per_epoch": int,
}
#: These also go by a name that begins with ``stage3_``.
_STAGE_3 = {
    "prefetch_bucket_size": int,
    "param_persistence_threshold": int,
    "model_persistence_threshold": int,
    "max_live_parameters": int,
    "max_reuse_distance": int,
    "gather_16bit_weights_on_model_save": bool,
    "module_granularity_threshold": int,
    "use_all_reduce_for_fetch_params": bool,
    "allgather_sequential": bool,
}
ZERO: dict[str, Any] = {
    "stage": int,
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "compute_grad_norm": bool,
    "load_from_fp32_weights": bool,
    "elastic_checkpoint": bool,
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "zenflow": _ZENFLOW,
    "sub_group_size": int,
    **_STAGE_3,
    **{f"stage3_{name}": kind for name, kind in _STAGE_3.items()},
    "stage3_gather_fp16_weights_on_model_save": bool,
    "ignore_unused_parameters": bool,
    "legacy_stage1": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool,
    "pipeline_loading_checkpoint": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "save_muon_momentum_buffer_in_memory": bool,
    "leaf_module": {"classes": list, "names": list, "name_suffixes": list},
}
#: Keys by level. A type is the type of a value; ``object`` takes any, ``dict`` any mapping; a tuple has the values.
KNOWN: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "zero_optimization": ZERO,
    "bf16": {
        "enabled": bool,
        "immediate_grad_update": bool,
        "check_grad_overflow": bool,
        "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool,
    },
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": float,
        "fp16_master_weights_and_grads": bool,
    },
    "torch_autocast": {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list},
    "data_types": {"grad_accum_dtype": str, "param_dtype": str, "buffer_dtype": str, "keep_in_fp32_modules": list},
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "scheduler": {"type": str, "params": dict},
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "gradient_allreduce_op": str,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "log_level": str,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "compile": dict,
}
#: Keys that would do nothing here, or something else than in a trainer of one's own, and what to do instead.
ELSEWHERE = {
    "activation_checkpointing": "set training.activation_checkpointing",
    "amp": "set training.dtype",
    "bfloat16": "set training.dtype",
    "sequence_parallel_size": "set training.sequence_parallel",
    "tensorboard": "the run writes tensorboard/ by itself",
    "wandb": "set training.trackers: [wandb]",
    "comet": "the run writes metrics.jsonl and tensorboard/, and has training.trackers",
    "csv_monitor": "the run writes metrics.jsonl",
    "checkpoint": "the run writes its own checkpoints; set training.checkpoint_every and keep_checkpoints",
    "dataloader_drop_last": "the run's data section says what is read",
    "data_efficiency": "the run's data section says what is read",
    "curriculum_learning": "the run's data section says what is read",
    "managed_gradient_accumulation": "the run counts its micro-batches itself",
    **dict.fromkeys(
        ("autotuning", "elasticity", "hybrid_engine", "pipeline", "tensor_parallel", "expert_parallel"),
        "this trainer does not use it",
    ),
    **dict.fromkeys(("compression_training", "quantize_training", "weight_quantization"), "this trainer has none"),
    "zero_optimization.cpu_offload": "write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in offload_optimizer or offload_param",
}
# The schedules of optimizer.schedule, by the names that Hugging Face's files have for DeepSpeed's.
_SCHEDULERS = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_DTYPES = {"bf16": ("bf16", "bfloat16", "torch.bfloat16"), "fp32": ("fp32", "float", "float32", "torch.float32")}


class Set(NamedTuple):
    """A value that the run sets itself, and our key that sets it."""

    value: Any
    key: str


def without_auto(section: Any) -> Any:
    """Return a copy of a ``deepspeed`` section without ``auto`` and empty values, at every level."""
    if not isinstance(section, Mapping):
        return section
    kept = {key: without_auto(value) for key, value in section.items()}
    return {key: value for key, value in kept.items() if value not in (None, AUTO, {})}


def check_keys(section: Mapping[Any, Any], known: Mapping[str, Any] = KNOWN, at: str = "") -> None:
    """Check names and types of a section's keys, except ``stage``.

    Raises:
        ValueError: a key is unknown, has no use here, or has a value of the wrong type.
    """
    for key, value in section.items():
        name = f"{at}{key}"
        if name in ELSEWHERE:
            raise ValueError(f"{name}: has no use here ({ELSEWHERE[name]}); leave it out")
        if key not in known:
            raise ValueError(f"{name}: DeepSpeed has no such key here{_hint(str(key), known, at)}")
        kind = known[key]
        if isinstance(kind, dict) or kind is dict:
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}: is {value!r}; give a mapping")
            if isinstance(kind, dict):
                check_keys(value, kind, f"{name}.")
        elif isinstance(kind, tuple):
            if value not in kind:
                raise ValueError(f"{name}: is {value!r}; give one of {', '.join(kind)}")
        elif not _is(value, kind):
            raise ValueError(f"{name}: is {value!r}; give {_NAMES[kind]}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a name", list: "a list"}


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _hint(key: str, known: Mapping[str, Any], at: str) -> str:
    """Return where a key belongs, or the most similar keys, for a message."""
    levels = dict(_levels(KNOWN))
    elsewhere = [level for level, keys in levels.items() if key in keys and level != at]
    if elsewhere:
        return f"; it belongs under deepspeed{'.' * bool(elsewhere[0])}{elsewhere[0].rstrip('.')}"
    everywhere: dict[str, str] = {}
    for level, keys in reversed(levels.items()):
        everywhere |= dict.fromkeys(keys, level)
    everywhere |= dict.fromkeys(["stage", *known], at)
    near = difflib.get_close_matches(key, everywhere, n=1)
    if not near:
        return f"; known here: {', '.join(known)}"
    return f"; did you mean {'deepspeed.' * (everywhere[near[0]] != at)}{everywhere[near[0]]}{near[0]}?"


def _levels(known: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every level of keys with its dotted name, which ends with a dot; the top level's is empty."""
    yield at, known
    for key, inner in known.items():
        if isinstance(inner, dict):
            yield from _levels(inner, f"{at}{key}.")


def set_by_run(config: Any, autocast: bool) -> dict[str, Set]:
    """Return what the run sets itself, by DeepSpeed's keys, as far as it does not depend on the number of ranks.

    Args:
        config: a run of either path.
        autocast: whether bf16 uses torch's autocast instead of DeepSpeed's.
    """
    bf16 = config.training.dtype == "bf16"
    return {
        "train_batch_size": Set(config.training.batch_size, "training.batch_size"),
        "gradient_clipping": Set(config.optimizer.max_grad_norm or 0.0, "optimizer.max_grad_norm"),
        "bf16.enabled": Set(bf16, "training.dtype"),
        "fp16.enabled": Set(False, "training.dtype, which is bf16 or fp32"),
        "torch_autocast.enabled": Set(bf16 and autocast, "training.dtype and deepspeed.stage"),
        "torch_autocast.dtype": Set("bfloat16", "training.dtype"),
        "data_types.param_dtype": Set(config.training.dtype, "training.dtype"),
        "data_types.grad_accum_dtype": Set("fp32", "the trainer, which always accumulates in fp32"),
        "gradient_allreduce_op": Set("mean", "the trainer, whose losses are means"),
        "zero_allow_untested_optimizer": Set(True, "the trainer, which chooses the optimizer"),
        "zero_force_ds_cpu_optimizer": Set(False, "the trainer, which chooses the optimizer"),
        "optimizer.type": Set(getattr(config.optimizer, "name", "adamw"), "the run's optimizer section"),
        "scheduler.type": Set(config.optimizer.schedule, "optimizer.schedule and optimizer.warmup"),
    }


def check_equal(section: Mapping[str, Any], values: Mapping[str, Set]) -> None:
    """Check that a section does not contradict the run.

    Raises:
        ValueError: a key differs from the run's value, or is a parameter of the run's own optimizer or schedule.
    """
    for dotted, (value, key) in values.items():
        found = _at(section, dotted)
        if found is not None and not _same(dotted, found, value):
            both = f"is {_as_yaml(found)}, but this run has {_as_yaml(value)} by {key}"
            raise ValueError(f"deepspeed.{dotted}: {both}; change that, and write auto here")
    for kind, place in (("optimizer", "the run's optimizer section"), ("scheduler", "optimizer.schedule and warmup")):
        if params := _at(section, f"{kind}.params"):
            named = ", ".join(params)
            raise ValueError(f"deepspeed.{kind}.params: {named} would do nothing; use {place}, and leave them out here")


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _at(section: Mapping[str, Any], dotted: str) -> Any:
    value: Any = section
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _same(dotted: str, found: Any, value: Any) -> bool:
    if dotted.endswith("dtype"):
        names = next((names for names in _DTYPES.values() if str(value) in names), ())
        return str(found).lower() in names
    if dotted == "scheduler.type":
        return _SCHEDULERS.get(str(found).lower()) == value
    if isinstance(value, str):
        return str(found).lower() == value.lower()
    return found == value
