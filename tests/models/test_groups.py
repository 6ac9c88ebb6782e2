"""Tokens of different tokenizers that spell the same text are grouped, through real tokenizers and chat templates."""

import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.collate import collate
from data.encoding import encode_pair
from vlm_distill.models import load_vlm
from vlm_distill.models.composed_processor import ComposedProcessor
from vlm_distill.models.image_transform import ImageTransform

TEXTS = [
    "What colour is the circle? It is dark red.",
    "Dunkelgrün, un café brûlé, 紅色です 🙂🙃",
    "How many shapes are there? There are three blue triangles in the picture.",
    "x = [1, 2];\n\n  return x  # done\n",
]
PLAIN = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# A blank before the answer, and one between it and its end token.
BLANKS = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else ' ASSISTANT: ' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
LINES = BLANKS.replace("ASSISTANT: ", "\nASSISTANT:\n").replace("ASSISTANT:{% endif", "\nASSISTANT:{% endif")


def train(kind):
    special = ["<pad>", "<unk>", "</s>", "<u>", "<a>"]
    if kind.startswith("bytes"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if "trimmed" in kind:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


KINDS = ["bytes", "bytes trimmed", "unigram", "wordpiece", "letters"]


@pytest.fixture(scope="session")
def trained():
    return {kind: train(kind) for kind in KINDS}


@pytest.fixture
def processor(trained):
    def make(kind, template=PLAIN, **vision):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=trained[kind],
            pad_token="<pad>",
            unk_token="<unk>",
            eos_token="</s>",
            extra_special_tokens={"user": "<u>", "assistant": "<a>"},
        )
        fast.chat_template = template
        return ComposedProcessor(fast, **vision)

    return make


def groups_of(student, teacher, conversation, images=(), *, grouped=True):
    """Return each group as (student's tokens, teacher's tokens)."""
    pair = encode_pair(conversation, images, student, teacher, 500, grouped=grouped)
    sides = []
    for processor, row, spans in zip((student, teacher), (pair.student, pair.teacher), pair.groups, strict=True):
        ids = row.input_ids[row.supervised].tolist()
        sides.append([processor.tokenizer.convert_ids_to_tokens(ids[a:b]) for a, b in spans.tolist()])
    return list(zip(*sides, strict=True))


def written(processor, tokens):
    """Return the text of tokens without white space, in the tokenizer's form of letters."""
    tokenizer = processor.tokenizer
    if tokenizer.backend_tokenizer.decoder is None:
        text = "".join(tokens)
    else:
        text = tokenizer.backend_tokenizer.decoder.decode(tokens)
    return "".join(text.replace("##", "").split())


@pytest.mark.parametrize("templates", [(PLAIN, PLAIN), (BLANKS, PLAIN), (LINES, BLANKS)], ids=["same", "one", "both"])
@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_groups_spell_the_same_text_and_are_small(processor, talk, student, teacher, templates):
    ours, theirs = processor(student, templates[0]), processor(teacher, templates[1])
    # A word unknown to the WordPiece tokenizer would be one unknown token.
    talked = talk("What?", TEXTS[0], "And?", f"{TEXTS[1]} {TEXTS[3].strip()}  x")
    groups = groups_of(ours, theirs, talked)
    assert [pair[-1] for pair in groups[-1]] == ["</s>", "</s>"]
    for mine, other in groups:
        bare = [written(p, tokens) for p, tokens in ((ours, mine), (theirs, other))]
        if "wordpiece" in (student, teacher):  # which drops case and accents
            bare = [written(ours, []) + BARE.normalize_str(text) for text in bare]
        assert bare[0] == bare[1]
    # No group reaches across a space between two words.
    assert all(len(written(ours, mine)) <= len("Dunkelgrün") for mine, _ in groups)
    # Both end tokens, and every word and sign of both answers.
    assert len(groups) >= 2 + len(TEXTS[0].split()) + len(TEXTS[1].split())
    if student == teacher and templates[0] == templates[1]:
        assert all(mine == other for mine, other in groups)
        assert all(len(mine) == 1 for mine, _ in groups) == (student in ("wordpiece", "letters"))


BARE = normalizers.BertNormalizer()


