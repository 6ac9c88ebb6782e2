"""Layouts of public data sets, built by hand as their authors store them, and read as training reads them."""

import io
import json

import datasets
import pytest
from PIL import Image

from data.errors import BadSample
from data.images import load_image
from data.layouts import LAYOUTS, layout_of, to_conversation
from data.opening import open_source

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def png(side):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def sides(conversation):
    return [load_image(image).width for image in conversation.images]


def write_parquet(path, rows, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))


def test_llava_665k(tmp_path):
    """A JSON list; some records have no image; ids repeat."""
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "coco" / "1.jpg")

    def said(*values):
        return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]

    records = [
        {"id": "7", "image": "coco/1.jpg", "conversations": said("<image>\nColour?", "Red.", "Sure?", "Yes.")},
        {"id": "7", "image": "coco/1.jpg", "conversations": said("Colour?\n<image>", "Red.")},
        {"id": "8", "conversations": said("Hi", "Hello."), "model": ""},
        {"id": "9", "image": "coco/1.jpg", "conversations": said("Colour?", "Red.")},
        {"id": "10", "image": "coco/1.jpg", "conversations": said("<image><image>", "Red.")},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(records))
    source = open_source(tmp_path / "mix.json", images=tmp_path)
    assert source[0].messages[0]["content"] == [IMAGE, text("\nColour?")]
    assert [m["role"] for m in source[0].messages] == ["user", "assistant"] * 2
    assert sides(source[0]) == [3]
    assert source[1].messages[0]["content"] == [text("Colour?\n"), IMAGE]
    assert source[2].messages[0]["content"] == [text("Hi")]
    assert source[2].images == ()
    assert source[3].messages[0]["content"] == [IMAGE, text("Colour?")]
    with pytest.raises(BadSample, match="image count mismatch: 2 placeholders, 1 image"):
        source[4]


def test_llava_onevision_by_a_config_with_brackets(tmp_path):
    """Parquet with an image column, null for text, in configs that the data set's card names."""
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "data_source": datasets.Value("string"),
        }
    )
    said = [{"from": "human", "value": "<image>\nRead."}, {"from": "gpt", "value": "abc"}]
    only = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    rows = [
        {"id": "a", "image": png(4), "conversations": said, "data_source": "iam"},
        {"id": "b", "image": None, "conversations": only, "data_source": "text"},
    ]
    write_parquet(tmp_path / "iam(cauldron)" / "train-00000-of-00001.parquet", rows, features)
    write_parquet(tmp_path / "other" / "train-00000-of-00001.parquet", rows[:1], features)
    lines = ["---", "configs:"]
    for name in ("iam(cauldron)", "other"):
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/train-*"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    source = open_source(tmp_path, config="iam(cauldron)", split="train")
    assert len(source) == 2
    assert source[0].messages[0]["content"] == [IMAGE, text("\nRead.")]
    assert sides(source[0]) == [4]
    assert source[1].images == ()


def test_the_cauldron(tmp_path):
    """A list of images without placeholders, several exchanges about all of them."""
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "texts": [{key: datasets.Value("string") for key in ("user", "assistant", "source")}],
        }
    )
    rows = [
        {
            "images": [png(2), png(5)],
            "texts": [
                {"user": "Same?", "assistant": "No.", "source": "x"},
                {"user": "Sure?", "assistant": "Yes.", "source": "x"},
            ],
        },
        {"images": [png(2)], "texts": [{"user": "Count?", "assistant": None, "source": "x"}]},
        {"images": [png(2)], "texts": []},
    ]
    write_parquet(tmp_path / "train.parquet", rows, features)
    source = open_source(tmp_path / "train.parquet")
    assert source[0].messages[0]["content"] == [IMAGE, IMAGE, text("Same?")]
    assert [m["role"] for m in source[0].messages] == ["user", "assistant"] * 2
    assert sides(source[0]) == [2, 5]
    for row, reason in ((1, "message without text"), (2, "no user message")):
        with pytest.raises(BadSample, match=reason):
            source[row]


