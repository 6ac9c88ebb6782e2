"""Check the keys of a record: each one is read, known to be meaningless, refused, or counted as not read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from PIL import Image

from .errors import BadSample
from .labelled import is_image_name

# Keys without meaning for training, at every level. The first two are the index column that pandas writes.
_NAMES = ("", "Unnamed: 0", "id", "idx", "index", "uid", "uuid", "question_id", "image_id", "prompt_id", "message_id")
_ORIGIN = ("source", "data_source", "dataset", "dataset_name", "split", "set_name", "version", "model", "url")
_PICTURES = ("width", "height", "size", "image_width", "image_height", "image_size", "mode", "format", "detail")
_LICENCE = ("license", "licence", "author", "copyright", "coco_url", "flickr_url", "date_captured")
_REST = ("type", "task", "lang", "language", "timestamp", "created_at", "cache_control", "finish_reason", "__key__")
MEANINGLESS = frozenset((*_NAMES, *_ORIGIN, *_PICTURES, *_LICENCE, *_REST, "parallel_tool_calls", "__url__"))

_PREFERENCE = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "kto_tag")
# Keys that would change a record's meaning and are not supported: the keys, a reason, a remedy.
_REFUSALS = (
    (
        ("video", "videos", "audio", "audios"),
        "video and audio are not supported",
        "name files of videos under the record's videos, or in parts: {type: video, video: FILE}",
    ),
    (_PREFERENCE, "preference data is not supported", "name the answer to learn, as in columns: {messages: chosen}"),
    (("documents",), "documents are not supported", "write them into a message"),
    (("thought", "thoughts", "cot", "chain_of_thought"), "thought under an unknown key", "name it reasoning_content"),
    (("choices", "options"), "multiple-choice rows are not supported", "write them as conversations"),
    (
        ("system_prompt", "system_message", "system_instruction", "sys_prompt"),
        "system message under an unknown key",
        "name it with columns: {system: …}",
    ),
    (
        ("chat_template_kwargs", "enable_thinking", "reasoning_effort", "thinking_budget"),
        "template arguments of a record are not supported",
        "set the model's template_arguments",
    ),
)
_REFUSED: dict[str, tuple[str, str]] = {}
for _keys, _reason, _remedy in _REFUSALS:
    _REFUSED |= dict.fromkeys(_keys, (_reason, _remedy))
# Text that belongs to a question, in a record that is not a list of messages.
_OPTION = re.compile(r"(option|choice|opt|op|candidate)s?_?([a-h]|[0-9])", re.IGNORECASE)
# An answer's thought: read only in a message, where it is clear to which answer it belongs.
_BESIDE_ANSWER = ("reasoning_content", "reasoning", "thinking")
_BESIDE_QUESTION = ("context", "hint", "passage", "history", "instruction", "input", "prompt", "query", "prefix")

_WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask")
_LEARN = (
    "loss",
    "compute_loss",
    "train",
    "training",
    "trainable",
    "is_trainable",
    "train_on_turn",
    "supervised",
    "learn",
)
_TRUE_MEANS_LEARN = frozenset((*_WEIGHTS, *_LEARN, "learnable"))
_TRUE_MEANS_CONTEXT = frozenset(
    ("mask", "masked", "is_masked", "ignore", "ignore_loss", "no_loss", "no_train", "skip_loss")
)
#: Keys that say whether something is trained on.
MASKS = _TRUE_MEANS_LEARN | _TRUE_MEANS_CONTEXT

# Other keys are taken for masks if they consist of these words, with at least one of the first group.
_OF_MASKS = frozenset(("loss", "mask", "masks", "masked", "train", "trainable", "trained", "training", "weight"))
_OF_MASKS |= {"learn", "learnable", "learned"}
_BESIDE_MASKS = frozenset(("is", "no", "not", "on", "this", "the", "turn", "turns", "message", "sample", "example"))
_BESIDE_MASKS |= {"token", "response", "factor", "scale", "with", "from", "for", "detail", "compute", "calculate"}
_BESIDE_MASKS |= {"skip", "ignore", "exclude", "include", "should", "use", "do"}

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_IMAGE_KEY = re.compile(
    r"([a-z0-9]+_)*(images?|imgs?|pictures?|pics?|photos?|screenshots?|frames?|pixel_values|thumbnails?)"
    r"(_?(path|file|filename|name|url|uri|bytes|base64|b64|data|list|pil)s?)*(_?[0-9]+)?|jpe?g|png|webp"
)


def is_empty(value: Any) -> bool:
    """Return whether a value is one that tables and JSON use for "nothing"."""
    if value is None:
        return True
    if isinstance(value, str | bytes | list | tuple):
        return not value
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, Mapping) and all(map(is_empty, value.values()))


def one_of(given: Mapping[str, Any], keys: Collection[str]) -> Any:
    """Return the value under whichever of ``keys`` has one, else ``None``.

    Raises:
        BadSample: two of them hold different values.
    """
    found = [key for key in keys if key in given and not is_empty(given[key])]
    if not found:
        return None
    value = given[found[0]]
    if any(given[key] != value for key in found[1:]):
        raise BadSample("two keys say different things", " and ".join(found))
    return value


def trained_on(given: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a record or message is to be trained on, or ``None`` if it does not say.

    Raises:
        BadSample: a value is neither true nor false, nor 1 or 0, or two keys contradict each other.
    """
    answers = {}
    for key in MASKS & given.keys():
        value = given[key]
        if is_empty(value):
            continue
        # Depending on the tool, a mask of 1 means "train" or "hide", but a mask of true always hides.
        known = isinstance(value, bool) or (key in _TRUE_MEANS_LEARN and value in (0, 1))
        if not known:
            detail = f"{where}: {key}: {value!r:.40}; write train: true or false"
            raise BadSample("a weight that is neither 0 nor 1", detail)
        answers[key] = bool(value) is (key in _TRUE_MEANS_LEARN)
    if len(set(answers.values())) > 1:
        raise BadSample("two keys say different things", f"{where}: {' and '.join(sorted(answers))}")
    return next(iter(answers.values()), None)


