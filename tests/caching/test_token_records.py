"""A teacher's outputs on disk: what was written is read; incomplete, damaged or other records are refused."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.batch import Encoded, Origin
from data.collate import Collator
from data.conversation import Conversation, Document
from data.encoding import Turns, compact, encode_teacher
from data.errors import BadSample, UserError
from data.layouts import to_conversation
from vlm_distill.caching.cached_processor import CachedProcessor
from vlm_distill.caching.sample_digests import sample_digest
from vlm_distill.caching.store import in_words, make_folder, read_about
from vlm_distill.caching.token_records import TokenCache, TokenWriter, bytes_a_token

FIELDS = {"hidden": (torch.bfloat16, 6), "ids": (torch.int32, 2)}
LENGTH = 4


@pytest.fixture
def folder(tmp_path):
    about = TokenCache.describe({"a": 3, "b": 4}, LENGTH, FIELDS)
    make_folder(tmp_path / "cache", "outputs", about, lambda _: None)
    return tmp_path / "cache"


def encoded(tokens, spans=False):
    """One prompt token, then supervised ones."""
    supervised = torch.arange(tokens + 1) > 0
    ends = torch.arange(tokens + 1) == tokens
    where = torch.arange(3 * tokens).reshape(tokens, 3) - 1 if spans else None
    return Encoded(torch.arange(tokens + 1) + 70_000, supervised, ends & supervised, spans=where)


def values(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=generator).bfloat16()
    return {"hidden": hidden, "ids": torch.randint(100_000, (tokens, 2), generator=generator, dtype=torch.int32)}


def write(folder, *rows, spans=False):
    """Write samples; the one with index i has i + 1 tokens."""
    writer = TokenWriter(TokenCache(folder))
    for source, row in rows:
        writer.write((source, row), 2**63 + row, encoded(row + 1, spans), values(row + 1, 10 * source + row))
    writer.close()


@pytest.mark.parametrize("spans", [True, False])
def test_what_is_written_is_read_by_another(folder, spans):
    write(folder, (0, 2), (1, 0), (1, 3), spans=spans)
    cache = TokenCache(folder)
    assert cache.missing() == [0, 1, 4, 5]
    assert cache.tokens == 3 + 1 + 4
    found, expected = cache.read((1, 3), 2**63 + 3), encoded(4, spans)
    for name in ("input_ids", "supervised", "ends", "spans"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b)
        assert a is None or a.dtype == b.dtype
    read = cache.values([Origin(1, 3, 0, 4), Origin(0, 2, 0, 3)])
    for name in FIELDS:
        assert torch.equal(read[name], torch.cat([values(4, 13)[name], values(3, 2)[name]]))
    assert {name: tuple(v.shape) for name, v in cache.values([]).items()} == {"hidden": (0, 6), "ids": (0, 2)}


def test_parts_of_a_sample_are_found_by_the_tokens_before_them(folder):
    # Ten tokens in pieces of four: 3, 3 and 1 supervised.
    row = Encoded(torch.arange(10), torch.arange(10) % LENGTH > 0, torch.arange(10) == 9)
    writer = TokenWriter(TokenCache(folder))
    writer.write((0, 0), 1, row, values(7, 0))
    writer.close()
    read = TokenCache(folder).values([Origin(0, 0, 6, 1), Origin(0, 0, 3, 3)])
    assert torch.equal(read["hidden"], values(7, 0)["hidden"][[6, 3, 4, 5]])
    assert torch.equal(read["ids"], values(7, 0)["ids"][[6, 3, 4, 5]])


def test_it_takes_the_bytes_that_are_told(folder):
    write(folder, (1, 2))
    write(folder, (1, 3), spans=True)
    assert bytes_a_token(FIELDS) == 2 * 6 + 4 * 2
    assert sorted(path.stat().st_size for path in folder.glob("*.data")) == [3 * 20 + 4 * 5, 4 * (20 + 12) + 5 * 5]
    assert {path.stat().st_size for path in folder.glob("*.index")} == {40}


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1340, "1.34 kB"),
        (1.18e6, "1.18 MB"),
        (39e9, "39.00 GB"),
        (8e11, "800.00 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_bytes_in_words(size, words):
    assert in_words(size) == words


def test_only_what_is_asked_for_is_read(folder):
    write(folder, (0, 0), (1, 3))
    cache = TokenCache(folder)
    cache.values([Origin(1, 3, 0, 4)])
    assert all(isinstance(data, np.memmap) and data.mode == "r" for data in cache._files._maps.values())
    assert len(cache._files._maps) == 1


def test_a_sample_that_changed_is_refused_with_its_place(folder):
    write(folder, (1, 2))
    with pytest.raises(UserError, match=r"^b, sample 3: .*changed since; delete that folder") as caught:
        TokenCache(folder).read((1, 2), 7)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="b, sample 2 is not in"):
        TokenCache(folder).read((1, 1), 7)


def test_left_out_samples_say_why_until_they_are_mended(folder):
    writer = TokenWriter(TokenCache(folder))
    writer.leave_out((0, 1), 5, BadSample("too long", "9 tokens — limit 8"))
    writer.close()
    cache = TokenCache(folder)
    with pytest.raises(BadSample) as caught:
        cache.read((0, 1), 5)
    assert (caught.value.reason, caught.value.detail) == ("too long", "9 tokens — limit 8")
    assert 1 not in cache.missing()
    assert 1 in cache.missing(left_out=True)
    write(folder, (0, 1))
    assert len(TokenCache(folder).read((0, 1), 2**63 + 1).input_ids) == 3


@pytest.mark.parametrize("lost", [1, 40, 41])
def test_an_entry_that_was_cut_off_does_not_count(folder, lost):
    write(folder, (0, 0), (0, 1), (0, 2))
    (index,) = folder.glob("*.index")
    index.write_bytes(index.read_bytes()[:-lost])
    cache = TokenCache(folder)
    assert cache.missing()[: 1 + lost // 41] == ([1, 2] if lost > 40 else [2])
    assert len(cache.read((0, 0), 2**63).input_ids) == 2
    write(folder, (0, 1), (0, 2))
    assert TokenCache(folder).missing() == [3, 4, 5, 6]


def test_data_that_were_cut_off_do_not_count_and_damaged_ones_are_refused(folder):
    write(folder, (0, 0), (0, 1))
    (data,) = folder.glob("*.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert TokenCache(folder).missing()[0] == 1
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"\.data is damaged; delete it and \w+\.index, and run vlm-distill cache"):
        TokenCache(folder).read((0, 1), 2**63 + 1)
    data.unlink()
    assert len(TokenCache(folder).missing()) == 7


@contextmanager
def full_disk():
    """Context manager: inside it, no file can grow beyond 100 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_folder_and_what_fitted_counts(folder):
    write(folder, (0, 0))
    with (
        full_disk(),
        pytest.raises(UserError, match=rf"^{folder}: the cache cannot be written: File too large; .* run"),
    ):
        write(folder, (0, 1), (0, 2), (1, 3))
    assert TokenCache(folder).missing() == [1, 2, 3, 4, 5, 6]
    write(folder, (0, 1), (0, 2), (1, 3))
    cache = TokenCache(folder)
    assert cache.missing() == [3, 4, 5]
    assert torch.equal(cache.values([Origin(1, 3, 0, 4)])["ids"], values(4, 13)["ids"])


