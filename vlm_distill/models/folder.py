"""Check the files of a model's folder before a library reads them: types, sizes, and what else they would open."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from data.errors import UserError

from .common import check_keys

#: peft's name for the file that makes a folder an adapter.
ADAPTER_CONFIG = "adapter_config.json"

#: Longest chain of adapters on adapters that is followed to the base.
_MOST_ADAPTERS = 8

#: Files that contain a JSON object in folders written by Transformers, peft or this suite.
OBJECTS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    ADAPTER_CONFIG,
    "vlm_distill.json",
)

#: Largest of these files that is read, in bytes; a tokenizer's configuration with all special tokens is below 1 MiB.
MOST_BYTES = 64 * 2**20

#: The most layers, blocks or experts that a configuration can ask for. Building a model takes about a millisecond a
#: layer, so a billion would take days before the first weight is found missing.
MOST_LAYERS = 10_000

_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?|experts)$")

#: Keys by which a configuration names a model of timm, or of another library.
_NAMES = ("architecture", "backbone")

#: Keys of timm's ``pretrained_cfg`` that say where weights are.
_TIMM_SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict")

#: Keys by which Transformers chooses an implementation; a name with a slash is code on the hub.
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: not a file, too large, not JSON, or JSON of another type.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"model: {path} is larger than {MOST_BYTES // 2**20} MiB; it is not a configuration")
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"model: {path} cannot be read ({error}); is the copy complete?") from None
    if not isinstance(found, dict):
        raise UserError(f"model: {path} holds {_kind(found)} where a JSON object is expected; is it the right file?")
    return found


def check_folder(name: str | Path) -> None:
    """Check the configuration files of a model's folder; a name that is not a folder here passes.

    Raises:
        UserError: the message names the file and what is wrong with it.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    for path in [*(folder / name for name in OBJECTS), *sorted(folder.glob("*.index.json"))]:
        if not path.is_file():
            continue
        content = read_object(path)
        if content.get("gguf_file") is not None:
            raise UserError(f"model: {path}: gguf_file would open {content['gguf_file']!r}; remove it")
        if path.name == "config.json":
            check_settings(content, str(path))
        elif path.name == "generation_config.json":
            _check_generation(content, path)
        elif path.name.endswith(".index.json"):
            _check_index(content, path)


def check_weight_files(folder: Path) -> None:
    """Raise ``UserError`` if a folder's index of weights names missing files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return
        if not index.is_file():
            continue
        content = read_object(index)
        _check_index(content, index)
        if not isinstance(content.get("metadata"), dict):
            raise UserError(f"model: {index}: metadata is missing or not a JSON object; is the copy complete?")
        files = sorted({*content["weight_map"].values()})
        gone = [file for file in files if not (folder / file).is_file()]
        if gone:
            raise UserError(
                f"model: {index}: {len(gone):,} of {len(files):,} files are not there, first {gone[0]}; "
                "is the copy complete?"
            )
        return


def check_stored_precision(folder: Path) -> None:
    """Raise ``UserError`` if a folder stores weights as integers: without their scales they are wrong numbers."""
    for path in sorted(folder.glob("*.safetensors")):
        name = _integer_weight(path)
        if name is not None:
            raise UserError(
                f"model: {path} stores {name}, and its configuration has no quantization_config that says how to "
                "read it; is the copy complete?"
            )


def _integer_weight(path: Path) -> str | None:
    """Return the first matrix of weights that a file stores as integers, with its type."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(name)
                if name.endswith("weight") and len(tensor.get_shape()) > 1 and tensor.get_dtype()[0] in "IU":
                    return f"{name} as {tensor.get_dtype()}"
    except SafetensorError:  # a damaged file, which is reported when it is loaded
        return None
    return None


