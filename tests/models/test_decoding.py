"""Answers of our own loop are those of Transformers' generation, and of each prompt alone."""

import random

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel

from data.conversation import Conversation
from vlm_distill.models import build_vlm
from vlm_distill.models.answers import Sampling, TokenChoice
from vlm_distill.models.decoding import _groups, decode, decodes_plainly

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SMALL |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_vlm(tiny.settings(), tokenizer=tiny.make_tokenizer(tiny.WORDS)).eval()
    tiny._sharpen(model.decoder)
    return model


@pytest.fixture(scope="module")
def prompts(model):
    texts = [
        "say red",
        "what color is it ?",
        " ".join(tiny.WORDS[:12]),
        "say blue",
        "is it ?",
        " ".join(tiny.WORDS[:30]),
    ]
    talks = [Conversation(({"role": "user", "content": [{"type": "text", "text": text}]},)) for text in texts]
    return [model.encode_prompt(talk, []) for talk in talks]


def choice(temperature, count):
    if temperature is None:
        return TokenChoice(None, None, set())
    return TokenChoice(Sampling(temperature, [random.Random(str(i)) for i in range(count)]), None, {1})


@pytest.mark.parametrize("temperature", [None, 0.0, 0.8, 1.0])
def test_both_ways_give_the_same_answers(model, prompts, temperature):
    """Answers end at different tokens, and the longest outgrows the cache's first room."""
    found = decode(model, prompts, choice(temperature, len(prompts)), 80)
    other = model._generated(prompts, choice(temperature, len(prompts)), 80)
    assert [ids for ids, _ in found] == [ids for ids, _ in other]
    for (_, ours), (_, theirs) in zip(found, other, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    if temperature == 1.0:
        assert len({len(ids) for ids, _ in found}) > 2


def test_a_row_that_ends_leaves_the_others_as_they_are(model, prompts):
    together = decode(model, prompts, choice(1.0, len(prompts)), 40)
    for number, prompt in enumerate(prompts):
        alone = TokenChoice(Sampling(1.0, [random.Random(str(number))]), None, {1})
        [(ids, _)] = decode(model, [prompt], alone, 40)
        assert ids == together[number][0]


def test_prompts_of_like_length_run_together():
    assert _groups([10, 90, 100, 9, 40, 8]) == [[2, 1], [4], [0, 3, 5]]


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        ("llama", {}, True),
        ("qwen3", {"head_dim": 8}, True),
        ("mistral", {"sliding_window": None, "head_dim": 8}, True),
        ("mistral", {"sliding_window": 8, "head_dim": 8}, False),
        ("gemma2", {"head_dim": 8}, False),
        ("mamba", {}, False),
        ("qwen2_vl_text", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, False),
    ],
)
def test_only_plain_caches_are_decoded_here(kind, settings, plain):
    body = AutoModel.from_config(AutoConfig.for_model(kind, **SMALL | settings))
    assert decodes_plainly(body) == plain