def test_a_full_disk_leaves_no_folder(tmp_path):
    head = {"weight": torch.zeros(99)}
    with full_disk(), pytest.raises(UserError, match=r"cannot make the cache of outputs: .*File too large"):
        make_folder(tmp_path / "cache", "outputs", {}, lambda made: save_file(head, made / "head.safetensors"))
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch
from pathlib import Path
from data.batch import Encoded
from vlm_distill.caching import record_files, token_records
record_files._FLUSH_BYTES = 2000
cache = token_records.TokenCache(Path(sys.argv[1]))
writer = token_records.TokenWriter(cache)
start, step = int(sys.argv[2]), int(sys.argv[3])
for row in range(start, 400, step):
    supervised = torch.tensor([False, True, True])
    encoded = Encoded(torch.tensor([0, row, row]), supervised, torch.zeros(3, dtype=torch.bool))
    writer.write((0, row), row, encoded, {"hidden": torch.full((2, 64), float(row))})
    print(row, flush=True)
    if len(sys.argv) > 4:
        import time; time.sleep(0.005)
writer.close()
"""


def test_killed_writers_lose_what_they_had_not_yet_written_and_others_go_on(tmp_path):
    fields = {"hidden": (torch.float32, 64)}
    folder = tmp_path / "cache"
    make_folder(folder, "outputs", TokenCache.describe({"a": 400}, 8, fields), lambda _: None)
    command = [sys.executable, "-c", WRITER, str(folder)]
    killed = subprocess.Popen([*command, "0", "1", "slowly"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.index")) or not TokenCache(folder).tokens:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    half = TokenCache(folder)
    assert 0 < len(half.missing()) < 400
    # What was flushed is correct; two more processes write the rest at once, and some of it again.
    assert half.read((0, 0), 0).input_ids.tolist() == [0, 0, 0]
    others = [subprocess.Popen([*command, str(k), "2"], stdout=subprocess.DEVNULL) for k in range(2)]
    assert [other.wait() for other in others] == [0, 0]
    cache = TokenCache(folder)
    assert cache.missing() == []
    for row in range(400):
        assert cache.read((0, row), row).input_ids.tolist() == [0, row, row]
        assert cache.values([Origin(0, row, 0, 2)])["hidden"].unique().tolist() == [row]


def test_a_pickled_cache_carries_no_data(folder):
    import pickle

    write(folder, (1, 3))
    cache = TokenCache(folder)
    cache.values([Origin(1, 3, 0, 4)])
    other = pickle.loads(pickle.dumps(cache))
    assert not other._files._maps
    assert torch.equal(other.values([Origin(1, 3, 0, 4)])["ids"], values(4, 13)["ids"])


def test_another_version_is_refused(folder):
    make_folder(folder.with_name("later"), "outputs", read_about(folder) | {"format": 99}, lambda _: None)
    with pytest.raises(UserError, match="no cache of this version"):
        TokenCache(folder.with_name("later"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: "", "not readable as JSON"),
        (lambda text: text[: len(text) // 2], "not readable as JSON"),
        (lambda text: "[1]", "not a JSON object"),
        (lambda text: "{}", "has no format"),
        (lambda text: without(text, "sources"), "has no sources"),
        (lambda text: without(text, "checksum"), "has no checksum"),
        (lambda text: with_(text, sources=["a"]), "sources: input should be a valid dictionary"),
        (lambda text: with_(text, sources={"a": "three"}), "sources.a: input should be a valid integer"),
        (lambda text: with_(text, max_length=None), "max_length: input should be a valid integer"),
        (lambda text: with_(text, fields={"hidden": 3}), "fields.hidden: input should be a valid list"),
        (lambda text: text.replace('"a": 3', '"a": 2'), "checksum does not match"),
    ],
)
def test_a_description_of_another_shape_is_told_in_one_line(folder, spoil, words):
    path = folder / "cache.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError) as caught:
        TokenCache(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "to fill it again" in str(caught.value)


def without(text, key):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != key})


def with_(text, **changes):
    return json.dumps(json.loads(text) | changes)


def test_digests_tell_texts_images_and_sizes_apart():
    def talk(text):
        return Conversation(({"role": "user", "content": [{"type": "text", "text": text}]},))

    red = Image.new("RGB", (4, 2), "red")
    nearly = red.copy()
    nearly.putpixel((3, 1), (255, 0, 1))
    found = [
        sample_digest(talk("a"), []),
        sample_digest(talk("b"), []),
        sample_digest(talk("a"), [red]),
        sample_digest(talk("a"), [red, red]),
        sample_digest(talk("a"), [nearly]),
        sample_digest(talk("a"), [Image.new("RGB", (2, 4), "red")]),
        sample_digest(Document("a"), ()),
        sample_digest(Document("a", last=False), ()),
    ]
    assert len(set(found)) == len(found)
    assert found[2] == sample_digest(talk("a"), [red.copy()])
    # The source and line are not part of its content.
    assert found[6] == sample_digest(Document("a", source="x", line=3), ())


def test_compact_rows_keep_answers_apart_and_say_where_states_are():
    supervised = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    ends = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
    row = compact(Encoded(torch.arange(9), supervised, ends))
    assert row.input_ids.tolist() == [1, 2, 3, 6, 7]
    assert row.supervised.tolist() == [False, True, True, False, True]
    assert row.ends.tolist() == [False, False, True, False, False]
    rows = CachedProcessor.collate(
        None, [row, compact(Encoded(torch.arange(3), torch.arange(3) > 1, torch.arange(3) > 2))]
    )
    assert rows["predicts"].tolist() == [[True, True, False, True, False], [True, False, False, False, False]]


def test_answers_that_are_samples_of_their_own_are_found_again(folder, processor):
    said = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "bc")]
    sample = to_conversation({"messages": [{"role": role, "content": text} for role, text in said]})
    turns = Turns(split=True)
    pairs, whole = encode_teacher(sample, [], processor(), 50, turns)
    writer = TokenWriter(TokenCache(folder))
    writer.write((0, 0), sample_digest(sample, []), whole, values(5, 0))
    writer.close()
    collator = Collator(processor(), CachedProcessor(TokenCache(folder), None), 50, turns)
    found = collator.encode(sample, [], (0, 0))
    assert [pair.origins for pair in found] == [(Origin(0, 0, 0, 2),), (Origin(0, 0, 2, 3),)]
    assert all(pair.distilled.all() for pair in found)
    for live, cached in zip(pairs, found, strict=True):
        own = live.student.input_ids[live.student.supervised]
        assert torch.equal(own, cached.teacher.input_ids[cached.teacher_tokens])
