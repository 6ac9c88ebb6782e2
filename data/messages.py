"""Read messages in all their spellings: roles, parts, tool calls, reasoning, and masks of the loss."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .conversation import ImageSource, VideoFile, message_text
from .errors import BadSample
from .image_values import IMAGE_KEYS, images_of
from .images import named_image
from .keys import MASKS, check_keys, is_empty, one_of, trained_on

#: A message before its content is split into parts: ``role``, raw ``content`` and a conversation's optional keys.
RawMessage = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
_CALLS = ("function_call", "tool_call")
_TOOL_KEYS = {"tool_calls", "function_call", "tool_call_id", "name"}
_CONTENT = ("content", "value")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = {"role", "from", *_CONTENT, *_REASONING, *MASKS, *_TOOL_KEYS}

_TEXT_PARTS = ("text", "input_text", "output_text")
#: Types of parts that are images.
IMAGE_PARTS = ("image", "image_url", "input_image")
#: Types of parts that are videos.
VIDEO_PARTS = ("video", "video_url")
_PART_VIDEOS = ("video", "path", "url", "video_url", "file_name", "bytes")
_PART_IMAGES = ("image", "bytes", "path", "url", "image_url", "file_name", "base64")

# Placeholders of videos and images in a text. The last group are other models' placeholders.
_PLACEHOLDER = re.compile(
    r"(<video>)|<image>|<image[ _-]?([0-9]{1,3})>|<\|image_([0-9]{1,3})\|>"
    r"|(<\|image\|>|<image_placeholder>|<ImageHere>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>)"
)
# What else looks like a placeholder: other spellings, and control tokens of models.
_OTHER_PLACEHOLDER = re.compile(
    r"<\|?(?:start_of_)?(?:image|img)s?(?:_?(?:pad|token|soft_token|here))?[ _-]?[0-9]{0,3}\|?>"
    r"|\[(?:image|img)[ _-]?[0-9]{0,3}\]|\{+(?:image|img)[ _-]?[0-9]{0,3}\}+",
    re.IGNORECASE,
)
_PATH_IN_TEXT = re.compile(r"<img>[^<]*</img>")
_GROUNDING = re.compile(r"<bbox>|<ref-object>")


def read_message(given: Mapping[str, Any], unread: Counter[str]) -> RawMessage:
    """Return the role, the raw content and the optional keys of one message.

    Raises:
        BadSample: the role is unknown, two keys contradict each other, or an unread key would change the meaning.
    """
    check_keys(given, _MESSAGE_KEYS, unread, "messages[].")
    name = one_of(given, ("role", "from"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadSample("unknown role", repr(name)[:80])
    content = one_of(given, _CONTENT)
    if content is None and "" in (given.get("content"), given.get("value")):
        content = ""
    message: RawMessage = {"role": role, "content": content}
    if given.keys() & _TOOL_KEYS or name in _CALLS or role == "tool":
        message |= _tool_keys(name, message, given)
    reasoning = one_of(given, _REASONING)
    if reasoning is not None:
        if not isinstance(reasoning, str) or role != "assistant":
            raise BadSample("reasoning is not an assistant's text", repr(reasoning)[:80])
        message["reasoning_content"] = reasoning
    wanted = trained_on(given, f"a message of the {role}")
    # Some tools write the number 1 on every message, but true on a question is deliberate.
    if wanted and role != "assistant" and any(isinstance(given.get(key), bool) for key in MASKS):
        raise BadSample("only an assistant's messages are learnt", f"a message of the {role} asks to be learnt")
    if wanted is False and role == "assistant":
        message["supervised"] = False
    return message


def _tool_keys(name: str, message: RawMessage, given: Mapping[str, Any]) -> RawMessage:
    """Return the keys of tool calls and their results. A call written as the message's text becomes one as well."""
    found: RawMessage = {}
    calls = given.get("tool_calls")
    if is_empty(calls):
        calls = [given["function_call"]] if not is_empty(given.get("function_call")) else []
    if name in _CALLS:
        calls, found["content"] = _json(message["content"], "tool call"), ""
        calls = calls if isinstance(calls, list) else [calls]
    if calls:
        if message["role"] != "assistant" or not isinstance(calls, list):
            raise BadSample("tool call is not an assistant's list", repr(calls)[:80])
        found["tool_calls"] = [_tool_call(call) for call in calls]
        if message["content"] is None:
            found["content"] = ""
    if message["role"] == "tool" and isinstance(message["content"], Mapping):
        found["content"] = json.dumps(message["content"], ensure_ascii=False)
    for key in ("tool_call_id", "name"):
        if not is_empty(given.get(key)):
            found[key] = str(given[key])
    return found


