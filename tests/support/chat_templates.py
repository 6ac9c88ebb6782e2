"""Chat templates that behave as the public ones do, each in Jinja and in plain Python.

The Python says which parts of the text a model has to learn: it is what the marking of tokens is held to. Messages are
``(role, text)`` or ``("assistant", text, thought)``; parts of a rendered text are ``(text, kind)``, where the kind is
``prompt``, ``block`` (what the template writes before a plain answer), ``answer`` or ``end``.
"""

import byte_tokenizer

from data.conversation import Conversation
from vlm_distill.models.composed_processor import ComposedProcessor

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|bot|>", "<|assistant|>", "<|sop|>", "<turn>", "<end_turn>")
SPECIAL += ("<|open|>", "<|close|>", "<|eot|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")

_SPLIT = (
    "{% set t = '' %}{% set c = m['content'] %}{% if m['reasoning_content'] is defined %}"
    "{% set t = m['reasoning_content'] %}{% elif '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
_LAST = "{% set n = namespace(q=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set n.q = loop.index0 %}"
_LAST += "{% endif %}{% endfor %}"


def _chatml(assistant, opening="<|im_start|>assistant\n", before=""):
    return (
        before + "{% for m in messages %}{% if m['role'] == 'assistant' %}" + assistant + "{% else %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opening + "{% endif %}"
    )


JINJA = {
    "chatml": _chatml("<|im_start|>assistant\n{{ m['content'] }}<|im_end|>\n"),
    "marked": _chatml(
        "<|im_start|>assistant\n{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    ),
    "trims": _chatml("<|im_start|>assistant\n{{ m['content'] | trim }}<|im_end|>\n"),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %}[SYS] {{ m['content'] }} {% endif %}"
        "{% endfor %}"
    ),
    "colon": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }} {{ eos_token }}"
        "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|open|>{{ m['role'] }}<|close|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|open|>assistant<|close|>\n\n{% endif %}"
    ),
    "model": (
        "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
    # No end of turn: the next message's first token ends an answer.
    "endless": (
        "<|sop|>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # An empty thought before a plain answer, unless another question follows; earlier thoughts go.
    "block": _chatml(
        _SPLIT + "<|im_start|>assistant\n{% if loop.index0 > n.q %}<think>\n{{ t }}\n</think>\n\n{% endif %}{{ c }}"
        "<|im_end|>\n",
        before=_LAST,
    ),
    # The same, opened for generation with an empty thought.
    "unthinking": _chatml(
        _SPLIT + "<|im_start|>assistant\n{% if loop.index0 > n.q and t %}<think>\n{{ t }}\n</think>\n\n{% endif %}"
        "{{ c }}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        before=_LAST,
    ),
    # Opened with the beginning of a thought, an empty thought in every plain answer.
    "opened": _chatml(
        _SPLIT
        + "<|im_start|>assistant\n<think>\n{{ t + '\n' if t and loop.index0 > n.q else '\n' }}</think>\n\n{{ c }}"
        "<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
        before=_LAST,
    ),
    # Every thought is hidden, and none is opened for a plain answer.
    "hides": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<|bot|>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}"
        "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
    ),
    "channels": (
        _LAST
        + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + _SPLIT
        + "{% if t and loop.index0 > n.q %}<|start|>assistant<|channel|>analysis<|message|>{{ t }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ c }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
}


def _plain(messages, frame, header, answer, end, start="", after="", trim=False):
    parts = [(start, "prompt")]
    for message in messages:
        text = written(message).strip() if trim else written(message)
        if message[0] == "assistant":
            parts += [(header, "prompt"), (answer.format(text), "answer"), (end, "end"), (after, "prompt")]
        elif isinstance(frame, dict):
            parts.append((frame[message[0]].format(text), "prompt"))
        else:
            parts.append((frame.format(message[0], text), "prompt"))
    return parts


def written(message):
    """A message's content with its thought, as data sets write it."""
    return f"<think>\n{message[2]}\n</think>\n\n{message[1]}" if len(message) > 2 else message[1]


def _thinking(messages, write):
    """ChatML with what ``write(text, thought, whether a question follows)`` says of an answer."""
    parts = []
    for i, message in enumerate(messages):
        if message[0] == "assistant":
            asked_again = any(later[0] == "user" for later in messages[i + 1 :])
            thought = message[2] if len(message) > 2 else ""
            parts += [("<|im_start|>assistant\n", "prompt"), *write(message[1], thought, asked_again)]
            parts += [("<|im_end|>", "end"), ("\n", "prompt")]
        else:
            parts.append((f"<|im_start|>{message[0]}\n{message[1]}<|im_end|>\n", "prompt"))
    return parts


