"""Render chat templates under limits of time and size, since anyone may have written them.

Transformers renders them in Jinja's sandbox, which protects Python's objects but not the machine: one line can loop for
years or fill the memory. Here they are compiled with a look at the clock in every block, and with a check of every
operation whose result can be much larger than its inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

#: The most characters of a rendered conversation, and of any intermediate text: some two million tokens.
MOST_CHARACTERS = 8_000_000

#: The most seconds of CPU time for a conversation. Templates of published models take milliseconds.
MOST_SECONDS = 5.0

#: Where Transformers has the ``apply_chat_template`` of all tokenizers and of processors without one of their own.
_COMMON = ("transformers.tokenization_utils_base", "transformers.processing_utils")

# The longest integer in bits, and the largest number as an argument of a filter or string method.
_MOST_BITS, _MOST_WIDTH = 256, 100_000

#: Blocks and calls between two looks at the clock, which is a system call.
_BLOCKS = 32


class _Clock:
    """Counts what a rendering runs, and looks at the time now and then."""

    def __init__(self) -> None:
        self.blocks = 0
        self.deadline: float | None = None

    def tick(self) -> None:
        self.blocks += 1
        if self.blocks % _BLOCKS:
            return
        now = time.thread_time()
        if self.deadline is None:
            self.deadline = now + MOST_SECONDS
        elif now > self.deadline:
            raise _TooSlowError(f"it takes more than {MOST_SECONDS:g} seconds")


_clock: ContextVar[_Clock | None] = ContextVar("clock", default=None)
_compile = chat_template_utils._compile_jinja_template


def limit_templates() -> None:
    """Have Transformers render every chat template of this process under the limits; a second call changes nothing."""
    chat_template_utils._compile_jinja_template = compile_limited


@lru_cache
def compile_limited(template: str) -> Template:
    """Compile a chat template with Transformers' own filters and functions; rendering it obeys the limits.

    Raises:
        jinja2.TemplateError: the template is malformed. Rendering raises ``SecurityError`` beyond a limit.
    """
    theirs = _compile("").environment
    limited = object.__new__(LimitedEnvironment)
    vars(limited).update(vars(theirs))
    limited.template_class = LimitedTemplate
    limited.cache = None  # theirs caches templates by name
    limited.extensions = {name: extension.bind(limited) for name, extension in theirs.extensions.items()}
    limited.filters = {name: _limited_filter(name, function) for name, function in theirs.filters.items()}
    return limited.from_string(template)


def apply_template(owner: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], generation: bool) -> str:
    """Render a conversation as ``owner.apply_chat_template`` does.

    Transformers copies all messages twice, to keep objects with dangerous methods from templates. That takes longer
    than rendering, and is left out for messages of roles and texts alone: the sandbox lets no template change them.

    Args:
        owner: a tokenizer, or a processor that has one.
        messages: in the form that the template takes.
        tools: JSON schemas; may be empty.
        generation: end with the opening of the assistant's turn.
    """
    template = owner.chat_template
    common = type(owner).apply_chat_template.__module__ in _COMMON
    if common and isinstance(template, str) and not tools and messages and all(map(_is_plain, messages)):
        names = getattr(owner, "tokenizer", owner).special_tokens_map
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": generation}
        return compile_limited(template).render(**names, **given)
    return owner.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generation
    )


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Return whether a message is a role and a text, or a role and parts that are images or texts."""
    content = message.get("content")
    if type(message) is not dict or len(message) != 2 or type(message.get("role")) is not str:
        return False
    if type(content) is str:
        return True
    return type(content) is list and all(_is_plain_part(part) for part in content)


def _is_plain_part(part: Any) -> bool:
    return type(part) is dict and all(type(value) is str for value in part.values())


class _TooSlowError(SecurityError):
    pass


class LimitedTemplate(Template):
    """A template whose rendering ends after :data:`MOST_SECONDS` or :data:`MOST_CHARACTERS`.

    One that took too long is not tried again: it would cost that time for every sample of a data set.
    """

    slow: str | None = None

    def render(self, *args: Any, **kwargs: Any) -> str:
        return "".join(self.generate(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        if self.slow is not None:
            raise SecurityError(self.slow)
        length = 0
        token = _clock.set(_Clock())
        try:
            for piece in super().generate(*args, **kwargs):
                length += len(piece)
                _check_length(length)
                yield piece
        except _TooSlowError as error:
            self.slow = str(error)
            raise
        finally:
            _clock.reset(token)


class _Code(CodeGenerator):
    """The sandbox's code with a look at the clock in every block, and with ``~`` as a call."""

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        self.writeline("environment.check_time()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_limited((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox under limits of time and size."""

    code_generator_class = _Code
    # Computed when the template runs; other constants are computed when it is compiled.
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def check_time(self) -> None:
        if clock := _clock.get():
            clock.tick()

    def concat_limited(self, parts: tuple[Any, ...]) -> str:
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * (right if isinstance(right, int) else 1) > _MOST_BITS:
            raise SecurityError("it computes a number of more than 256 bits")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(times, int):
                    _check_length(len(text) * times)
        if operator == "%" and isinstance(left, str):
            _check_filled(left, "%", right)
        return _limited(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        text = getattr(called, "__self__", None)
        if isinstance(text, str):
            _check_method(called.__name__, text, args, kwargs)
        return _limited(super().call(context, called, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            _check_method("format", value.__self__, args, kwargs)
            return function(*args, **kwargs)

        return limited


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Jinja passes some filters its environment or context first; it knows by attributes, which `wraps` copies.
    passes = hasattr(function, "jinja_pass_arg")

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[1:] if passes else args
        if name == "join" and not isinstance(value, str):
            value = list(value)
            args = (args[0], value, *others) if passes else (value, *others)
            between = max((len(x) for x in (*others, *kwargs.values()) if isinstance(x, str)), default=0)
            _check_length(sum(len(str(item)) + between for item in value))
        elif isinstance(value, str):
            _check_method(name, value, tuple(others), kwargs)
        _check_numbers((*others, *kwargs.values()))
        return _limited(function(*args, **kwargs))

    return limited


def _check_method(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a string method, or a filter of that name, whose result would be far too long."""
    given = (*args, *kwargs.values())
    _check_numbers(given)
    if name == "replace":
        new = max((len(x) for x in given if isinstance(x, str)), default=0)
        old = next((x for x in given if isinstance(x, str)), "")
        _check_length(text.count(old) * new)
    elif name == "join" and given and isinstance(given[0], list | tuple):
        _check_length(sum(len(str(item)) + len(text) for item in given[0]))
    elif name in ("format", "format_map"):
        _check_filled(text, "{", given)
        _check_filled(text, "%", given)


def _check_filled(text: str, mark: str, values: Any) -> None:
    """Refuse a format string that would be too long with the longest value, or the named width, in every field."""
    if isinstance(values, dict):
        values = list(values.values())
    elif not isinstance(values, list | tuple):
        values = [values]
    longest = max((len(str(value)) for value in values), default=0)
    _check_length(len(text) + text.count(mark) * longest)
    digits = "".join(letter if letter.isdigit() else " " for letter in text).split()
    _check_numbers([int(number[:20]) for number in digits] if mark in text else [])


def _check_numbers(values: Any) -> None:
    if any(isinstance(value, int) and value > _MOST_WIDTH for value in values):
        raise SecurityError(f"it fills up to more than {_MOST_WIDTH:,}")


def _check_length(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise SecurityError(f"it writes more than {MOST_CHARACTERS:,} characters")


def _limited(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check_length(len(value))
    return value


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1
