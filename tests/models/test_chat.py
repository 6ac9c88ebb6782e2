"""Supervised tokens are exactly the answers and their end tokens, whatever the chat template."""

from dataclasses import replace

import byte_tokenizer
import pytest
import torch
from chat_templates import JINJA, PYTHON, SPECIAL, conversation, processor

from data.collate import Collator
from data.encoding import Turns, encode_pair
from data.errors import BadSample, UserError
from vlm_distill.models.chat import whole_thought
from vlm_distill.models.composed_processor import ComposedProcessor
from vlm_distill.models.image_transform import ImageTransform
from vlm_distill.models.tokenizer import load_tokenizer

THINKING = ("block", "unthinking", "opened", "channels")
ASK, MORE = ("user", "What colour?"), ("user", "How many?")
TALKS = {
    "plain": [ASK, ("assistant", "It is red.")],
    "two turns": [ASK, ("assistant", "red"), MORE, ("assistant", "three")],
    "system": [("system", "Be brief."), ASK, ("assistant", "red")],
    "thought": [ASK, ("assistant", "Red.", "hm, red")],
    "thoughts": [ASK, ("assistant", "Red.", "hm"), MORE, ("assistant", "Three.", "one two")],
    "a thought, then none": [ASK, ("assistant", "Red.", "hm"), MORE, ("assistant", "three")],
    "no thought, then one": [ASK, ("assistant", "Red."), MORE, ("assistant", "three", "hm")],
    "repeated": [("user", "red"), ("assistant", "red"), ("user", "red"), ("assistant", "red")],
    "bytes": [ASK, ("assistant", "Grün 🙂 是")],
    "question": [("user", "Is it <b>?"), ("assistant", "<b>")],
} | {
    repr(answer): [ASK, ("assistant", answer)]
    for answer in (
        "A",
        "n",
        "is",
        "assistant",
        "bot",
        "model",
        "user",
        "ASSISTANT",
        "think",
        " Red.",
        "Red. \n",
        "\n\nRed.",
    )
}


@pytest.fixture(scope="module")
def processors():
    made = {}
    return lambda name: made.setdefault(name, processor(name))


def expected(processor, parts, learn):
    """Return the ids of a text in parts, and which are supervised and ends; from the prompt only blanks may be."""
    text, marks = "", ""
    for part, kind in parts:
        text += part
        marks += {"prompt": ".", "block": "a" if learn else ".", "answer": "a", "end": "e"}[kind] * len(part)
    coded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [(text[a:b], marks[a:b]) for a, b in coded["offset_mapping"]]
    supervised = [
        not all(m == "." for m in mark) and not any(m == "." and c.strip() for c, m in zip(part, mark, strict=True))
        for part, mark in spans
    ]
    return coded["input_ids"], supervised, [set(mark) == {"e"} for _, mark in spans]