def check_keys(
    given: Mapping[str, Any],
    read: Collection[str],
    unread: Counter[str],
    where: str = "",
    *,
    chosen: Collection[str] = (),
    has_image: bool = False,
    asks: bool = False,
) -> None:
    """Check the keys that nothing reads. Count the harmless ones in ``unread``.

    Args:
        given: a record, message, part or image.
        read: the keys that are read elsewhere.
        unread: counts keys that are not read, by their name after ``where``.
        where: the level, such as ``messages[].``; empty for the record.
        chosen: our names that the source's ``columns`` assigned; the user's choice is not questioned.
        has_image: whether an image was read at this level, so that a path beside it may be the same image's name.
        asks: whether the record is a question, so that a text beside the question belongs to it.

    Raises:
        BadSample: a key changes the record's meaning, or holds an image.
    """
    shown = {"image", "images", "video", "videos"}
    images_chosen, text_chosen = bool({"image", "images"} & set(chosen)), bool(set(chosen) - shown)
    for key, value in given.items():
        if key in read or key in MEANINGLESS or is_empty(value):
            continue
        name = f"{where}{key}"
        if not images_chosen and _is_image(str(key), value, has_image):
            remedy = "put it into the record's images" if where else f"name it with columns: {{image: {key}}}"
            raise BadSample("image under an unknown key", f"{name}; {remedy}")
        if key in _REFUSED and value is not False and not (key in _PREFERENCE and text_chosen):
            reason, remedy = _REFUSED[key]
            raise BadSample(reason, f"key {name!r}; {remedy}")
        if key == "label" and value is False:
            raise BadSample("preference data is not supported", f"key {name!r}; keep the rows with true, without it")
        if key in MASKS or _is_mask(str(key)):
            if key in MASKS:
                raise BadSample("a part of a message kept out of the loss", f"key {name!r}; mask whole messages")
            remedy = "write train: true or false on messages"
            raise BadSample("loss mask under an unknown key", f"key {name!r}; {remedy}")
        if asks and _OPTION.fullmatch(str(key)):
            raise BadSample("multiple-choice rows are not supported", f"key {name!r}; write them as conversations")
        if asks and key in _BESIDE_ANSWER and not text_chosen:
            remedy = "write messages with reasoning_content, or pass it over with columns: {question: …}"
            raise BadSample("thought beside the answer", f"key {name!r} is not read; {remedy}")
        if asks and key in _BESIDE_QUESTION and not text_chosen:
            remedy = "write it into the question, or pass it over with columns: {question: …}"
            raise BadSample("text beside the question", f"key {name!r} is not read; {remedy}")
        unread[name[:80]] += 1


def _is_mask(key: str) -> bool:
    """Return whether a key, judged by its words, is a mask of the loss."""
    words = set(_CAMEL.sub("_", key).lower().split("_"))
    return bool(words & _OF_MASKS) and words <= _OF_MASKS | _BESIDE_MASKS


def _is_image(key: str, value: Any, has_image: bool) -> bool:
    """Return whether a key holds an image, judged by its name, or by its value if no image was read."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, bool | int | float):
        return False  # a size or a count
    if _IMAGE_KEY.fullmatch(_CAMEL.sub("_", key).lower()):
        return True
    # A path beside an image may be the same image's name, but image data beside an image is another image.
    if isinstance(first, Image.Image) or (isinstance(first, Mapping) and isinstance(first.get("bytes"), bytes)):
        return True
    if has_image:
        return False
    if isinstance(first, Mapping):
        return any(_is_image(str(inner), value, False) for inner, value in first.items() if not is_empty(value))
    if isinstance(first, str):
        return "." in first and is_image_name(first) and not any(map(str.isspace, first))
    return False
