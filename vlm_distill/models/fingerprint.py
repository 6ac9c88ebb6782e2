"""Fingerprints of a model's files, by content and without loading the model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .folder import ADAPTER_CONFIG, adapter_base
from .in_memory import digest_weights, held_model

# Size of a block; blocks read of all weights together, evenly spaced; fewest blocks of one file (small ones whole).
_BLOCK, _BLOCKS, _LEAST = 2**12, 2**13, 2**8
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
_IMAGES = ("preprocessor_config", "processor_config", "video_preprocessor_config", "image_processor")
_IDLE = ("generation_config", "training_args", "trainer_state")


def fingerprint(name: str) -> dict[str, str]:
    """Return digests of a model's ``weights``, ``configuration``, ``tokenizer`` and ``image processor``.

    Of the weights, safetensors' headers and some thousand blocks of 4 KiB are read: 70 billion parameters take seconds.
    Training a whole model, or merging an adapter, changes blocks everywhere; single values edited by hand in a large
    file can go unnoticed.

    Args:
        name: a folder, a file of weights or of a chat template, a name that Transformers finds on this machine, or that
            of a model in memory.

    Returns:
        A digest for each kind of file that exists; empty if there is no such model here.
    """
    held = held_model(name)
    if held is not None:
        template = held.model.processor.chat_template
        return {"weights": digest_weights(held.model), "tokenizer": digest_text(repr(template))}
    if _is_file(name):
        return {"content": _digest([Path(name)], sampled=True)}
    folder = _folder(name)
    if folder is None:
        return {}
    groups: dict[str, list[Path]] = {}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    suffix = ".safetensors" if any(path.suffix == ".safetensors" for path in files) else ".bin"
    for path in files:
        kind = _kind(path, suffix)
        if kind is not None:
            groups.setdefault(kind, []).append(path)
    found = {kind: _digest(paths, sampled=kind == "weights") for kind, paths in groups.items()}
    base = _base(folder)
    if base is not None:
        for kind, digest in fingerprint(base).items():
            found[kind] = hashlib.sha256(f"{found.get(kind)} {digest}".encode()).hexdigest()[:16]
    return found


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text instead of a name
        return False


def _folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _kind(path: Path, weights: str) -> str | None:
    name = path.name
    if name.startswith(_IDLE) or name.endswith(".index.json"):
        return None
    if path.suffix == weights:
        return "weights"
    if name.startswith(_TOKENIZER) or path.suffix in (".model", ".jinja", ".tiktoken"):
        return "tokenizer"
    if name.startswith(_IMAGES):
        return "image processor"
    # Code that comes with a model is part of what its weights compute.
    return "configuration" if path.suffix in (".json", ".py") else None


def _digest(paths: list[Path], *, sampled: bool) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        count = max(_LEAST, _BLOCKS // len(paths))
        with path.open("rb") as file:
            if not sampled or size <= count * _BLOCK:
                digest.update(file.read())
                continue
            header = file.read(8)
            length = int.from_bytes(header, "little")
            if path.suffix == ".safetensors" and length < size:
                header += file.read(length)
            digest.update(header)
            for start in np.linspace(len(header), size - _BLOCK, count, dtype=np.int64):
                file.seek(int(start))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _base(folder: Path) -> str | None:
    """Return the base that an adapter's folder names."""
    return adapter_base(folder) if (folder / ADAPTER_CONFIG).is_file() else None