def stretches(processor, row):
    """Return each run of supervised tokens as text."""
    texts, run = [], []
    for token, on in zip([*row.input_ids.tolist(), 0], [*row.supervised.tolist(), False], strict=True):
        if on:
            run.append(token)
        elif run:
            texts.append(processor.tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("learn", [False, True], ids=["prompt", "learn"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", JINJA)
def test_supervised_is_what_an_independent_rendering_says(processors, name, talk, learn):
    made = processors(name)
    made.learn_answer_prefix = learn
    row = made.encode(conversation(TALKS[talk]), [])
    ids, supervised, ends = expected(made, PYTHON[name](TALKS[talk]), learn)
    assert made.tokenizer.decode(row.input_ids) == made.tokenizer.decode(ids)
    wanted = [made.tokenizer.decode(i) for i, on in zip(ids, supervised, strict=True) if on]
    assert [made.tokenizer.decode(i) for i in row.input_ids[row.supervised]] == wanted
    assert row.input_ids.tolist() == ids
    assert row.supervised.tolist() == supervised
    assert row.ends.tolist() == ends


@pytest.mark.parametrize("name", [*THINKING, "hides"])
def test_reasoning_content_is_learnt_as_a_thought_in_the_text_is(processors, name):
    made = processors(name)
    made.learn_answer_prefix = False
    for talk in ("thought", "no thought, then one"):
        keyed, literal = (made.encode(conversation(TALKS[talk], key), []) for key in (True, False))
        assert keyed.input_ids.tolist() == literal.input_ids.tolist()
        assert keyed.supervised.tolist() == literal.supervised.tolist()
        assert keyed.spans.tolist() == literal.spans.tolist()


def test_thoughts_that_a_template_ignores_are_refused_by_name(processors):
    with pytest.raises(BadSample, match="chat template ignores reasoning_content: give a chat_template"):
        processors("headers").encode(conversation(TALKS["thought"], key=True), [])


TOOLS = {
    "name": "look",
    "description": "Look closer.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
CALLS = JINJA["block"].replace(
    "{{ c }}<|im_end|>\n",
    "{{ c }}{% for call in m['tool_calls'] or [] %}{{ '\\n<call>' }}{{ call['function'] | tojson }}</call>{% endfor %}"
    "<|im_end|>\n",
)
CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CALLS


def with_call(arguments, content=""):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    talked = conversation([ASK, ("assistant", content), ("tool", "it is red"), ("assistant", "red", "I see")])
    messages = list(talked.messages)
    messages[1] = {**messages[1], "tool_calls": [call]}
    return replace(talked, messages=tuple(messages), tools=(TOOLS,))


@pytest.mark.parametrize("arguments", [{"place": "left"}, '{"place": "left"}'], ids=["object", "JSON"])
@pytest.mark.parametrize("content", ["", "Let me look."])
def test_a_tool_call_is_an_answer_and_its_reply_is_context(processors, arguments, content):
    made = processors(CALLS)
    row = made.encode(with_call(arguments, content), [])
    call = '<call>{"name": "look", "arguments": {"place": "left"}}</call><|im_end|>'
    assert stretches(made, row) == [
        f"{content}\n{call}" if content else f"\n{call}",
        "<think>\nI see\n</think>\n\nred<|im_end|>",
    ]
    assert '"description": "Look closer."' in made.tokenizer.decode(row.input_ids)
    assert "<|im_start|>tool\nit is red<|im_end|>" in made.tokenizer.decode(row.input_ids[~row.supervised])


# A tool's reply names the call it answers.
REPLIES = CALLS.replace(
    "<|im_start|>{{ m['role'] }}\n",
    "<|im_start|>{{ m['role'] }}{% if m['role'] == 'tool' %}{% for call in messages[loop.index0 - 1]['tool_calls'] %}"
    " of {{ call['function']['name'] }}{% endfor %}{% endif %}{{ '\\n' }}",
)


def test_a_calls_name_may_stand_in_the_tools_reply_too(processors):
    made = processors(REPLIES)
    row = made.encode(with_call({"place": "left"}), [])
    assert " of look\nit is red" in made.tokenizer.decode(row.input_ids)
    assert stretches(made, row) == stretches(
        processors(CALLS), processors(CALLS).encode(with_call({"place": "left"}), [])
    )


def test_calls_that_a_template_drops_are_named(processors):
    with pytest.raises(BadSample, match="drops an answer: tool calls: look"):
        processors("chatml").encode(with_call({"place": "left"}), [])


@pytest.mark.parametrize("thought", ["<think></think>", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("name", ["chatml", "headers", "block", "unthinking", "opened", "keyed"])
def test_an_empty_thought_of_the_data_is_no_thought(processors, name, thought):
    made = processors(name) if name != "keyed" else processors(KEYED)
    made.learn_answer_prefix = False
    row = made.encode(conversation([ASK, ("assistant", f"{thought}Red.")]), [])
    learnt = thought if name in ("chatml", "headers") else ""  # their models must write it
    (answer,) = stretches(made, row)
    assert answer.startswith(f"{learnt}Red.<|")
    text = made.tokenizer.decode(row.input_ids)
    assert text.count("</think>") == (name != "unthinking")
    plain = processors("chatml").encode(conversation([ASK, ("assistant", f"{thought}Red.")]), [])
    own = {tuple(place) for place in row.spans.tolist() if place[0] == 1}
    assert own - {tuple(row.spans.tolist()[-1])} <= {tuple(place) for place in plain.spans.tolist()}


# Thoughts are reasoning_content; written inside the content, they follow an empty thought.
KEYED = JINJA["opened"].replace("'</think>' in c", "false")


def test_a_thought_in_the_text_goes_where_the_template_has_it(processors):
    made = processors(KEYED)
    for talk in ("thought", "thoughts", "no thought, then one"):
        keyed, literal = (made.encode(conversation(TALKS[talk], key), []) for key in (True, False))
        assert keyed.input_ids.tolist() == literal.input_ids.tolist()
        assert keyed.supervised.tolist() == literal.supervised.tolist()
        assert keyed.spans.tolist() == literal.spans.tolist()
    row = made.encode(conversation([ASK, ("assistant", "Write </think> there.")]), [])
    assert stretches(made, row) == ["Write </think> there.<|im_end|>"]


def test_a_masked_answer_is_context(processors):
    made = processors("block")
    talked = conversation(TALKS["two turns"])
    for masked, left in ((1, "three<|im_end|>"), (3, "red<|im_end|>")):
        messages = [{**m, "supervised": False} if k == masked else m for k, m in enumerate(talked.messages)]
        row = made.encode(replace(talked, messages=tuple(messages)), [])
        assert stretches(made, row) == [left]
        assert row.input_ids.tolist() == made.encode(talked, []).input_ids.tolist()


def test_an_image_in_an_answer_is_refused_and_one_in_context_is_not(talk, picture):
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3)
    made = ComposedProcessor(processor("chatml").tokenizer, transform, tokens=4)
    talked = talk("Where?", ["zoom in", None], "And now?", "red")
    with pytest.raises(BadSample, match="image in an answer"):
        made.encode(talked, [picture()])
    messages = [{**m, "supervised": False} if k == 1 else m for k, m in enumerate(talked.messages)]
    assert stretches(made, made.encode(replace(talked, messages=tuple(messages)), [picture()])) == ["red<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        (JINJA["chatml"].replace("m['content'] }}", "m['content'][1:] }}"), "red", "rewrites the answer"),
        (JINJA["chatml"].replace("m['content'] }}", "m['content'] * 2 }}"), "red", "repeats an answer"),
        ("{% for m in messages %}{{ m['role'] }}\n{% endfor %}", "red", "drops an answer: 'red'"),
        (JINJA["block"].replace("{{ t }}", ""), "<think>hm</think>red", "drops the thought"),
        ("{{ raise_exception('no system prompts') }}", "red", "refuses.*no system prompts"),
    ],
)
def test_templates_that_do_not_show_an_answer_are_refused_by_name(processors, template, answer, reason):
    with pytest.raises(BadSample, match=reason):
        processors(template).encode(conversation([ASK, ("assistant", answer)]), [])