def adapter_base(folder: Path) -> str:
    """Return the name or folder of the base that an adapter's folder names.

    Raises:
        UserError: it names none, or leads through other adapters back to itself.
    """
    here, seen, found = folder, [folder.resolve()], ""
    while True:
        file = here / ADAPTER_CONFIG
        base = read_object(file).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise UserError(f"model: {file} names no base; set base_model_name_or_path in it")
        found = found or base
        here = Path(base)
        if not (here / ADAPTER_CONFIG).is_file():
            return found
        if here.resolve() in seen or len(seen) == _MOST_ADAPTERS:
            raise UserError(
                f"model: {file} names '{base}' as its base, an adapter that leads back to itself; "
                "set base_model_name_or_path to the model that the adapter was trained on"
            )
        seen.append(here.resolve())


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Check the configuration of a model from outside.

    Args:
        settings: the file's content, including the configurations of parts.
        where: the file or key, for messages.

    Raises:
        UserError: more layers than :data:`MOST_LAYERS`; a part that would be fetched or opened elsewhere; code on the
            hub named as an implementation.
    """
    for path, key, value in _entries(settings):
        shown = f"{where}: {path}"
        if _COUNT.search(key):
            most = max((v for v in _numbers(value)), default=0)
            if most > MOST_LAYERS:
                raise UserError(
                    f"{shown} is {most:,}; at most {MOST_LAYERS:,} are built, is this a real configuration?"
                )
        if key == "checkpoint_path" and value:
            raise UserError(f"{shown} would load weights from elsewhere; remove it, weights come from the folder alone")
        if key in _NAMES and isinstance(value, str) and is_place(value):
            raise UserError(f"{shown} is {value!r}: a model's folder may not name places outside it; remove it")
        if key in _IMPLEMENTATIONS and any(isinstance(v, str) and "/" in v for v in _leaves(value)):
            raise UserError(f"{shown} names code on the hub; remove it, and choose attn_implementation yourself")
    weights = settings.get("transformers_weights")
    if weights is not None and not _is_plain(weights):
        raise UserError(f"{where}: transformers_weights is {weights!r}; it must be the name of a file in the folder")


def check_timm_options(options: Any, where: str) -> None:
    """Check that a model's folder gives timm's constructor plain numbers and words only, and its loader nothing.

    Raises:
        UserError: an option of timm's loader, or a value that could be a place.
    """
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: {_kind(options)} where a JSON object is expected; is it the right file?")
    check_settings(options, where)
    for key, value in options.items():
        if key in timm_loader_options():
            raise UserError(
                f"{where}: {key} tells timm where to find weights; remove it, they come from the folder alone"
            )
        for leaf in _leaves(value):
            if isinstance(leaf, str) and is_place(leaf):
                raise UserError(f"{where}: {key} is {leaf!r}: a model's folder may not name places outside it")


def check_timm_folder(config: Mapping[str, Any], where: str) -> None:
    """Check the ``config.json`` of a folder in timm's layout.

    Raises:
        UserError: weights or an architecture from elsewhere.
    """
    check_settings(config, where)
    options, about = config.get("model_args"), config.get("pretrained_cfg")
    if options is not None:
        check_timm_options(options, f"{where}: model_args")
    if about is not None and not isinstance(about, Mapping):
        raise UserError(f"{where}: pretrained_cfg is {_kind(about)} where a JSON object is expected")
    wrong = next((key for key in _TIMM_SOURCES if (about or {}).get(key)), None)
    if wrong is not None:
        raise UserError(f"{where}: pretrained_cfg.{wrong} names weights elsewhere; they come from the folder alone")


def timm_loader_options() -> set[str]:
    """Return the options that timm's loader takes itself; all others reach the model's constructor."""
    import timm
    from timm.models._builder import build_model_with_cfg

    own: set[str] = set()
    for function in (timm.create_model, build_model_with_cfg):
        own |= set(inspect.signature(function).parameters)
    return own - {"kwargs", "feature_cfg", "model_cfg", "exportable", "scriptable", "no_jit"}


def check_open_clip_config(config: Any, where: str) -> None:
    """Check an open_clip image tower's configuration that comes from a model's folder.

    Raises:
        UserError: a key that open_clip's image towers do not have, or weights that timm would fetch.
    """
    from open_clip.model import CLIPVisionCfg

    if not isinstance(config, Mapping) or not isinstance(config.get("vision_cfg"), Mapping):
        raise UserError(f"{where}: no configuration of open_clip (embed_dim, vision_cfg); is it the right file?")
    check_keys(where, config, ("embed_dim", "vision_cfg", "quick_gelu"))
    vision = config["vision_cfg"]
    check_keys(f"{where}: vision_cfg", vision, CLIPVisionCfg.__dataclass_fields__)
    check_settings(vision, f"{where}: vision_cfg")
    tower = vision.get("timm_model_name")
    if vision.get("timm_model_pretrained") or (tower is not None and (not isinstance(tower, str) or is_place(tower))):
        raise UserError(f"{where}: vision_cfg would load weights from elsewhere; they come from the folder alone")


def check_open_clip_folder(folder: Path) -> None:
    """Check the ``open_clip_config.json`` of a folder, if there is one.

    Its text tower and tokenizer may be names on the hub, as those of published SigLIPs are.

    Raises:
        UserError: weights that timm would fetch, or a place on this machine or the network.
    """
    path = folder / "open_clip_config.json"
    if not path.is_file():
        return
    config = read_object(path)
    model = config.get("model_cfg")
    if not isinstance(model, dict):
        raise UserError(f"model: {path}: model_cfg is missing or not a JSON object; is the copy complete?")
    tower = {key: model[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in model}
    check_open_clip_config(tower, f"model: {path}: model_cfg")
    check_settings(model, f"model: {path}: model_cfg")
    text = model.get("text_cfg")
    for key in ("hf_model_name", "hf_tokenizer_name"):
        name = text.get(key) if isinstance(text, dict) else None
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)):
            raise UserError(f"model: {path}: text_cfg.{key} is {name!r}; it must be a name on the hub")


def is_place(name: str) -> bool:
    """Return whether a name of a model is a path, an address, or another library's scheme for one."""
    return ":" in name or "\\" in name or "/" in name or ".." in PurePosixPath(name).parts


def _check_generation(content: Mapping[str, Any], path: Path) -> None:
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = content.get(key)
        if value is None:
            continue
        tokens = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
            raise UserError(f"model: {path}: {key} is {value!r}; it must be a token id or a list of them")


def _check_index(content: Mapping[str, Any], path: Path) -> None:
    files = content.get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"model: {path}: weight_map is missing or not a JSON object; is the copy complete?")
    wrong = next((file for file in files.values() if not _is_plain(file)), None)
    if wrong is not None:
        raise UserError(f"model: {path}: weight_map names {wrong!r}; weights are files of the folder itself")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _entries(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield the path, key and value of every entry, those of mappings in lists included."""
    for key, value in settings.items():
        here = f"{path}.{key}" if path else str(key)
        yield here, str(key), value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Mapping):
                yield from _entries(inner, here)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for inner in value:
        yield from _leaves(inner)


def _numbers(value: Any) -> Iterator[float]:
    for leaf in _leaves(value):
        if isinstance(leaf, int | float) and not isinstance(leaf, bool):
            yield leaf


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