def _block(text, thought, asked_again):
    if asked_again:
        return [(text.lstrip("\n") if thought else text, "answer")]
    if thought:
        return [(f"<think>\n{thought}\n</think>\n\n{text}", "answer")]
    return [("<think>\n\n</think>\n\n", "block"), (text, "answer")]


def _unthinking(text, thought, asked_again):
    if thought and not asked_again:
        return [("<think>\n", "prompt"), (f"{thought}\n</think>\n\n{text}", "answer")]
    return [(text, "answer")]


def _opened(text, thought, asked_again):
    if thought and not asked_again:
        return [("<think>\n", "prompt"), (f"{thought}\n</think>\n\n{text}", "answer")]
    return [("<think>\n", "prompt"), ("\n</think>\n\n", "block"), (text, "answer")]


def _hides(messages):
    parts = [("<s>", "prompt")]
    for i, message in enumerate(messages):
        if message[0] == "user":
            parts.append((f"<|user|>{message[1]}", "prompt"))
        elif message[0] == "system":
            parts.append((message[1], "prompt"))
        elif len(message) > 2 and i == len(messages) - 1:
            parts += [
                ("<|bot|><think>\n", "prompt"),
                (f"{message[2]}\n</think>\n\n{message[1]}", "answer"),
                ("</s>", "end"),
            ]
        else:
            shown = "\n\n" + message[1] if len(message) > 2 else message[1]
            parts += [("<|bot|>", "prompt"), (shown, "answer"), ("</s>", "end")]
    return parts


def _channels(messages):
    parts = []
    for i, message in enumerate(messages):
        if message[0] != "assistant":
            parts.append((f"<|start|>{message[0]}<|message|>{message[1]}<|end|>", "prompt"))
            continue
        parts.append(("<|start|>assistant", "prompt"))
        asked_again = any(later[0] == "user" for later in messages[i + 1 :])
        if len(message) > 2 and not asked_again:
            thought = f"<|channel|>analysis<|message|>{message[2]}<|end|><|start|>assistant"
            parts.append((f"{thought}<|channel|>final<|message|>{message[1]}", "answer"))
        else:
            parts += [("<|channel|>final<|message|>", "block"), (message[1], "answer")]
        parts.append(("<|return|>" if i == len(messages) - 1 else "<|end|>", "end"))
    return parts


_ROLES = "<|im_start|>{}\n{}<|im_end|>\n"
_HEADER = "<|im_start|>assistant\n"
PYTHON = {
    "chatml": lambda m: _plain(m, _ROLES, _HEADER, "{}", "<|im_end|>", after="\n"),
    "marked": lambda m: _plain(m, _ROLES, _HEADER, "{}", "<|im_end|>", after="\n"),
    "trims": lambda m: _plain(_untrimmed(m), _ROLES, _HEADER, "{}", "<|im_end|>", after="\n"),
    "inst": lambda m: _plain(m, {"user": "[INST] {}[/INST]", "system": "[SYS] {} "}, "", " {}", "</s>", "<s>"),
    "colon": lambda m: _plain(m, {"user": "USER: {} ", "system": "{} "}, "ASSISTANT:", " {} ", "</s>"),
    "headers": lambda m: _plain(
        m, "<|open|>{}<|close|>\n\n{}<|eot|>", "<|open|>assistant<|close|>\n\n", "{}", "<|eot|>", "<s>", trim=True
    ),
    "model": lambda m: _plain(
        m, "<turn>{}\n{}<end_turn>\n", "<turn>model\n", "{}", "<end_turn>", "<s>", after="\n", trim=True
    ),
    "endless": lambda m: _plain(m, "<|{}|>\n{}", "<|assistant|>\n", "{}", "", "<|sop|>"),
    "block": lambda m: _thinking(m, _block),
    "unthinking": lambda m: _thinking(m, _unthinking),
    "opened": lambda m: _thinking(m, _opened),
    "hides": _hides,
    "channels": _channels,
}


def _untrimmed(messages):
    """The messages of a template that trims answers alone."""
    return [(m[0], m[1].strip(), *m[2:]) if m[0] == "assistant" else m for m in messages]


def processor(name):
    """A processor of a language model with one of the templates."""
    template = JINJA.get(name, name)
    return ComposedProcessor(byte_tokenizer.make_tokenizer(template, bos="<s>", eos="</s>", extra=SPECIAL))


def conversation(messages, key=False):
    """Messages in the suite's form; thoughts stand in the text, or under ``reasoning_content``."""
    found = []
    for message in messages:
        text = message[1] if key else written(message)
        whole = {"role": message[0], "content": [{"type": "text", "text": text}]}
        found.append(whole | ({"reasoning_content": message[2]} if key and len(message) > 2 else {}))
    return Conversation(tuple(found))