def test_what_a_template_makes_of_an_answer_is_learnt(processors):
    made = processors(
        JINJA["chatml"].replace("m['content'] }}<|im_end|>\n{% else", "m['content'] | upper }}<|im_end|>\n{% else")
    )
    assert stretches(made, made.encode(conversation(TALKS["two turns"]), [])) == ["RED<|im_end|>", "THREE<|im_end|>"]


def test_generation_ends_with_the_opening_of_the_answer(processors):
    made = processors("opened")
    row = made.encode(conversation([ASK]), [], generation=True)
    assert made.tokenizer.decode(row.input_ids).endswith("What colour?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert not row.supervised.any()


PAIRS = [(a, b) for a in ("chatml", "inst", "block", "opened", "hides", "channels") for b in JINJA if a != b]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_two_templates_share_the_answers_own_tokens(processors, student, teacher):
    """Pairs of templates align, whatever each writes around answers and whichever shows a thought."""
    talk = [ASK, ("assistant", "It is red."), MORE, ("assistant", "There are three.", "hm")]
    made = processors(student), processors(teacher)
    for one in made:
        one.learn_answer_prefix = False
    pair = encode_pair(conversation(talk), [], *made, 500)
    ids = [
        row.input_ids[tokens]
        for row, tokens in ((pair.student, pair.student_tokens), (pair.teacher, pair.teacher_tokens))
    ]
    assert torch.equal(ids[0][pair.distilled], ids[1][pair.distilled])
    learnt = made[0].tokenizer.decode(ids[0][pair.distilled])
    # The first word may have other tokens because of a blank.
    assert " is red." in learnt
    assert " are three." in learnt


def test_a_first_token_with_a_templates_blank_is_left_to_cross_entropy(processors):
    talked = conversation([ASK, ("assistant", "three blue triangles")])
    pair = encode_pair(talked, [], processors("colon"), processors("chatml"), 500)
    tokens = [processors("colon").tokenizer.decode(i) for i in pair.student.input_ids[pair.student_tokens]]
    left = [token for token, known in zip(tokens, pair.distilled.tolist(), strict=True) if not known]
    assert left == [" th", " ", "</s>"]
    with pytest.raises(BadSample, match="misaligned: answer 1"):
        encode_pair(talked, [], processors("colon"), processors(JINJA["trims"].replace("trim", "upper")), 500)


@pytest.mark.parametrize("talk", ["thoughts", "a thought, then none", "two turns"])
@pytest.mark.parametrize("name", [*THINKING, "hides"])
def test_split_trains_each_answer_as_it_is_generated(processors, name, talk):
    made = processors(name)
    made.learn_answer_prefix = False
    pairs = Collator(made, made, 500, Turns(split=True)).encode(conversation(TALKS[talk]))
    assert [pair.samples for pair in pairs] == [1, 0]
    for number, pair in enumerate(pairs):
        parts = PYTHON[name](TALKS[talk][: 2 * number + 2])
        # Earlier answers are context.
        last = max(i for i, (_, kind) in enumerate(parts) if kind == "answer")
        parts = [(text, kind if i >= last else "prompt") for i, (text, kind) in enumerate(parts)]
        ids, supervised, _ = expected(made, parts, False)
        assert pair.student.input_ids.tolist() == ids
        assert pair.student.supervised.tolist() == supervised
        assert pair.distilled.all()


def test_arguments_become_part_of_the_template(processors, tmp_path):
    opening = (
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{{ effort }}"
    )
    template = JINJA["chatml"].replace("assistant\n{% endif %}", "assistant\n" + opening + "{% endif %}")
    made = processor(template)
    made.set_template_arguments({"enable_thinking": False, "effort": 'a "low"\n%}'}, "student.template_arguments")
    wanted = '<|im_start|>assistant\n<think></think>a "low"\n%}'
    made.save_pretrained(tmp_path)
    for one in (made, ComposedProcessor(load_tokenizer(str(tmp_path)))):
        row = one.encode(conversation([ASK]), [], generation=True)
        assert one.tokenizer.decode(row.input_ids).endswith(wanted)
    with pytest.raises(UserError, match="does not read 'enable_thinkin'; did you mean 'enable_thinking'"):
        made.set_template_arguments({"enable_thinkin": True}, "teacher.template_arguments")


OF_IMAGES = ["<img>", "<|vision_start|>", "<fake_token_around_image>", "<|image_pad|>", "[IMG_END]"]


@pytest.mark.parametrize("token", OF_IMAGES)
def test_what_frames_an_image_is_text_when_a_user_writes_it(token):
    made = ComposedProcessor(byte_tokenizer.make_tokenizer(JINJA["chatml"], extra=(*SPECIAL, token)))
    row = made.encode(conversation([("user", f"What is {token}?"), ("assistant", "red")]), [])
    assert made.tokenizer.convert_tokens_to_ids(token) not in row.input_ids.tolist()
    assert token in made.tokenizer.decode(row.input_ids)
    with pytest.raises(BadSample, match="answer holds a control token"):
        made.encode(conversation([ASK, ("assistant", token)]), [])


def test_the_last_answer_that_is_learnt_is_what_a_student_answers():
    talked = conversation(TALKS["two turns"])
    masked = [{**m, "supervised": False} if k == 3 else m for k, m in enumerate(talked.messages)]
    assert talked.before_last_answer().messages == talked.messages[:3]
    assert replace(talked, messages=tuple(masked)).before_last_answer().messages == talked.messages[:1]
    with pytest.raises(BadSample, match="no supervised token: every answer is masked"):
        replace(talked, messages=(masked[0], *masked[2:])).before_last_answer()


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        ("hm\n</think>\n\nRed.", "<think>\nhm\n</think>\n\nRed."),
        ("<think>\nhm\n</think>\n\nRed.", "<think>\nhm\n</think>\n\nRed."),
        ("Red.", "Red."),
    ],
)
def test_a_thought_that_the_opening_began_is_kept_whole(answer, whole):
    assert whole_thought(answer) == whole