def _tool_call(call: Any) -> dict[str, Any]:
    """Return a call as Transformers' templates expect it, with arguments as an object rather than JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadSample("tool call without a name", repr(call)[:80])
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, "tool call")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }
    if isinstance(call, Mapping) and not is_empty(call.get("id")):
        made["id"] = str(call["id"])
    return made


def read_tools(given: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the JSON schemas of tools, given as a list or as the JSON text of one.

    Raises:
        BadSample: they are neither.
    """
    if is_empty(given):
        return ()
    tools = _json(given, "list of tools") if isinstance(given, str) else given
    if isinstance(tools, list):
        tools = [_json(tool, "tool") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadSample("tools are not a list of objects", repr(given)[:80])
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample(f"{what} is not JSON", f"{text!r:.80}: {error}") from None


# Content.


def has_image_parts(messages: Sequence[RawMessage]) -> bool:
    """Return whether any part of any message is an image or a video, so that ``<image>`` in a text is just text."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return any(_kind(part) in (*IMAGE_PARTS, *VIDEO_PARTS) for part in chain.from_iterable(contents))


def cut_into_parts(
    content: Any, folder: Path, unread: Counter[str], *, marks: bool, listed: tuple[bool, bool]
) -> list[dict[str, Any]]:
    """Return content as a list of parts.

    Until :func:`place_images`, an image or video part may hold its own file under ``image``, and an image part the
    number of the image it shows under ``number``.

    Args:
        content: a text, or a list of parts.
        folder: the folder that relative image paths start from.
        unread: counts the keys of parts that are not read.
        marks: whether ``<image>`` and the like in a text are placeholders of images.
        listed: whether the record lists images, so that other models' placeholders count too; and whether it lists
            videos, so that ``<video>`` does.
    """
    if isinstance(content, str):
        return _cut_text(content, *listed) if marks else _text_part(content)
    if not isinstance(content, list):
        raise BadSample("message without text", repr(content)[:80])
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = _kind(part)
        if kind in IMAGE_PARTS:
            parts.append(_image_part(part, folder, unread))
        elif kind in VIDEO_PARTS:
            parts += _video(part, folder, unread, listed[1])
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            check_keys(part, ("type", "text"), unread, "content[].")
            parts += cut_into_parts(part["text"], folder, unread, marks=marks, listed=listed)
        else:
            raise BadSample("unknown message part", repr(part)[:80])
    return parts


def _kind(part: Any) -> str | None:
    """Return the type of a part, or without one the key that implies it."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if kind is None:
        kind = next(
            (key for key in ("text", "image", "image_url", "video", "video_url") if not is_empty(part.get(key))), None
        )
    return kind if isinstance(kind, str) else None


def _image_part(part: Mapping[str, Any], folder: Path, unread: Counter[str]) -> dict[str, Any]:
    check_keys(part, ("type", *_PART_IMAGES, "index"), unread, "content[].", has_image=True)
    own = images_of({key: part[key] for key in _PART_IMAGES if key in part}, folder, unread)
    if len(own) > 1:
        raise BadSample("several images in one part", f"{len(own)} images; write a part for each")
    index = part.get("index")
    if not own and isinstance(part.get("source"), Mapping):  # as in Anthropic's API
        raise BadSample("unknown kind of image", "an object under source; write its data under base64")
    if own:
        return {"type": "image", "image": own[0]}
    if index is None:
        return {"type": "image"}
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise BadSample("index of an image is not a number", f"index: {index!r:.40}")
    return {"type": "image", "number": index + 1}


def _video(part: Mapping[str, Any], folder: Path, unread: Counter[str], listed: bool) -> list[dict[str, Any]]:
    """Return a video's part, or a part for each frame if it lists images. Its file may be ``listed`` by the record."""
    check_keys(part, ("type", "frames", *_PART_VIDEOS), unread, "content[].", has_image=True)
    given = part["video"] if isinstance(part.get("video"), list) else part.get("frames")
    frames = images_of(given, folder, unread)
    if frames:
        return [{"type": "image", "image": frame} for frame in frames]
    file = one_of(part, _PART_VIDEOS)
    if file is None and listed:
        return [{"type": "video"}]
    return [{"type": "video", "image": _video_file(file, folder)}]


def _video_file(file: Any, folder: Path) -> VideoFile:
    """Return the video of one value: a path, a URL, bytes, or an object with one of these."""
    if isinstance(file, Mapping):
        file = one_of(file, ("bytes", *IMAGE_KEYS))
    if isinstance(file, str) and file:
        file = named_image(file, folder)
    if not isinstance(file, str | bytes):
        raise BadSample("video without a file", "name a file under 'video', or list images under 'frames'")
    return VideoFile(file)


def videos_of(value: Any, folder: Path) -> list[ImageSource]:
    """Return the videos that a record lists: none, one, or one for each item of a list.

    Raises:
        BadSample: a value names no file.
    """
    if is_empty(value):
        return []
    return [_video_file(file, folder) for file in (value if isinstance(value, list | tuple) else [value])]


def _cut_text(text: str, has_images: bool, has_videos: bool) -> list[dict[str, Any]]:
    """Split a text at the placeholders of images, and at those of videos if the record lists any."""
    if found := _PATH_IN_TEXT.search(text):
        raise BadSample("image inside a text", f"{found[0][:80]}; write <image> there, and the path under images")
    parts: list[dict[str, Any]] = []
    start = 0
    for match in _PLACEHOLDER.finditer(text):
        if (match[1] and not has_videos) or (match[4] and not has_images):
            continue  # just text, or a control token
        parts += _text_part(text[start : match.start()])
        number = match[2] or match[3]
        parts.append({"type": "video" if match[1] else "image"})
        if number:
            parts[-1]["number"] = int(number)
        start = match.end()
    return parts + _text_part(text[start:])


def _text_part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def place_images(
    messages: list[dict[str, Any]], images: list[ImageSource], leading: bool, videos: list[ImageSource]
) -> list[ImageSource]:
    """Return all images and videos in the order of their parts, and remove them and their numbers from the parts.

    If there are no parts of either kind, or with ``leading`` too few for images, they are added to the front of the
    first user message. ``<image>`` is the place of a video if the record has videos alone.

    Raises:
        BadSample: parts and images, or parts and videos, differ in number, or numbers do not name each image.
    """
    unmarked = not any(part["type"] in ("image", "video") for message in messages for part in message["content"])
    _place_videos(messages, videos, unmarked, alone=not images)
    contents = chain.from_iterable(message["content"] for message in messages)
    parts = [part for part in contents if part["type"] in ("image", "video")]
    open_parts = [part for part in parts if "image" not in part]
    numbered = [part for part in open_parts if "number" in part]
    if numbered:
        images = _by_number(open_parts, numbered, images)
    elif (unmarked or leading) and len(open_parts) < len(images):
        first = next(message for message in messages if message["role"] == "user")
        if not leading:
            _check_other_placeholders(messages)
        made: list[dict[str, Any]] = [{"type": "image"} for _ in range(len(images) - len(open_parts))]
        first["content"][:0] = made
        parts, open_parts = made + parts, made + open_parts
    if len(open_parts) != len(images):
        raise BadSample(
            "image count mismatch", f"{_count(len(open_parts), 'placeholder')}, {_count(len(images), 'image')}"
        )
    remaining = iter(images)
    return [part.pop("image") if "image" in part else next(remaining) for part in parts]


def _place_videos(messages: list[dict[str, Any]], videos: list[ImageSource], unmarked: bool, *, alone: bool) -> None:
    """Give the record's videos to the parts that wait for one; if it has no parts (``unmarked``), put them first."""
    parts = [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]
    waiting = [part for part in parts if part["type"] == "video" and "image" not in part]
    if videos and alone and not waiting:
        waiting = [part for part in parts if "image" not in part and "number" not in part]
    if videos and unmarked:
        first = next(message for message in messages if message["role"] == "user")
        waiting = [{"type": "video"} for _ in videos]
        first["content"][:0] = waiting
    if len(waiting) != len(videos):
        raise BadSample(
            "video count mismatch", f"{_count(len(waiting), 'placeholder')}, {_count(len(videos), 'video')}"
        )
    for part, video in zip(waiting, videos, strict=True):
        part.update(type="video", image=video)


def _check_other_placeholders(messages: list[dict[str, Any]]) -> None:
    """Raise ``BadSample`` if a question holds a placeholder in another spelling."""
    for message in messages:
        found = _OTHER_PLACEHOLDER.search(message_text(message)) if message["role"] == "user" else None
        if found:
            raise BadSample("unknown placeholder of an image", f"{found[0]}; write <image> at its place")


def _by_number(
    parts: list[dict[str, Any]], numbered: list[dict[str, Any]], images: list[ImageSource]
) -> list[ImageSource]:
    """Return the image of each part. Numbers start at 1, or at 0 if one of them is 0; an image may be shown twice."""
    if len(numbered) < len(parts):
        raise BadSample("image count mismatch", "some placeholders have numbers and some have none")
    numbers = [part.pop("number") for part in numbered]
    first = min(1, *numbers)
    if {number - first for number in numbers} != set(range(len(images))):
        shown = ", ".join(map(str, sorted(set(numbers))))
        raise BadSample("image count mismatch", f"placeholders number {shown}, {_count(len(images), 'image')}")
    return [images[number - first] for number in numbers]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_grounding(messages: Sequence[Mapping[str, Any]], objects: Any) -> None:
    """Raise ``BadSample`` if ``objects`` would fill marks in the texts, in a format that each model defines."""
    parts = chain.from_iterable(message["content"] for message in messages)
    if not is_empty(objects) and any(_GROUNDING.search(part["text"]) for part in parts if part["type"] == "text"):
        raise BadSample(
            "grounding objects are not supported", "key 'objects'; write the boxes into the text as the model has them"
        )
