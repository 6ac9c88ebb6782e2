"""Which pairs of tokenizers can be distilled, and what both heads are cut to."""

import copy

import pytest
import torch

from data.errors import UserError
from vlm_distill.models import build_vlm
from vlm_distill.models.vocabulary import _spelling, align_heads, shared_tokens, shared_vocabulary


def test_the_same_tokenizer(tokenizer):
    assert shared_vocabulary(tokenizer, copy.deepcopy(tokenizer)) == len(tokenizer) == 330


def test_added_tokens_at_the_end_are_not_shared(tokenizer):
    teacher = copy.deepcopy(tokenizer)
    teacher.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert shared_vocabulary(tokenizer, teacher) == 330
    assert shared_vocabulary(teacher, tokenizer) == 330
    student = copy.deepcopy(tokenizer)
    student.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert shared_vocabulary(student, teacher) == 330


def test_shared_tokens_spell_the_same_bytes(make_tokenizer):
    ours, theirs = make_tokenizer(eos="</s>"), make_tokenizer(eos="</end>", extra=("<image>",))
    student, teacher = shared_tokens(ours, theirs, (330, 330))
    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    assert (ours.eos_token_id, theirs.eos_token_id) in pairs
    spelled = [(ours.decode([a]), theirs.decode([b])) for a, b in pairs if a != ours.eos_token_id]
    assert len(pairs) > 300
    assert all(a == b for a, b in spelled)
    assert theirs.convert_tokens_to_ids("<image>") not in teacher.tolist()
    assert shared_tokens(ours, theirs, (330, 100))[1].max() < 100


@pytest.mark.parametrize(
    ("token", "byte_level", "spelled"),
    [("Ġred", True, b" red"), ("▁red", False, b" red"), ("<0xC3>", False, b"\xc3"), ("Ã¼", True, "ü".encode())],
)
def test_tokens_of_different_alphabets_spell_the_same(token, byte_level, spelled):
    assert _spelling(token, byte_level) == spelled


def test_other_tokens_under_the_same_ids(tokenizer, make_tokenizer):
    other = make_tokenizer(eos="</end>")
    with pytest.raises(UserError, match=r"id 2 is '</s>' for the student and '</end>' for the teacher"):
        shared_vocabulary(tokenizer, other)


def test_equal_sizes_are_not_the_same_tokenizer(tokenizer, make_tokenizer):
    other = make_tokenizer(extra=("<image>",))
    assert len(other) == len(tokenizer)
    with pytest.raises(UserError, match="need the same tokenizer: id 3 is"):
        shared_vocabulary(tokenizer, other)


def test_a_tokenizer_that_is_a_beginning_of_the_other(tokenizer):
    more = copy.deepcopy(tokenizer)
    more._tokenizer = _grown(more)
    with pytest.raises(UserError, match=r"id 330 is no token for the student and 'QZ' for the teacher"):
        shared_vocabulary(tokenizer, more)


def _grown(tokenizer):
    import json

    from tokenizers import Tokenizer

    content = json.loads(tokenizer._tokenizer.to_str())
    content["model"]["vocab"]["QZ"] = 330
    content["model"]["merges"].append(["Q", "Z"])
    return Tokenizer.from_str(json.dumps(content))


def models(settings, tokenizers, rows):
    built = []
    for tokenizer, count in zip(tokenizers, rows, strict=True):
        config = settings["decoder"]["config"] | {"vocab_size": count}
        built.append(build_vlm(settings | {"decoder": {"config": config}}, tokenizer))
    return built


def test_both_heads_are_cut_to_the_real_shared_ids(settings, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    student, teacher = models(settings, (tokenizer, longer), (336, 384))
    student.head.vocabulary = 5  # of an earlier pairing
    assert align_heads(student, teacher) == 330
    for model in (student, teacher):
        with model.head.weight() as weight:
            assert weight.shape == (330, 32)
        assert model.head.logits(torch.randn(2, 32)).shape == (2, 330)


def test_an_end_token_that_the_teacher_lacks(settings, tokenizer, make_tokenizer):
    student_tokenizer = copy.deepcopy(tokenizer)
    student_tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    student_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    student, teacher = models(settings, (student_tokenizer, tokenizer), (331, 330))
    with pytest.raises(UserError, match=r"end token '<\|end\|>' \(id 330\) is not among the 330"):
        align_heads(student, teacher)
