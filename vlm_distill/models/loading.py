"""Load models of Transformers: no weight missing or left over, all finite, and no remote code unless trusted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import dynamic_module_utils

from data.errors import UserError

from .common import built_whole
from .folder import ADAPTER_CONFIG, check_folder, check_stored_precision, check_weight_files
from .weightless import needs_weights, weightless

# If a library omits trust_remote_code, Transformers would ask on the terminal, and accept a `y` from a pipe.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

#: How many names of weights a message shows.
SHOWN = 3


@dataclass(frozen=True)
class Report:
    """The differences between a model and its weights, as Transformers reports them.

    Attributes:
        missing: weights of the model that the files lack, except tied and optional ones.
        unexpected: weights in the files that the model has no place for, except those that the class skips on purpose.
        mismatched: name, shape in the files, shape in the model.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: tuple[tuple[str, Sequence[int], Sequence[int]], ...] = ()


def read_config(name: str, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a Transformers model, after checking its files.

    Raises:
        UserError: a malformed file, or settings that no model has (:mod:`.folder`).
        Exception: whatever Transformers raises for an unknown name or configuration.
    """
    from transformers import AutoConfig

    check_folder(name)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def from_pretrained(kind: Any, name: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call ``kind.from_pretrained`` and check the result; without weights, build the model from its configuration.

    Args:
        kind: an auto class of Transformers.
        name: a name or folder.
        trust_remote_code: run code that comes with the model.
        options: further options of ``from_pretrained``.

    Raises:
        UserError: weights are missing, left over, or of other shapes; or the model is larger than this machine.
        Exception: whatever Transformers raises.
    """
    model, report = with_report(kind, name, trust_remote_code=trust_remote_code, **options)
    check_report(name, report)
    return model


def with_report(
    kind: Any, name: str, *, trust_remote_code: bool = False, config: Any = None, **options: Any
) -> tuple[Any, Report]:
    """Return a model and how it differs from its weights, for callers that need only a part of it.

    With ZeRO-3 loading on (``HfDeepSpeedConfig`` alive), each rank gets its share of the weights. Transformers compares
    no names then, and only one rank sees an error; so every rank compares all names and shapes before.

    Args:
        kind: an auto class of Transformers.
        name: a name or folder.
        trust_remote_code: run code that comes with the model.
        config: used instead of the model's own.
        options: further options of ``from_pretrained``.

    Raises:
        UserError: as in :func:`from_pretrained`, except for missing and unexpected weights.
        Exception: whatever Transformers raises.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model: '{name}' is an adapter; name it as a whole model (path), or merge it into its base first"
        )
    config = config or read_config(name, trust_remote_code)
    if weightless():
        return _without_weights(kind, config, options, trust_remote_code), Report()
    check_weight_files(Path(name))
    quantised = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if not quantised:
        check_stored_precision(Path(name))
    options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _reasons() as reasons:
        try:
            report = Report()
            if not quantised:
                # On the meta device: names and shapes of all weights, no values.
                with built_whole():
                    empty, found = kind.from_pretrained(
                        name, device_map={"": "meta"}, trust_remote_code=trust_remote_code, **options
                    )
                report = _report(found)
                check_shapes(name, report)
                check_size(name, empty, options.get("dtype"))
                del empty
            with _shapes_before_sharding():
                model, found = kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        except RuntimeError as error:
            # Transformers' message only refers to its log.
            raise (RuntimeError(reasons[-1]) if reasons else error) from error
    if quantised:
        report = _report(found)
        check_shapes(name, report)
    if not is_deepspeed_zero3_enabled():
        check_finite(name, model)
    return model, report


def check_report(name: str, report: Report) -> None:
    """Raise ``UserError`` if a model's files lack weights or contain others; the message names the first few."""
    if report.missing:
        also = ""
        if report.unexpected:
            also = f", and holds {len(report.unexpected):,} others ({_some(report.unexpected)})"
        raise UserError(
            f"model: '{name}' lacks {_number(report.missing)} that its configuration asks for ({_some(report.missing)})"
            f"{also}; is the copy complete, and does config.json belong to it?"
        )
    if report.unexpected:
        raise UserError(
            f"model: '{name}' holds {_number(report.unexpected)} that its configuration has no place for "
            f"({_some(report.unexpected)}); do config.json and weights belong together?"
        )


def check_shapes(name: str, report: Report) -> None:
    """Raise ``UserError`` if weights have other shapes than the configuration says; the message names the first."""
    if report.mismatched:
        first, there, wanted = report.mismatched[0]
        raise UserError(
            f"model: '{name}' holds {_number(report.mismatched)} of other shapes than its configuration says, first "
            f"{first}: {list(there)} in the file, {list(wanted)} in the model; do the two belong together?"
        )


def check_size(name: str, model: nn.Module, dtype: Any = None, limit: int | None = None) -> None:
    """Raise ``UserError`` if this machine's main memory cannot hold a model.

    Under ZeRO-3 loading, the shares of the ranks on this machine count.

    Args:
        name: for the message, which has both sizes.
        model: on the meta device.
        dtype: the precision it will be loaded in; ``None``: its parameters' own.
        limit: bytes; ``None``: :func:`machine_memory`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    width = dtype.itemsize if isinstance(dtype, torch.dtype) else None
    size = sum(t.numel() * ((width or t.itemsize) if t.is_floating_point() else t.itemsize) for t in tensors)
    share, what = _share_of_this_machine(), ""
    if share < 1:
        what = "the shares of this machine's ranks in it take "
    needed, limit = int(size * share), machine_memory() if limit is None else limit
    if needed > limit:
        count = sum(p.numel() for p in model.parameters())
        raise UserError(
            f"model: '{name}' has {count:,} parameters; {what or 'they take '}{needed / 1e9:,.1f} GB, "
            f"and this machine has {limit / 1e9:,.1f} GB of memory; choose a smaller model, fewer bytes a parameter, "
            "or placement: shard over more machines"
        )


@needs_weights
def check_new_size(where: str, create: Callable[[], nn.Module]) -> None:
    """Raise ``UserError`` if this machine's main memory cannot hold the new model that ``create`` builds."""
    with torch.device("meta"):
        check_size(where, create())


def machine_memory() -> int:
    """Return the bytes of main memory that this process can use: the machine's, or its container's limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit: "max", or another version of cgroups
            continue
    return found


def check_finite(name: str, model: nn.Module) -> None:
    """Raise ``UserError`` if weights are NaN or infinite; of sharded parameters, this rank's share is checked."""
    wrong = not_finite(model)
    if wrong:
        raise UserError(
            f"model: '{name}' has NaN or infinite numbers in {_number(wrong)} ({_some(wrong)}); "
            "the training that wrote it diverged, or the copy is damaged"
        )


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of weights that contain NaN or infinite values on this rank."""
    if weightless():
        return []
    found = []
    for name, parameter in model.named_parameters():
        tensor = getattr(parameter, "ds_tensor", parameter).detach()
        if tensor.is_floating_point() and tensor.device.type != "meta" and not _is_finite(tensor):
            found.append(name)
    return found


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite: by their sum, one pass without a copy; if it overflows, one by one."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _some(names: Iterable[str]) -> str:
    """Return the first few of some names, in order."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _number(weights: Collection[Any]) -> str:
    return f"{len(weights):,} weight{'s'[: len(weights) != 1]}"


def _report(found: Mapping[str, Collection[Any]]) -> Report:
    mismatched = tuple(sorted((name, tuple(a), tuple(b)) for name, a, b in found["mismatched_keys"]))
    missing = frozenset(found["missing_keys"]) - {name for name, _, _ in mismatched}
    return Report(missing, frozenset(found["unexpected_keys"]), mismatched)


def _without_weights(kind: Any, config: Any, options: dict[str, Any], trust_remote_code: bool) -> Any:
    options.pop("quantization_config", None)
    if options.get("dtype") == "auto":
        options["dtype"] = getattr(config, "dtype", None) or torch.float32
    return kind.from_config(config, trust_remote_code=trust_remote_code, **options)


def _share_of_this_machine() -> float:
    """Return the share of a model on this machine: all, or under ZeRO-3 loading that of its ranks."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return 1.0
    world = torch.distributed.get_world_size()
    return int(os.environ.get("LOCAL_WORLD_SIZE", world)) / world


@contextmanager
def _reasons() -> Iterator[list[str]]:
    """Collect what Transformers logs about weights that it cannot convert, and hide its tables."""
    reasons: list[str] = []

    class Collect(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            text = record.getMessage()
            if "LOAD REPORT" not in text:
                return True
            told = [line.strip() for line in text.splitlines() if "Error" in line]
            reasons.extend(told[-1:])
            return False

    logger, collect = logging.getLogger("transformers.modeling_utils"), Collect()
    logger.addFilter(collect)
    try:
        yield reasons
    finally:
        logger.removeFilter(collect)


class _Whole:
    """A model that reports its parameters' shapes from before ZeRO-3 sharded them."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return torch.empty(shape, dtype=parameter.dtype, device="meta")


@contextmanager
def _shapes_before_sharding() -> Iterator[None]:
    """Context manager: inside it, Transformers' weight conversions see whole shapes of parameters sharded by ZeRO-3.

    Some transpose a matrix only if its shape differs from the parameter's. A shard's placeholder has the shape [0], so
    the expert weights of Qwen3-VL-MoE would always be transposed, silently if they are square.
    """
    from transformers.core_model_loading import WeightConverter

    plain = WeightConverter.convert

    def convert(converter: Any, layer_name: str, model: Any = None, **options: Any) -> Any:
        return plain(converter, layer_name, model=_Whole(model), **options)

    WeightConverter.convert = convert  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        WeightConverter.convert = plain  # type: ignore[method-assign]
