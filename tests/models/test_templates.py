"""Chat templates render as in Transformers, and are stopped before they use up the machine."""

import time

import chat_templates
import pytest
from jinja2.exceptions import SecurityError

from data.errors import BadSample
from vlm_distill.models import templates
from vlm_distill.models.chat import DEFAULT_TEMPLATE
from vlm_distill.models.composed_processor import ComposedProcessor

LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "nested loops": LOOP * 3 + "x" + "{% endfor %}" * 3,
    "loops that write nothing": LOOP * 3 + "{% endfor %}" * 3,
    "loops over text": "{% for a in '0123456789' %}" * 12 + "{% endfor %}" * 12,
    "macros in macros": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "text doubled by +": "{% set n = namespace(s='x') %}" + LOOP + "{% set n.s = n.s + n.s %}{% endfor %}",
    "text doubled by ~": "{% set n = namespace(s='x') %}" + LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a list doubled": "{% set n = namespace(s=[1]) %}" + LOOP + "{% set n.s = n.s + n.s %}{% endfor %}",
    "text times a number": "{{ 'x' * 1000000000000 }}",
    "a number to a power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a wide field": "{{ '%1000000000000d' % 1 }}",
    "a wide field by format": "{{ '{:>1000000000000}'.format(1) }}",
    "a filter that fills up": "{{ 'x' | center(1000000000000) }}",
    "a method that fills up": "{{ 'x'.ljust(1000000000000) }}",
    "a replacement": "{% set s = 'x' * 4000000 %}{{ s.replace('x', s) }}",
    "a join": "{% set s = 'x' * 4000000 %}{{ s.join(['a'] * 4000000) }}",
    "a join by filter": "{% set s = 'x' * 4000000 %}{{ ([s] * 4000000) | join }}",
    "an indent": "{{ [[1]] | tojson(indent=1000000000000) }}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_would_take_the_machine_is_stopped(bomb, monkeypatch, tokenizer):
    monkeypatch.setattr(templates, "MOST_SECONDS", 0.2)
    before = time.monotonic()
    with pytest.raises(SecurityError):
        templates.compile_limited(BOMBS[bomb]).render(messages=[])
    assert time.monotonic() - before < 5


def test_a_sample_of_such_a_template_is_a_bad_one(tokenizer, talk, monkeypatch):
    monkeypatch.setattr(templates, "MOST_SECONDS", 0.2)
    tokenizer.chat_template = BOMBS["loops that write nothing"]
    with pytest.raises(BadSample, match=r"takes more than 0\.2 seconds"):
        ComposedProcessor(tokenizer).encode(talk("a", "b"), [])
    monkeypatch.setattr(templates, "MOST_SECONDS", 1000)  # it is not tried again
    with pytest.raises(BadSample, match=r"takes more than 0\.2 seconds"):
        ComposedProcessor(tokenizer).encode(talk("c", "d"), [])


TALKS = {
    "texts": [("system", "Be brief."), ("user", " Why? "), ("assistant", "<think>\nSo.\n</think>\n\nBecause. ")],
    "an answer first": [("assistant", "Hello."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "No.")],
    "nothing": [],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", chat_templates.JINJA)
def test_simple_messages_are_rendered_as_transformers_renders_them(name, talk, monkeypatch):
    tokenizer = chat_templates.processor(name).tokenizer
    messages = [{"role": role, "content": text} for role, text in TALKS[talk]]
    for generation in (False, True):

        def render(messages=messages, generation=generation):
            try:
                return templates.apply_template(tokenizer, messages, (), generation)
            except Exception as error:  # templates refuse some messages
                return str(error)

        own = render()
        with monkeypatch.context() as patch:
            patch.setattr(templates, "_is_plain", lambda message: False)
            assert own == render()


def test_messages_with_more_than_texts_are_left_to_transformers(tokenizer):
    class Text(str):
        """Text with methods that templates must not reach."""

    called = [{"function": {"name": "look", "arguments": {}}}]
    for message in (
        {"role": "user", "content": Text("a")},
        {"role": "user", "content": [{"type": "text", "text": Text("a")}]},
        {"role": "user", "content": [{"type": "image", "image": object()}]},
        {"role": "assistant", "content": "a", "tool_calls": called},
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
        {"role": "assistant", "content": None},
    ):
        assert not templates._is_plain(message)


USUAL = (
    "{%- macro show(x) %}{{ '<' ~ x | upper | trim ~ '>' }}{%- endmacro %}"
    "{%- set ns = namespace(n=0, budget=131072) %}"
    "{%- for m in messages if m.role != 'system' %}{% if loop.index > 5 %}{% break %}{% endif %}"
    "{%- set ns.n = ns.n + 1 %}{{ show(m.role) }} {{ m.content | tojson(indent=2) }} {{ '%05d' % ns.n }}"
    "{{ 'a,b'.split(',') | join('-') }} {{ '{:>4}'.format(ns.n) }}{{ ', '.join(['x', 'y']) | replace('x', 'z') }}"
    "{%- generation %}{{ m.content * 2 }}{% endgeneration %}{{ 2 ** 10 }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [USUAL, DEFAULT_TEMPLATE])
def test_other_templates_are_rendered_as_by_transformers(template):
    messages = [{"role": role, "content": role * 3} for role in ("system", "user", "assistant")]
    given = {"messages": messages, "add_generation_prompt": True, "eos_token": "</s>"}
    assert templates.compile_limited(template).render(**given) == templates._compile(template).render(**given)


def test_each_kind_of_processor_renders_under_the_limits(tokenizer):
    tokenizer.chat_template = BOMBS["text times a number"]
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
