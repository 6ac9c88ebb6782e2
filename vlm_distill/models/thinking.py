"""Separate a model's thoughts from its answer: only the answer is scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Marks around a thought, as models write them.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reason>", "</reason>"),
    ("<reasoning>", "</reasoning>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|thinking|>", "<|/thinking|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>", "<channel|>"),
    ("<unused94>", "<unused95>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
)
#: Marks of single families around a whole answer. Words such as ``<answer>`` stay: the references score them as text.
ANSWER_MARKS = (
    ("<|begin_of_box|>", "<|end_of_box|>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
#: Marks of gpt-oss's channels; the answer is in the last ``final`` one.
CHANNEL_MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")

_WRAPPED = re.compile(
    r"\s*(?:" + "|".join(f"{re.escape(start)}(.*){re.escape(end)}" for start, end in ANSWER_MARKS) + r")\s*",
    re.IGNORECASE | re.DOTALL,
)
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")
_END = re.compile(r"<\|(?:end|return|start|call)\|>")
_OPENING_TOKENS = 32
# Decoding without special tokens glues a channel's name to its text: "analysisWe see …assistantfinalRed".
_GLUED_FINAL = re.compile(r"assistantfinal|\Afinal(?=[^a-z\s.,:;!?'-])")
_GLUED_THOUGHT = re.compile(r"\A(?:analysis|commentary)(?=[^a-z\s.,:;!?'-])")


def split_thought(text: str) -> tuple[str, bool]:
    """Return the answer in a text without the thoughts before it, and whether the thoughts ended.

    A text can begin inside a thought, if the chat template's opening contains ``<think>``: then everything up to the
    last closing mark is thought. A thought that never ends leaves no answer: ``("", False)``. Marks around the whole
    answer (``ANSWER_MARKS``) are removed. A text without any of these is returned unchanged.
    """
    answer, ended = _without_thought(text)
    wrapped = _WRAPPED.fullmatch(answer)
    inner = None if wrapped is None else next(part for part in wrapped.groups() if part is not None).strip()
    return (answer if inner is None else inner), ended


def _without_thought(text: str) -> tuple[str, bool]:
    if "<|channel|>" in text:
        return _of_channels(text)
    for opening, closing in MARKS:
        if re.search(f"{re.escape(opening)}|{re.escape(closing)}", text, re.IGNORECASE):
            return _of_marks(text, re.escape(opening), re.escape(closing))
    glued = list(_GLUED_FINAL.finditer(text))
    if glued and (glued[-1].start() == 0 or text.startswith(("analysis", "commentary", "final"))):
        return text[glued[-1].end() :].strip(), True
    return ("", False) if _GLUED_THOUGHT.match(text) else (text, True)


def _of_marks(text: str, opening: str, closing: str) -> tuple[str, bool]:
    rest = re.sub(f"{opening}.*?{closing}", "", text, flags=re.IGNORECASE | re.DOTALL)
    # The rest of a thought that quoted its own closing mark, or began before the text.
    rest = re.split(closing, rest, flags=re.IGNORECASE)[-1]
    if re.search(opening, rest, re.IGNORECASE):
        return "", False
    return rest.strip(), True


def _of_channels(text: str) -> tuple[str, bool]:
    finals = list(_FINAL.finditer(text))
    if not finals:
        return "", False
    return _END.split(text[finals[-1].end() :])[0].strip(), True


def opening_mark(tokenizer: Any, prompt: Sequence[int]) -> str:
    """Return the mark with which a prompt's last tokens open a thought, or an empty string."""
    end = tokenizer.decode(list(prompt[-_OPENING_TOKENS:]), skip_special_tokens=False).rstrip().lower()
    return next((opening for opening, _ in MARKS if end.endswith(opening.lower())), "")


def mark_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens that mark thoughts and channels, by id; plain decoding would drop them."""
    marks = {mark for pair in (*MARKS, *ANSWER_MARKS) for mark in pair} | set(CHANNEL_MARKS)
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i: text for i, text in special.items() if text in marks}


def decode_with_marks(tokenizer: Any, ids: Sequence[int], marks: Mapping[int, str]) -> str:
    """Return the text of an answer's tokens, without special tokens except those of :func:`mark_tokens`."""
    text, plain = "", list[int]()
    for token in ids:
        if token not in marks:
            plain.append(token)
            continue
        text += tokenizer.decode(plain, skip_special_tokens=True) + marks[token]
        plain = []
    return text + tokenizer.decode(plain, skip_special_tokens=True)
