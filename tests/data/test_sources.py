"""Every layout of a record becomes the same conversation; files are indexed exactly; errors name what is wrong."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from functools import partial

import pytest
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from data.json_sources import JsonlSource
from data.layouts import to_conversation
from data.opening import open_source, open_text


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def said(role, *parts):
    return {"role": role, "content": list(parts)}


def turns(*texts, keys=("role", "content"), names=("user", "assistant")):
    return [{keys[0]: names[i % 2], keys[1]: value} for i, value in enumerate(texts)]


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def refused(record, **options):
    with pytest.raises(BadSample) as caught:
        to_conversation(record, **options)
    return caught.value.reason


# Layouts.

ASKED = (said("user", IMAGE, text("\nColour?")), said("assistant", text("Red.")))


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": turns("<image>\nColour?", "Red.", keys=("from", "value"), names=("human", "gpt"))},
        {"conversation": turns("<image>\nColour?", "Red.")},
        {"messages": turns("<image>\nColour?", "Red.")},
        {"messages": turns("\nColour?", "Red.")},
        {"messages": turns([IMAGE, text("\nColour?")], [text("Red.")])},
        {"messages": turns([text("<image>\nColour?")], [text("Red.")])},
        {"texts": [{"user": "\nColour?", "assistant": "Red.", "source": "x"}]},
        {"question": "\nColour?", "answer": "Red."},
    ],
)
@pytest.mark.parametrize("images", [{"image": "a.jpg"}, {"images": ["a.jpg"]}, {"image": ["a.jpg"], "images": None}])
def test_layouts(record, images, tmp_path):
    conversation = to_conversation(record | images, images=tmp_path, source="s", line=7)
    assert conversation.messages == ASKED
    assert conversation.images == (str(tmp_path / "a.jpg"),)
    assert (conversation.source, conversation.line) == ("s", 7)


def test_system_and_several_turns():
    record = {"messages": [{"role": "system", "content": "Be brief."}, *turns("A?", "B.", "C?", "D.")]}
    assert to_conversation(record).messages == (
        said("system", text("Be brief.")),
        said("user", text("A?")),
        said("assistant", text("B.")),
        said("user", text("C?")),
        said("assistant", text("D.")),
    )


def test_placeholders_are_replaced_where_they_stand_and_nothing_else_changes():
    record = {"messages": turns(" <image> and\n<image>? ", "No", "<image>", "Yes"), "images": ["a", "b", "c"]}
    conversation = to_conversation(record)
    assert conversation.messages[0] == said("user", text(" "), IMAGE, text(" and\n"), IMAGE, text("? "))
    assert conversation.messages[2] == said("user", IMAGE)
    assert conversation.images == ("a", "b", "c")


def test_a_literal_placeholder_beside_image_parts_stays_text():
    record = {"messages": turns([IMAGE, text("What is <image> in HTML?")], "A tag."), "images": ["a"]}
    assert to_conversation(record).messages[0] == said("user", IMAGE, text("What is <image> in HTML?"))


def test_image_parts_with_their_own_image(tmp_path):
    picture = Image.new("RGB", (1, 1))
    parts = [
        {"type": "image", "image": "a.png"},
        IMAGE,
        {"type": "image", "path": "/b.png"},
        {"type": "image", "url": "c.png", "image": None},
        {"type": "image", "image": {"bytes": b"d", "path": "d.png"}},
        {"type": "image", "image": picture},
        text("?"),
    ]
    conversation = to_conversation({"messages": turns(parts, "!"), "images": ["own"]}, images=tmp_path)
    own = [str(tmp_path / name) for name in ("a.png", "own")]
    assert conversation.images == (*own, "/b.png", str(tmp_path / "c.png"), b"d", picture)
    assert conversation.messages[0] == said("user", *[IMAGE] * 6, text("?"))


@pytest.mark.parametrize("none", [None, "", "None", "none", "nan", "null", float("nan"), [], [None], {"bytes": None}])
def test_no_image(none):
    conversation = to_conversation({"image": none, "messages": turns("A?", "B.")})
    assert conversation.images == ()
    assert conversation.messages[0] == said("user", text("A?"))


def test_image_values():
    for value, expected in [
        (["a", "b"], ("a", "b")),
        ({"bytes": b"x", "path": "a"}, (b"x",)),
        ([{"bytes": None, "path": "a"}, {"path": "b"}], ("a", "b")),
        ("/abs/a.png", ("/abs/a.png",)),
        ("https://x.org/a.png", ("https://x.org/a.png",)),
    ]:
        assert to_conversation({"image": value, "question": "?", "answer": "!"}).images == expected
    assert refused({"image": 5, "question": "?", "answer": "!"}) == "unknown kind of image"


@pytest.mark.parametrize(
    ("content", "images", "detail"),
    [
        ("<image><image>?", ["a"], "2 placeholders, 1 image"),
        ("<image>?", ["a", "b"], "1 placeholder, 2 images"),
        ("<image>?", [], "1 placeholder, 0 images"),
        ([{"type": "image", "image": "a"}, text("?")], ["b"], "0 placeholders, 1 image"),
    ],
)
def test_placeholder_counts(content, images, detail):
    with pytest.raises(BadSample, match=f"image count mismatch: {detail}"):
        to_conversation({"messages": turns(content, "!"), "images": images})


# Question rows and metadata.


def test_question_rows():
    row = {
        "question": "How many?",
        "question_id": 5,
        "question_type": "count",
        "answer_type": "number",
        "answers": [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}],
        "image": "a",
    }
    conversation = to_conversation(row)
    assert conversation.messages == (said("user", IMAGE, text("How many?")), said("assistant", text("2")))
    assert conversation.references == ["two", "2", "2"]
    assert conversation.metadata["question_type"] == "count"
    assert conversation.metadata["question_id"] == 5
    assert "image" not in conversation.metadata
    both = to_conversation(row | {"answer": "two"})
    assert (both.messages[1], both.references) == (said("assistant", text("two")), ["two", "2", "2"])
    assert to_conversation({"question": "?", "answer": 3}).references == ["3"]
    assert to_conversation({"question": "?", "answers": ["b", "a"]}).messages[1] == said("assistant", text("b"))


def test_metadata_keeps_the_record_and_its_own():
    record = {"id": "7", "category": "x", "metadata": {"level": 1}, "other": 2, "question": "?", "answer": "!"}
    assert to_conversation(record).metadata == {"id": "7", "category": "x", "level": 1}


def test_answers_are_required_unless_said_otherwise():
    for record in ({"messages": turns("A?")}, {"question": "A?", "answers": []}):
        assert refused(record) == "no assistant answer"
        assert to_conversation(record, answers_required=False).messages == (said("user", text("A?")),)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not a JSON object"),
        ({"text": "plain"}, "unknown layout"),
        ({}, "unknown layout"),
        ({"messages": "hello"}, "messages are not a list of objects"),
        ({"messages": ["hello"]}, "messages are not a list of objects"),
        ({"messages": []}, "no user message"),
        ({"messages": turns("A", "B", names=("user", "root"))}, "unknown role"),
        ({"messages": turns("A", "B", names=("tool", "user"))}, "tool speaks before the user"),
        ({"messages": [{"content": "A"}]}, "unknown role"),
        ({"messages": turns("A", None)}, "message without text"),
        ({"messages": turns("A", 5)}, "message without text"),
        ({"messages": turns([{"type": "sound"}], "B")}, "unknown message part"),
        ({"messages": turns([{"type": "video"}], "B")}, "video without a file"),
        ({"messages": turns([{"type": "text"}], "B")}, "unknown message part"),
        ({"messages": turns("A", "B"), "audio": "a.mp3"}, "video and audio are not supported"),
        ({"messages": turns("<video> <video>", "B"), "video": "a.mp4"}, "video count mismatch"),
        ({"messages": turns("<image>", "B"), "video": "a.mp4", "image": "a.png"}, "video count mismatch"),
        ({"messages": turns("A", "B", names=("assistant", "user"))}, "assistant speaks before the user"),
        ({"messages": turns("A", "B", names=("user", "system"))}, "system message is not the first"),
        ({"messages": turns("A", " \n")}, "empty answer"),
        ({"messages": turns("A", "B", "C", "")}, "empty answer"),
        ({"messages": turns(" ", "B")}, "empty user message"),
        ({"messages": turns("A", "\ud83d")}, "invalid Unicode"),
        ({"question": "A", "answer": ""}, "empty answer"),
        ({"question": "A", "answer": True}, "answer is not a text"),
        ({"question": "A", "answer": 1, "choices": ["x", "y"]}, "multiple-choice rows are not supported"),
    ],
)
def test_malformed_records(record, reason):
    assert refused(record).startswith(reason)


# Files.

LINES = [
    b'\xef\xbb\xbf{"question": "caf\xc3\xa9?", "answer": "0"}\r\n',
    b"\n",
    b"   \r\n",
    b'{"question": "q", "answer": "line\xe2\x80\xa8separator"}\n',
    b'{"question": \n',
    b'{"question": "\xff", "answer": "x"}\n',
    b"[" * 100_000 + b"\n",
    b'{"question": "last", "answer": "5"}',
]


def test_jsonl_is_indexed_by_its_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(LINES))
    source = open_source(path)
    assert (source.name, len(source)) == ("rows", 6)
    assert source[0].question == "café?"
    assert source[1].references == ["line\u2028separator"]
    assert source[5].question == source[-1].question == "last"
    assert [source.line(i) for i in range(6)] == [1, 4, 5, 6, 7, 8]
    assert source[5].line == 8
    assert source.size(5) == len(LINES[-1])
    for i, reason in [(2, "invalid JSON"), (3, "invalid UTF-8"), (4, "invalid JSON")]:
        with pytest.raises(BadSample) as caught:
            source[i]
        assert caught.value.reason == reason
    with pytest.raises(IndexError):
        source[6]


def test_sources_travel_to_workers(tmp_path):
    records = [{"question": str(i), "answer": "a"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records))
    for name in ("a.jsonl", "b.json"):
        source = open_source(tmp_path / name)
        source[0]
        copy = pickle.loads(pickle.dumps(source))
        assert [copy[i].question for i in range(3)] == ["0", "1", "2"]


def test_json_list(tmp_path):
    records = [{"question": "ü" * i, "answer": "a", "image": "x.png"} for i in (1, 50)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*records, 5]))
    source = open_source(path, images=tmp_path, name="mine", limit=3)
    assert (source.name, len(source)) == ("mine", 3)
    assert source[1].question == "ü" * 50
    assert source[1].images == (str(tmp_path / "x.png"),)
    assert source[1].line == 2
    assert source.size(0) < source.size(1)
    with pytest.raises(BadSample, match="not a JSON object"):
        source[2]


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    source = open_source(path)
    assert isinstance(source, JsonlSource)
    assert [source[i].question for i in range(2)] == ["a", "c"]
    assert len(open_source(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"question": "a", "answer": "b"}'),
        ("a.json", '{\n  "question": "a",\n  "answer": "b"\n}\n'),
        ("a.jsonl", '{\n  "question": "a",\n  "answer": "b"\n}\n'),
        ("a.jsonl", '[\n{"question": "a", "answer": "b"}\n]'),
        ("a.jsonl", '[{"question": "a", "answer": "b"}]\n'),
        ("a.json", '\n [{"question": "a", "answer": "b"}]'),
    ],
)
def test_one_object_and_lists_under_any_name(tmp_path, name, content):
    for path, raw in ((tmp_path / name, content.encode()), (tmp_path / f"{name}.gz", gzip.compress(content.encode()))):
        path.write_bytes(raw)
        source = open_source(path)
        assert [source[i].question for i in range(len(source))] == ["a"]
        assert source.name == "a"


def test_compressed_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"".join(LINES)))
    plain, packed = open_source(tmp_path / "rows.jsonl"), open_source(tmp_path / "rows.jsonl.gz")
    assert packed[0] == plain[0]
    assert packed[-1] == plain[-1]
    assert packed.sizes().tolist() == plain.sizes().tolist()
    assert pickle.loads(pickle.dumps(packed))[1] == plain[1]
    with pytest.raises(BadSample, match="invalid JSON"):
        packed[2]


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, suffix, comma):
    rows = [
        ["", "image", "question", "answer", "answers"],
        ["0", "a.png", f"How{comma}many?\nSay.", "2", ""],
        ["1", "['a.png', 'b.png']", "<image>[1] <image>?", "", '["x", "y", "y"]'],
        ["2", "", "“Quoted”", "N/A", ""],
    ]
    with (tmp_path / f"a.{suffix}").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=comma).writerows(rows)
        file.write("one cell\n")
    source = open_source(tmp_path / f"a.{suffix}")
    assert [source.line(i) for i in range(4)] == [2, 4, 5, 6]
    assert source[0].messages == (said("user", IMAGE, text(f"How{comma}many?\nSay.")), said("assistant", text("2")))
    assert source[1].images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert source[1].references == ["x", "y", "y"]
    assert (source[2].images, source[2].references) == ((), ["N/A"])
    assert source.not_read == {}
    with pytest.raises(BadSample, match="row of another length: 1 cells under 5 columns"):
        source[3]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert len(open_source(tmp_path / f"a.{suffix}", limit=2)) == 2


def test_lists_of_messages_in_a_table(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns("A?", "B."))], [repr(turns("A?", "B."))]])
    source = open_source(tmp_path / "a.csv")
    assert source[0].messages == source[1].messages == (said("user", text("A?")), said("assistant", text("B.")))


@pytest.mark.parametrize(
    ("name", "start", "opens"),
    [
        ("a.jsonl", b'{"question": "a", "answer": "b"}\n', open_source),
        ("a.csv", b"a,b\n", open_source),
        ("a.json", b"[", open_source),
        ("a.txt", b"a", partial(open_text, characters=1000)),
    ],
)
def test_files_with_holes_end_in_one_line(tmp_path, monkeypatch, name, start, opens):
    """A sparse file of 40 GB."""
    monkeypatch.setattr("data.paths.MAX_LINE", 1 << 20)
    (tmp_path / name).write_bytes(start)
    os.truncate(tmp_path / name, 40 << 30)
    with pytest.raises(UserError, match=r"longer than 1 MiB|larger than 4 GiB|zero bytes") as caught:
        opens(tmp_path / name)
    assert name in str(caught.value)


def test_images_start_from_the_folder_of_the_file_or_the_given_one(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b", "image": "c.png"}')
    assert open_source(path)[0].images == (str(tmp_path / "c.png"),)
    assert open_source(path, images=tmp_path / "pictures")[0].images == (str(tmp_path / "pictures" / "c.png"),)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.jsonl", None, {}, "does not exist"),
        ("a.jsonl", "\n \n", {}, "has no rows"),
        ("a.json", "[]", {}, "has no rows"),
        ("a.json", "[1,", {}, "not valid JSON"),
        ("a.json", '"x"', {}, "not a list of records"),
        ("a.csv", "x", {}, "has no rows"),
        ("a.csv", "question;answer\na;b\n", {}, "divided by semicolons"),
        ("a.tsv", "question,answer\na,b\n", {}, "divided by commas: name it .csv"),
        ("a.csv", "a,a\n1,2\n", {}, "two columns called 'a'"),
        ("a.csv", 'question,answer\n"a,b\n', {}, "quotation mark is never closed"),
        ("a.xml", "x", {}, "cannot tell the format"),
        ("a.csv.gz", "x", {}, "unpack it"),
        ("a.jsonl.gz", "x", {}, "not a sound gzip file"),
        ("a.json", '{"data": [1]}', {}, "one JSON object with the keys data, not a list of records"),
        ("a.json", '{\n"data": [1]\n}', {}, "one JSON object with the keys data, not a list of records"),
        ("a.jsonl", '{\n"data": [1]\n}', {}, "one JSON object with the keys data, not a list of records"),
        ("a.json", "\0\0\0", {}, "begins with zero bytes"),
        ("a.jsonl", "{}", {"format": "xml"}, "unknown data format 'xml'"),
        ("a.jsonl", "{}", {"limit": 0}, "at least 1"),
        ("a.jsonl", "{}", {"split": "train"}, "no split"),
        ("folder", "", {"format": "jsonl"}, "is a folder"),
        ("folder", "", {}, "holds no parquet or arrow file"),
        ("nobody/nothing", None, {}, "cannot open nobody/nothing"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, name, content, options, message):
    monkeypatch.chdir(tmp_path)
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(name, **options)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_image_folder_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match="image folder"):
        open_source(tmp_path / "a.jsonl", images=tmp_path / "nowhere")


# Hugging Face data sets.


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


@pytest.fixture
def table(datasets):
    columns = {
        "image": [{"bytes": png("red"), "path": None}, {"bytes": b"broken", "path": None}, None],
        "images": [[], [], [{"bytes": png("blue"), "path": None}] * 2],
        "conversations": [turns("short", "a", keys=("from", "value"), names=("human", "gpt")) for _ in range(3)],
        "id": ["x", "y", "z"],
    }
    text_type = datasets.Value("string")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": [datasets.Image()],
            "conversations": [{"from": text_type, "value": text_type}],
            "id": text_type,
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_saved_data_set_with_image_columns(table, tmp_path):
    table.with_format("torch").save_to_disk(tmp_path / "set")
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "set")))
    assert (source.name, len(source)) == ("set", 3)
    assert load_image(source[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert source[0].messages[0] == said("user", IMAGE, text("short"))
    assert source[0].metadata["id"] == "x"
    # The reader decodes nothing: a broken image is found by load_image, which knows the sample.
    assert source[1].images == (b"broken",)
    assert [load_image(i).getpixel((0, 0)) for i in source[2].images] == [(0, 0, 255)] * 2
    assert source.size(0) == len("human" + "short" + "gpt" + "a")
    assert len(open_source(tmp_path / "set", limit=2)) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.tar", "texts"])
def test_rows_are_cut_into_two_sources_by_skip_and_limit(datasets, tmp_path, name):
    rows = [{"question": f"{i}?", "answer": "a", "text": f"{i}?"} for i in range(5)]
    path, records = tmp_path / name, "".join(f"{json.dumps(row)}\n" for row in rows)
    if name == "texts":
        path.mkdir()
        for i in range(5):
            (path / f"{i}.txt").write_text(f"{i}?")
    elif name == "a.csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},a\n" for row in rows))
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name == "a.tar":
        with tarfile.open(path, "w") as tar:
            for i, row in enumerate(rows):
                member = tarfile.TarInfo(f"{i}.json")
                member.size = len(json.dumps(row))
                tar.addfile(member, io.BytesIO(json.dumps(row).encode()))
    else:
        path.write_text(records if name == "a.jsonl" else json.dumps(rows))

    def opened(**options):
        source = open_text(path, 100, **options) if name == "texts" else open_source(path, **options)
        samples = [source[i] for i in range(len(source))]
        return [s.text if name == "texts" else s.question for s in samples], [s.line for s in samples]

    texts, lines = opened()
    assert texts == ["0?", "1?", "2?", "3?", "4?"]
    assert opened(limit=2) == (texts[:2], lines[:2])
    assert opened(skip=2) == (texts[2:], lines[2:])
    assert opened(skip=2, limit=2) == (texts[2:4], lines[2:4])
    assert opened(skip=4, limit=9) == (texts[4:], lines[4:])
    with pytest.raises(UserError, match="has no rows after the first 5"):
        opened(skip=5)


def test_splits(datasets, table, tmp_path):
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "both")
    assert open_source(tmp_path / "both", split="test")[0].metadata["id"] == "z"
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "one")
    assert len(open_source(tmp_path / "one")) == 3
    for split in (None, "val"):
        with pytest.raises(UserError, match="set `split` to one of train, test"):
            open_source(tmp_path / "both", split=split)


def test_parquet(table, tmp_path):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    table.select([1]).to_parquet(folder / "test-00000-of-00001.parquet")
    source = open_source(tmp_path / "hub", split="train")
    assert load_image(source[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert len(open_source(tmp_path / "hub", split="test")) == 1
    assert open_source(folder / "test-00000-of-00001.parquet")[0].metadata["id"] == "y"


def test_mixed_contents_in_a_json_column(datasets, tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("data sets 5 has JSON columns")
    features = datasets.Features({"messages": [{"role": datasets.Value("string"), "content": datasets.Json()}]})
    rows = {"messages": [turns([text("A?")], "B.")]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    assert open_source(tmp_path / "set")[0].messages == (said("user", text("A?")), said("assistant", text("B.")))
