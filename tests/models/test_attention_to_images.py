"""Attention to image tokens: equal to Transformers' own, whatever the kind of attention, the mask and the row."""

import families
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data.collate import collate
from data.conversation import Conversation
from data.encoding import encode_pair
from vlm_distill.losses import AttentionFeature
from vlm_distill.models import attention_to_images
from vlm_distill.models.family_classes import adapted
from vlm_distill.models.image_hidden import run_at_positions

PICTURE = Image.effect_noise((60, 40), 90).convert("RGB")
#: Of all layers; and of the last alone.
EVERY, LAST = AttentionFeature(0.0, 1.0, "all"), AttentionFeature(0.9, 1.0, "answers")


def load(make_tokenizer, name, attention):
    model, processor = families.Maker(make_tokenizer).build(name)
    model.set_attn_implementation(attention)
    return adapted(model, processor)


def batch_of(model, answers, packed=False):
    pairs = []
    for answer in answers:
        question = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
        said = [{"type": "text", "text": answer}]
        talk = Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": said}))
        pairs.append(encode_pair(talk, [PICTURE], model.processor, None, 4096))
    return collate(pairs, model.processor, None, packed=(packed, packed)).student


def features(model, side, *wanted):
    found = run_at_positions(model, side.inputs, side, [feature.name for feature in wanted]).features
    return [found[feature.name] for feature in wanted]


@torch.no_grad()
def by_transformers(model, answer):
    """Return the attention ``[image tokens, layers, tokens]`` of one sample, as eager attention returns it."""
    side = batch_of(model, [answer])
    model.model.set_attn_implementation("eager")
    found = model.model.base_model(**side.inputs, output_attentions=True).attentions
    whole = torch.stack([attention[0].mean(0) for attention in found if attention is not None])
    return whole[:, :, side.image_positions].permute(2, 0, 1), side.positions


# Grouped heads; norms of heads and M-RoPE; images seen both ways, with windows; soft-capped; with linear attention.
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *[("llava", "sdpa"), ("qwen3_vl", "sdpa"), ("gemma3", "sdpa"), ("qwen3_5", "sdpa")],
        *[("gemma3", "eager"), ("paligemma2", "eager"), ("smolvlm", "sdpa")],
    ],
)
def test_it_is_the_attention_of_the_forward(make_tokenizer, name, attention):
    model, answers = load(make_tokenizer, name, attention), ["a cat", "a very large dog indeed"]
    with torch.no_grad():
        alone, packed = (features(model, batch_of(model, answers, shared), EVERY, LAST) for shared in (False, True))
    every, last = [], []
    for answer in answers:
        whole, queries = by_transformers(model, answer)
        every.append(F.pad(whole, (0, alone[0].shape[-1] - whole.shape[-1])))
        whole = whole[:, -1:, queries]
        last.append(F.pad(whole, (0, alone[1].shape[-1] - whole.shape[-1])))
    for got in (alone, packed):
        torch.testing.assert_close(got[0], torch.cat(every), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[1], torch.cat(last), rtol=1e-4, atol=1e-6)


def test_chunks_and_recomputed_layers_change_no_gradient(make_tokenizer, monkeypatch):
    gradients = []
    for chunk_bytes, recompute in ((1 << 26, False), (1, True)):
        model = load(make_tokenizer, "llava", "sdpa").train()
        monkeypatch.setattr(attention_to_images, "_CHUNK_BYTES", chunk_bytes)
        if recompute:
            model.checkpoint_activations()
        side = batch_of(model, ["a cat", "a very large dog"])
        (attention,) = features(model, side, EVERY)
        attention.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert any("k_proj" in name for name in gradients[0])
    assert any("vision_tower" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
