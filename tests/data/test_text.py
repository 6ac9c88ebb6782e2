"""Plain text: samples of bounded length, documents packed into rows, steps independent of the split."""

import json

import numpy as np
import pytest
import torch

from data.collate import Collator, pack
from data.conversation import Document
from data.encoding import Turns, encode_document, encode_pair
from data.errors import BadSample, UserError
from data.layouts import to_conversation
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
from data.opening import open_text

TEXTS = ["one two three", "four", "a long story about " + "words and " * 20 + "its end", "five six"]


def write(folder, texts=TEXTS, name="text"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def joined(source):
    """Return the texts of a source's documents, joined from their pieces."""
    texts, current = [], ""
    for i in range(len(source)):
        row = source[i]
        current += row.text
        if row.last:
            texts.append(current)
            current = ""
    assert not current
    return texts


@pytest.mark.parametrize("characters", [7, 30, 1000])
def test_rows_are_the_documents(tmp_path, characters):
    source = open_text(write(tmp_path), characters)
    assert joined(source) == TEXTS
    # Cut at the next white space, so one word longer than requested.
    assert max(len(source[i].text) for i in range(len(source))) <= characters + len("document")
    assert all(source.size(i) <= characters for i in range(len(source)))
    assert source.line(len(source) - 1) == len(TEXTS)
    with pytest.raises(IndexError):
        source[len(source)]


def test_pieces_begin_at_white_space(tmp_path):
    source = open_text(write(tmp_path), 50)
    pieces = [source[i].text for i in range(len(source))]
    assert len(pieces) > len(TEXTS)
    assert all(piece in TEXTS or piece[0] == " " or piece.startswith("a long") for piece in pieces)


def test_one_endless_word_is_cut_where_it_must(tmp_path):
    assert joined(open_text(write(tmp_path, ["x" * 100]), 30)) == ["x" * 100]


def test_escaped_text_is_longer_in_its_file(tmp_path):
    text = "日本語の文章です。" * 10
    source = open_text(write(tmp_path, [text]), 40)
    assert len(source) > 1
    assert joined(source) == [text]


def test_text_files(tmp_path):
    for name, text in (("b", "second"), ("a", "first"), ("c", "third")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = open_text(tmp_path, 100, name="books", limit=2)
    assert (source.name, joined(source)) == ("books", ["first", "second"])
    assert joined(open_text(tmp_path / "c.txt", 4)) == ["third"]


def test_a_column_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": [*TEXTS, None], "score": [1, 2, 3, 4, 5]})
    table.to_parquet(tmp_path / "part.parquet")
    source = open_text(tmp_path / "part.parquet", 50, limit=4)
    assert joined(source) == TEXTS
    assert np.array_equal(source.records.sizes(), [len(text) for text in TEXTS])
    whole = open_text(tmp_path / "part.parquet", 50)
    with pytest.raises(BadSample, match="no text"):
        whole[len(whole) - 1]
    table.rename_column("text", "content").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column text, but content, score"):
        open_text(tmp_path / "other.parquet", 50)


def test_what_is_no_text(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"content": "x"}\n{"text": "  "}\n["x"]\n{"text": "\\ud800 x"}\n')
    source = open_text(path, 100)
    for index, reason in enumerate(["no text", "empty document", "no text", "invalid Unicode"]):
        with pytest.raises(BadSample) as caught:
            source[index]
        assert caught.value.reason == reason


# Documents to rows.


class Letters:
    """One token a character, an end token; no images."""

    has_vision = takes_videos = one_row = False

    def __init__(self, processor):
        self.collate = processor.collate
        self.join = processor.join
        self.dummy = processor.dummy
        self.encode = processor.encode
        self.encode_all = processor.encode_all

    def encode_document(self, document):
        from data.batch import Encoded

        ids = torch.tensor([ord(c) for c in document.text] + [4] * document.last)
        return Encoded(ids, torch.arange(len(ids)) > 0, ids == 4)


@pytest.fixture
def letters(processor):
    return Letters(processor(has_vision=False))


def test_a_document_is_learnt_but_for_its_first_token(letters):
    (pair,) = encode_document(Document("abc"), letters, letters, 10)
    assert pair.student.input_ids[pair.student_tokens].tolist() == [ord("b"), ord("c"), 4]
    assert pair.distilled.all()
    assert pair.samples == 1


def test_a_long_document_is_cut_into_pieces(letters):
    pairs = encode_document(Document("abcdefg", last=False), letters, letters, 3)
    assert ["".join(map(chr, p.student.input_ids.tolist())) for p in pairs] == [
        "abc",
        "def",
    ]  # g alone predicts nothing
    assert ["".join(map(chr, p.student.input_ids[p.student_tokens].tolist())) for p in pairs] == ["bc", "ef"]
    assert [p.samples for p in pairs] == [1, 0]


def test_tokenizers_that_differ_are_told(letters, processor):
    other = Letters(processor(has_vision=False))
    other.encode_document = lambda document: letters.encode_document(Document(document.text.upper()))
    with pytest.raises(BadSample, match="misaligned"):
        encode_document(Document("abc"), letters, other, 10)
    with pytest.raises(BadSample, match="no supervised token"):
        encode_document(Document("a", last=False), letters, None, 10)


def test_packing(letters):
    documents = [encode_document(Document(text), letters, letters, 8)[0] for text in ("abc", "defghi", "jk", "l")]
    assert pack([len(document.student.input_ids) for document in documents], 8) == [[1], [0, 2], [3]]
    assert pack([], 8) == []
    batch = Collator(letters, letters, 8).batch(documents)
    ids = batch.student.inputs["input_ids"]
    assert [bytes(row.tolist()) for row in ids] == [b"defghi\4", b"abc\4jk\4", b"l\4" + bytes(5)]
    # In the documents' order, whichever rows they are in.
    assert bytes(batch.targets.tolist()) == b"bc\4efghi\4k\4\4"
    assert ids.flatten()[batch.student.positions + 1].equal(batch.targets)
    assert batch.teacher.positions.equal(batch.student.positions)
    assert batch.sample_of.tolist() == [0] * 3 + [1] * 6 + [2] * 2 + [3]
    assert batch.samples == 4


def test_steps_do_not_depend_on_the_split(letters, tmp_path):
    source = open_text(write(tmp_path, [f"document {i} has {i} words" for i in range(30)]), 80)

    def tokens(world, rank, micro, accumulation):
        mixture = Mixture([source], seed=3, batch_size=8)
        dataset = StepDataset(mixture, Collator(letters, letters, 64), StepSplit(micro, accumulation, rank, world))
        step = dataset[1]
        assert all(batch.student.inputs["input_ids"].shape[1] <= 64 for batch in step.batches)
        return [sorted(batch.targets.tolist()) for batch in step.batches], sum(batch.samples for batch in step.batches)

    whole, samples = tokens(1, 0, 2, 4)
    two = [tokens(2, rank, 2, 2) for rank in range(2)]
    assert [two[g % 2][0][g // 2] for g in range(4)] == whole
    assert samples == sum(count for _, count in two) == 8
    assert sorted(t for batch in tokens(1, 0, 8, 1)[0] for t in batch) == sorted(t for batch in whole for t in batch)


def test_text_and_conversations_in_one_batch(letters):
    collator = Collator(letters, letters, 20)
    talk = to_conversation({"question": "q", "answer": "xyz"})
    pairs = collator.encode(Document("abc")) + collator.encode(talk) + collator.encode(Document("de"))
    batch = collator.batch(pairs)
    assert batch.samples == 3
    assert len(batch.student.inputs["input_ids"]) == 2
    assert sorted(chr(t) for t in batch.targets.tolist() if t > 20) == sorted("bcexyz")


# The last answer alone, and its limits.


def talk(*texts):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return to_conversation({"prompt": texts[0], "prompt_id": "ab", "messages": messages})


def learnt(pair):
    return "".join(chr(t) for t in pair.student.input_ids[pair.student_tokens].tolist() if t > 20)


def test_the_last_answer_alone(processor):
    last = Turns(last_only=True)
    pair = encode_pair(talk("q", "ab", "r", "cd"), [], processor(), processor(system=2), 50, turns=last)
    assert learnt(pair) == "cd"
    assert pair.teacher_tokens.tolist() == [i + 2 for i in pair.student_tokens.tolist()]
    assert pair.student.ends.sum() == 1
    assert learnt(encode_pair(talk("q", "ab", "r", "cd"), [], processor(), None, 50)) == "abcd"


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"max_prompt": 8}, True),
        ({"max_prompt": 7}, False),
        ({"max_response": 3}, True),
        ({"max_response": 2}, False),
    ],
)
def test_limits(processor, limits, fits):
    # Marks and texts before the last answer: 2 + 4 (an end token too) + 2, its own opening mark among them: 8 + 1 − 1.
    conversation = talk("q", "ab", "r", "cd")
    (prompt,) = [i for i, t in enumerate(processor().encode(conversation, []).input_ids.tolist()) if t == ord("c")]
    limits = {key: value + prompt - 8 if key == "max_prompt" else value for key, value in limits.items()}
    for teacher in (None, processor()):
        if fits:
            assert learnt(encode_pair(conversation, [], processor(), teacher, 50, turns=Turns(**limits))) == "abcd"
            continue
        with pytest.raises(BadSample) as caught:
            encode_pair(conversation, [], processor(), teacher, 50, turns=Turns(**limits))
        assert caught.value.reason == "too long"
    if "max_prompt" in limits:
        with pytest.raises(BadSample, match="for the teacher"):
            encode_pair(conversation, [], processor(), processor(system=1), 50, turns=Turns(max_prompt=prompt))
