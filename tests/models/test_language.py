"""Packed documents see nothing of each other, in every family that claims so; students with another tokenizer."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.collate import Collator
from data.conversation import Document
from vlm_distill.losses import CrossEntropy, ForwardKL, Term, fused_linear
from vlm_distill.models import load_vlm
from vlm_distill.models.composed import ComposedVLM
from vlm_distill.models.composed_processor import ComposedProcessor
from vlm_distill.models.packing_trial import keeps_samples_apart
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.models.vocabulary import align_heads

TEXTS = ["It is red.", "There are three blue triangles in the picture.", "What colour is the circle?", "yes no", "How"]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {},
    "gpt_neox": {"num_key_value_heads": None},
    "stablelm": {},
    "phi3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def build(tokenizer, family, attention="sdpa", **changes):
    torch.manual_seed(0)
    settings = {k: v for k, v in (SHAPE | FAMILIES.get(family, {}) | changes).items() if v is not None}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **settings)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    return ComposedVLM(decoder, ComposedProcessor(tokenizer)).eval()


def batches(model, max_length, texts=TEXTS):
    """Return all documents in rows of ``max_length``, and each in a batch of its own."""
    collator = Collator(model.processor, model.processor, max_length)
    pairs = [pair for text in texts for pair in collator.encode(Document(text))]
    return collator.batch(pairs), [collator.batch([pair]) for pair in pairs]


def losses(student, teacher, batch):
    terms = [Term("ce", CrossEntropy()), Term("kl", ForwardKL())]
    hidden = student(batch.student.inputs, batch.student.positions).hidden
    return fused_linear(terms, hidden, student.head, teacher.outputs(batch).targets, batch.targets)


@pytest.mark.parametrize(
    ("family", "attention"), [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]
)
def test_packed_equals_unpacked(tokenizer, family, attention):
    student, teacher = build(tokenizer, family, attention), ModelTeacher(build(tokenizer, "llama", hidden_size=16))
    assert keeps_samples_apart(student)
    assert not student.training
    packed, alone = batches(student, 64)
    assert packed.samples == len(TEXTS)
    assert len(packed.student.inputs["input_ids"]) < len(TEXTS)
    assert "attention_mask" not in packed.student.inputs
    together = losses(student, teacher, packed)
    apart = [losses(student, teacher, batch) for batch in alone]
    for name in ("ce", "kl"):
        assert together.terms[name].count == sum(one.terms[name].count for one in apart)
        expected = sum(float(one.terms[name].loss) for one in apart)
        assert float(together.terms[name].loss) == pytest.approx(expected, rel=1e-5)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    sum(one.loss for one in apart).backward()
    for name, parameter in student.named_parameters():
        if name in gradients:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_documents_of_a_tokenizer_with_a_start_token(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    row = ComposedProcessor(tokenizer).encode_document(Document("It is red."))
    assert tokenizer.decode(row.input_ids) == "<s>It is red.</s>"
    assert tokenizer.decode(row.input_ids[row.supervised]) == "It is red.</s>"
    assert row.ends.tolist() == [False] * (len(row.ends) - 1) + [True]
    unfinished = ComposedProcessor(tokenizer).encode_document(Document("It is red.", last=False))
    assert tokenizer.decode(unfinished.input_ids) == "<s>It is red."
    assert not unfinished.ends.any()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bloom", {"n_head": 4, "n_layer": 1}),
        ("mamba", {"state_size": 4}),
        # It takes positions, but ignores them in its mask.
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "attention": "sdpa"}),
    ],
)
def test_what_cannot_keep_documents_apart(tokenizer, family, changes):
    assert not keeps_samples_apart(build(tokenizer, family, **{"attention": "eager"} | changes))


# A student with its teacher's tokenizer.


@pytest.fixture
def models(make_tokenizer):
    own = make_tokenizer(extra=("<|end|>",))
    theirs = copy.deepcopy(own)
    theirs.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    theirs.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return build(own, "llama"), build(theirs, "llama", hidden_size=16)


def test_embeddings_are_resized(models, talk, tmp_path):
    student, teacher = models
    before = student.decoder.get_input_embeddings().weight.detach().clone()
    tokens = len(teacher.processor.tokenizer)
    assert len(before) < tokens
    student.use_tokenizer(teacher.processor.tokenizer, teacher.end_tokens)
    after = student.decoder.get_input_embeddings().weight.detach()
    assert after.shape == (tokens, 32)
    assert torch.equal(after[: len(before)], before)
    # New rows are close to the mean of the old ones, by Transformers' own rule.
    assert ((after[len(before) :] - before.mean(0)).abs() < 1e-2 * before.std()).all()
    assert len(student.decoder.get_output_embeddings().weight) == tokens
    assert align_heads(student, teacher) == tokens
    end = teacher.processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in student.end_tokens
    assert student.end_tokens == teacher.end_tokens

    encoded = student.processor.encode(talk("What colour?", "red"), [])
    assert encoded.input_ids.tolist() == teacher.processor.encode(talk("What colour?", "red"), []).input_ids.tolist()
    hidden = student(student.processor.collate([encoded]), torch.tensor([3])).hidden
    assert student.head.logits(hidden).shape == (1, tokens)

    student.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert again.end_tokens == student.end_tokens
    assert torch.equal(again(again.processor.collate([encoded]), torch.tensor([3])).hidden, hidden)
    assert again.processor.tokenizer.chat_template == teacher.processor.tokenizer.chat_template


def test_the_teacher_keeps_its_own(models):
    student, teacher = models
    student.use_tokenizer(teacher.processor.tokenizer, teacher.end_tokens)
    assert student.processor.tokenizer is not teacher.processor.tokenizer


def test_embeddings_shrink_and_tied_ones_stay_tied(make_tokenizer):
    large, small = make_tokenizer(), make_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(20)])
    student = build(large, "llama", tie_word_embeddings=True)
    student.use_tokenizer(small, {small.eos_token_id})
    assert len(student.decoder.get_input_embeddings().weight) == len(small)
    assert student.decoder.get_output_embeddings().weight is student.decoder.get_input_embeddings().weight
