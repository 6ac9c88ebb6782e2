"""Supervised tokens are exactly the answers and their end tokens, whatever the chat template."""

import pytest

from data.errors import BadSample
from vlm_distill.models.composed import ComposedProcessor

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'system' %}{{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRIPS = CHATML.replace("m['content'] }}<", "m['content'] | trim }}<")
# Opens the answer with an empty thought for generation and keeps it out of the history (Qwen3 without thinking).
THINKS_FIRST = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
# Earlier answers lose what comes before "</think>", the last one keeps it (Qwen3, DeepSeek-R1).
DROPS_THOUGHT = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
SHOUTS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")


@pytest.fixture
def encode(make_tokenizer):
    def encode(template, conversation, eos="<|im_end|>"):
        processor = ComposedProcessor(make_tokenizer(template, eos=eos, extra=("<|im_start|>",)))
        return processor, processor.encode(conversation, [])

    return encode


def runs(processor, sample):
    """Each run of supervised tokens as text."""
    texts, run = [], []
    for token, on in zip([*sample.input_ids.tolist(), 0], [*sample.supervised.tolist(), False], strict=True):
        if on:
            run.append(token)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, STRIPS, THINKS_FIRST])
def test_chatml_answers_end_with_their_end_token(encode, talk, template):
    talked = talk("What colour?", "It is red.", "How many?", "three", system="Be brief.")
    processor, sample = encode(template, talked)
    assert runs(processor, sample) == ["It is red.<|im_end|>", "three<|im_end|>"]
    assert processor.tokenizer.decode(sample.input_ids[sample.ends]) == "<|im_end|><|im_end|>"


def test_llama2_blank_before_the_end_token_is_supervised(encode, talk):
    processor, sample = encode(LLAMA2, talk("What colour?", "red", "Sure?", "yes", system="Be brief."), eos="</s>")
    assert runs(processor, sample) == [" red </s>", " yes </s>"]
    assert sample.ends.sum() == 2


def test_vicuna(encode, talk):
    processor, sample = encode(VICUNA, talk("What colour?", "red", "Sure?", "yes"), eos="</s>")
    assert runs(processor, sample) == [" red</s>", " yes</s>"]


def test_default_template(encode, talk):
    processor, sample = encode(None, talk("What colour?", "red", "Sure?", "yes", system="Be brief."), eos="</s>")
    assert runs(processor, sample) == [" red</s>", " yes</s>"]
    assert "Be brief." in processor.tokenizer.decode(sample.input_ids)


def test_without_an_end_token_only_the_text_is_supervised(encode, talk):
    processor, sample = encode(NO_END, talk("What colour?", "red", "Sure?", "yes"))
    assert [r.strip() for r in runs(processor, sample)] == ["red", "yes"]
    assert not sample.ends.any()


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place(encode, talk):
    processor, sample = encode(CHATML, talk("red", "red", "red", "red"))
    assert runs(processor, sample) == ["red<|im_end|>"] * 2
    assert processor.tokenizer.decode(sample.input_ids[~sample.supervised]).count("red") == 2


def test_every_byte_of_an_answer_is_supervised(encode, talk):
    processor, sample = encode(CHATML, talk("?", "Grün 🙂 是"))
    assert runs(processor, sample) == ["Grün 🙂 是<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answers", "reason"),
    [
        (DROPS_THOUGHT, ("<think>hm</think>red", "yes"), "rewrites the answer|changes earlier turns"),
        (SHOUTS, ("red", "yes"), "rewrites the answer"),
        ("{{ raise_exception('no system prompts') }}", ("red", "yes"), "refuses.*no system prompts"),
        ("{% if messages | length > 2 %}again {% endif %}" + CHATML, ("red", "yes"), "changes earlier turns"),
    ],
)
def test_templates_that_change_what_was_said_are_refused_by_name(encode, talk, template, answers, reason):
    with pytest.raises(BadSample, match=reason):
        encode(template, talk("What colour?", answers[0], "Sure?", answers[1]))


def test_a_dropped_thought_does_no_harm_in_the_last_answer(encode, talk):
    processor, sample = encode(DROPS_THOUGHT, talk("What colour?", "<think>hm</think>red"))
    assert runs(processor, sample) == ["<think>hm</think>red<|im_end|>"]


def test_generation_ends_with_the_opening_of_the_answer(encode, talk):
    processor, _ = encode(CHATML, talk("a", "b"))
    sample = processor.encode(talk("What colour?"), [], generation=True)
    assert processor.tokenizer.decode(sample.input_ids).endswith("What colour?<|im_end|>\n<|im_start|>assistant\n")
    assert not sample.supervised.any()