@pytest.mark.parametrize("teacher", ["bytes", "bytes trimmed", "unigram"])
def test_a_space_belongs_to_the_word_after_it(processor, talk, teacher):
    groups = groups_of(processor("letters"), processor(teacher), talk("?", "three blue shapes"))
    spaced = [(mine, other) for mine, other in groups if mine[0] == " "]
    assert len(spaced) == 2
    assert all(" " not in mine[1:] for mine, _ in groups)
    assert all(other[0][0] in "Ġ▁" for _, other in spaced)


def test_pieces_of_one_character_stay_together(processor, talk):
    groups = groups_of(processor("bytes"), processor("letters"), talk("?", "a☃b"))  # both have only its bytes
    assert [len(mine) for mine, _ in groups] == [1, 3, 1, 1]


def test_a_blank_that_the_template_adds_goes_with_what_follows(processor, talk):
    groups = groups_of(processor("letters", BLANKS), processor("bytes"), talk("?", "red"))
    assert groups[0][0][:2] == [" ", "r"]
    assert groups[-1] == ([" ", "</s>"], ["</s>"])


def test_end_tokens_that_one_model_lacks_are_in_no_group(processor, talk):
    # Bytes alone: an unknown sign after the answer would be a special token, and so its end.
    silent = BLANKS.replace(" {{ eos_token }}", "")
    for templates in ((PLAIN, silent), (silent, PLAIN)):
        pair = encode_pair(
            talk("?", "red", "?", "blue"),
            [],
            processor("bytes trimmed", templates[0]),
            processor("bytes", templates[1]),
            500,
            grouped=True,
        )
        assert pair.distilled.tolist() == (~pair.student.ends[pair.student_tokens]).tolist()
        in_groups = torch.cat([pair.teacher_tokens[a:b] for a, b in pair.groups[1].tolist()])
        assert not pair.teacher.ends[in_groups].any()


def test_images_and_several_samples(processor, talk, picture):
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3)
    student = processor("letters", transform=transform, tokens=4)
    teacher = processor("bytes", BLANKS, transform=transform, tokens=9)
    samples = [(talk([None, "What?"], "red circle"), [picture()]), (talk("And?", "blue", "Sure?", "yes"), [])]
    pairs = [encode_pair(c, images, student, teacher, 500, grouped=True) for c, images in samples]
    batch = collate(pairs, student, teacher, grouped=True)
    assert len(batch.groups) == sum(len(pair.groups[0]) for pair in pairs)
    assert len(batch.teacher.positions) == len(batch.teacher_targets) > 0
    for rows, targets in ((batch.student, batch.targets), (batch.teacher, batch.teacher_targets)):
        assert rows.inputs["input_ids"].flatten()[rows.positions + 1].tolist() == targets.tolist()
    sides = ((student, batch.targets, batch.groups.student), (teacher, batch.teacher_targets, batch.groups.teacher))
    texts = [["".join(p.tokenizer.decode(t[a:b]).split()) for a, b in spans.tolist()] for p, t, spans in sides]
    assert texts[0] == texts[1]
    assert "".join(texts[0]) == "redcircle</s>blue</s>yes</s>"
    assert batch.distilled.all()


def test_a_micro_batch_without_samples_has_no_groups(processor):
    batch = collate([], processor("letters"), processor("bytes"), grouped=True).to("cpu")
    assert len(batch.groups) == len(batch.teacher_targets) == 0
    assert batch.groups.student.shape == batch.groups.teacher.shape == (0, 2)
    assert batch.groups.student.dtype == batch.teacher_targets.dtype == torch.int64


def test_places_survive_the_expansion_of_images(talk, picture, tmp_path):
    """Transformers' own processors replace one placeholder in the text by many tokens."""
    processor = load_vlm(str(tiny.write_llava(tmp_path / "llava", layers=2))).processor
    answers = ["red no", "blue"]
    row = processor.encode(talk([None, "what color"], answers[0], ["and", None], answers[1]), [picture(), picture()])
    assert len(row.spans) == int(row.supervised.sum()) > 3
    ids, ends = row.input_ids[row.supervised].tolist(), row.ends[row.supervised].tolist()
    spelt = [
        (piece // 2, answers[piece // 2][start:stop], end)
        for (piece, start, stop), end in zip(row.spans.tolist(), ends, strict=True)
    ]
    assert spelt == [(0, "red", False), (0, "no", False), (0, "", True), (1, "blue", False), (1, "", True)]
    assert [processor.tokenizer.decode([i]) for i in ids] == ["red", "no", "<eos>", "blue", "<eos>"]
