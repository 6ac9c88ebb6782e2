"""Thoughts are separated from answers, whatever marks them, and none is lost between tokens and text."""

import pytest
import tiny

from data.conversation import Conversation
from vlm_distill.demo import make_tokenizer
from vlm_distill.models import build_vlm
from vlm_distill.models.thinking import decode_with_marks, mark_tokens, split_thought


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "Yes"),
        ("", ""),
        (" Yes \n", " Yes \n"),
        ("<think>there is no dog… wait</think>\n\nYes", "Yes"),
        ("<think>\n\n</think>\n\nYes", "Yes"),
        ("there is no dog</think>\n\nYes", "Yes"),  # the opening contains <think>
        ("<think>I write </think> when I am done</think>Yes", "Yes"),
        ("<think>a</think>Yes<think>b</think>", "Yes"),
        ("<Thinking>no</thinking> Yes", "Yes"),
        ("<thought>no</thought>Yes", "Yes"),
        ("◁think▷no◁/think▷Yes", "Yes"),
        ("[THINK]no[/THINK]Yes", "Yes"),
        ("<reasoning>no</reasoning>\nYes", "Yes"),
        ("<|START_THINKING|>no<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Yes"),
        ("<|channel>thought\nno<channel|>Yes", "Yes"),
        ("<unused94>thought\nno<unused95>Yes", "Yes"),
        ("<think>no</think>\n<answer>Yes</answer>\n", "<answer>Yes</answer>"),
        ("<|begin_of_box|>Yes<|end_of_box|>", "Yes"),
        ("The <answer>Yes</answer>", "The <answer>Yes</answer>"),
        ("<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>", "Yes"),
        ("<|channel|>final<|message|>Yes", "Yes"),
        ("analysisWe see no dog.assistantfinalYes", "Yes"),
        ("finalYes", "Yes"),
        ("finally, yes", "finally, yes"),
        ("analysis of the chart", "analysis of the chart"),
        ("the assistantfinal word", "the assistantfinal word"),
    ],
)
def test_an_answer_is_what_is_left_without_thoughts(text, answer):
    assert split_thought(text) == (answer, True)


@pytest.mark.parametrize(
    "text",
    [
        "<think>there is no dog",
        "<think>a</think>Yes <think>but",
        "◁think▷Yes",
        "<|channel>thought\nYes",
        "<|channel|>analysis<|message|>Yes",
        "analysisWe see a dog. Yes",
    ],
)
def test_a_thought_without_an_end_leaves_no_answer(text):
    assert split_thought(text) == ("", False)


def test_marks_that_are_special_tokens_are_kept():
    tokenizer = make_tokenizer(["no", "yes"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<other>"]})
    ids = [*tokenizer("[THINK]no[/THINK]yes<other>")["input_ids"], tokenizer.eos_token_id]
    assert "THINK" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert split_thought(decode_with_marks(tokenizer, ids, mark_tokens(tokenizer)))[0] == "yes"


@pytest.mark.parametrize(("opening", "marked"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
def test_an_opening_that_begins_a_thought_is_part_of_what_was_written(opening, marked):
    tokenizer = make_tokenizer(tiny.WORDS)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{{ messages[-1]['content'][-1]['text'] }}<assistant>" + opening
    model = build_vlm(tiny.settings(), tokenizer=tokenizer)
    question = Conversation(({"role": "user", "content": [{"type": "text", "text": "what is it?"}]},))
    (answer,) = model.generate([(question, [])], max_new_tokens=2)
    assert answer.marked == (f"<think>{answer.text}" if marked else None)
