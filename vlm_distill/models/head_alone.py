"""Read a model's lm head without the rest of its weights, from the one file that holds it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import UserError, first_line

from .folder import check_weight_files, read_object
from .interface import VisionLanguageModel
from .lm_head import LMHead, fixed_head

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_head(model: VisionLanguageModel, name: str, device: torch.device | str) -> LMHead:
    """Return a model's lm head with its weights as stored; of the other weights nothing is read.

    Args:
        model: built without weights, for the head's shape and for the names of its weights.
        name: the folder or name on the Hub that the model was built from.
        device: of the head.

    Raises:
        UserError: no safetensors file holds the head, or it is damaged, quantized, NaN or infinite.
    """
    files = _files(name)
    tensors = {}
    for kind, parameter in zip(("weight", "bias"), model.head.parameters, strict=False):
        # With tied embeddings, one parameter has two names, and files hold it under one of them.
        tied = [own for own, other in model.named_parameters(remove_duplicate=False) if other is parameter]
        tensors[kind] = _read(name, files, tied, parameter.shape).to(device)
    return fixed_head(tensors, model.head.scale, model.head.softcap)


def _files(name: str) -> dict[str, Path]:
    """Return the file of each weight; on the Hub, only the index or the single file is downloaded so far."""
    from transformers.utils import cached_file

    check_weight_files(Path(name))
    try:
        index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            return {weight: Path(file) for weight, file in read_object(Path(index))["weight_map"].items()}
        single = cached_file(name, _FILE, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"teacher.path: '{name}' cannot be read: {first_line(error)}; check the name") from error
    if single is None:
        raise UserError(
            f"teacher.path: '{name}' has no safetensors file, from which the lm head is read; save the model as "
            "safetensors, or set teacher.server.form to topk"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), Path(_FILE))


def _read(name: str, files: dict[str, Path], tied: list[str], shape: torch.Size) -> Tensor:
    """Return the tensor of this shape that the files hold under the end of one of these names."""
    from transformers.utils import cached_file

    # What stands before these two components differs between versions of Transformers.
    ends = {".".join(own.split(".")[-2:]) for own in tied}
    found: dict[str, Tensor] = {}
    for weight, file in files.items():
        if ".".join(weight.split(".")[-2:]) not in ends:
            continue
        path = cached_file(name, str(file))
        try:
            with safe_open(path, framework="pt") as opened:
                if opened.get_slice(weight).get_shape() == list(shape):
                    found[weight] = opened.get_tensor(weight)
        except SafetensorError as error:
            raise UserError(f"teacher.path: {path} is damaged ({first_line(error)}); copy it again") from error
    if not found:
        raise UserError(
            f"teacher.path: no file of '{name}' holds its lm head ({' or '.join(sorted(ends))}, {list(shape)}); is the "
            "copy complete? Otherwise set teacher.server.form to topk"
        )
    first, *others = found.values()
    if any(not torch.equal(first, other) for other in others):
        raise UserError(
            f"teacher.path: '{name}' holds several lm heads that differ ({', '.join(sorted(found))}); set "
            "teacher.server.form to topk"
        )
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"teacher.path: the lm head of '{name}' is quantized; set teacher.server.form to topk")
    if not first.isfinite().all():
        raise UserError(f"teacher.path: the lm head of '{name}' holds NaN or infinite numbers; copy it again")
    return first