def test_mantis_instruct(tmp_path):
    """Paths without bytes; pictures unzipped beside; placeholders of which some may be missing."""
    for name, side in (("a.jpg", 6), ("b.jpg", 7)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    images = [{"bytes": None, "path": name} for name in ("a.jpg", "b.jpg")]

    def row(question, *more):
        said = [question, "No", *more]
        turns = [{"role": ("user", "assistant")[i % 2], "content": value} for i, value in enumerate(said)]
        return {"id": "n1", "images": images, "conversation": turns}

    rows = [
        row("<image> <image> Same?"),
        row("Same?", "And <image>?", "Yes"),
        row("Same?"),
        row("<image><image><image>"),
    ]
    write_parquet(tmp_path / "nlvr2" / "train-00000-of-00001.parquet", rows)
    source = open_source(tmp_path / "nlvr2", images=tmp_path, split="train")
    assert source[0].messages[0]["content"] == [IMAGE, text(" "), IMAGE, text(" Same?")]
    assert sides(source[0]) == [6, 7]
    # One of two has a placeholder; the other precedes everything.
    assert source[1].messages[0]["content"] == [IMAGE, text("Same?")]
    assert source[1].messages[2]["content"] == [text("And "), IMAGE, text("?")]
    assert sides(source[1]) == [6, 7]
    assert source[2].messages[0]["content"] == [IMAGE, IMAGE, text("Same?")]
    with pytest.raises(BadSample, match="image count mismatch: 3 placeholders, 2 images"):
        source[3]


def test_every_layout_is_known_by_its_column():
    for layout in LAYOUTS:
        assert layout_of({"id": 1, layout.column: [], "images": None}, has_image=layout.describes) is layout
    with pytest.raises(BadSample, match="unknown layout: keys: id, images"):
        layout_of({"id": 1, "images": []})


def test_a_video_is_its_frames_in_order(tmp_path):
    for side in (2, 3, 4):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    video = {"type": "video", "frames": ["4.png", "2.png", "4.png"]}
    content = [text("Before <image>"), IMAGE, video, text("What happens?")]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It falls."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"images": ["3.png"], "messages": messages}) + "\n")
    conversation = open_source(str(tmp_path / "rows.jsonl"))[0]
    seen = [text("Before <image>"), IMAGE, IMAGE, IMAGE, IMAGE, text("What happens?")]
    assert conversation.messages[0] == {"role": "user", "content": seen}
    assert sides(conversation) == [3, 4, 2, 4]


SAID = [("user", "Colour?"), ("assistant", "Red.")]
EARLIER = [("user", "Shape?"), ("assistant", "Round.")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Colour?", "completion": " Red."}, [("user", "Colour?"), ("assistant", " Red.")]),
        (
            {
                "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Colour?"}],
                "completion": [{"role": "assistant", "content": "Red."}],
            },
            [("system", "Be brief."), *SAID],
        ),
        ({"query": "Colour?", "response": "Red."}, SAID),
        ({"query": "Colour?", "response": "Red.", "history": [["Shape?", "Round."]]}, EARLIER + SAID),
        ({"system": "Be brief.", "query": "Colour?", "response": "Red."}, [("system", "Be brief."), *SAID]),
        ({"instruction": "Colour?", "input": "", "output": "Red."}, SAID),
        (
            {"instruction": "Colour?", "input": "The first.", "output": "Red.", "history": [["Shape?", "Round."]]},
            [*EARLIER, ("user", "Colour?\nThe first."), ("assistant", "Red.")],
        ),
        ({"input": "Colour?", "output": "Red."}, SAID),
        ({"prefix": "Colour?", "suffix": "Red."}, SAID),
        ({"question": "Colour?", "multiple_choice_answer": "Red.", "answers": ["a", "a"]}, SAID),
        ({"caption": "Red."}, [("user", ""), ("assistant", "Red.")]),
        ({"text": "Red."}, [("user", ""), ("assistant", "Red.")]),
    ],
)
def test_layouts_of_other_suites(record, expected):
    conversation = to_conversation(record | {"image": "a.png"})
    contents = [[text(said)] if said else [] for _, said in expected]
    first = next(i for i, (role, _) in enumerate(expected) if role == "user")
    contents[first].insert(0, IMAGE)
    assert [message["role"] for message in conversation.messages] == [role for role, _ in expected]
    assert [message["content"] for message in conversation.messages] == contents


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"caption": "Red."}, "unknown layout"),
        ({"prompt": "Colour?", "answer": "Red."}, "no assistant answer.*keys: prompt, answer"),
        ({"query": "Colour?", "response": "Red.", "history": ["Shape?"]}, "history is not a list of pairs"),
        ({"instruction": 5, "output": "Red."}, "message without text"),
        ({"question": "Colour?", "prompt": "Shape?", "answer": "Red."}, "text beside the question"),
    ],
)
def test_other_layouts_that_are_not_sound(record, reason):
    with pytest.raises(BadSample, match=reason):
        to_conversation(record)


def test_the_size_of_a_row_counts_the_text_of_its_layout(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"instruction": "ab", "input": "c", "output": "de", "note": "xxxxx"}])
    assert open_source(tmp_path / "a.parquet").size(0) == 5
