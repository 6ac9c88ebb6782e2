"""Every key of a record is read, known to be meaningless, refused by name, or reported as not read."""

import base64
import io
import json

import pytest
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from data.layouts import to_conversation
from data.opening import open_source

IMAGE = {"type": "image"}
ASKED = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Red."}]


def text(value):
    return {"type": "text", "text": value}


def png(side=3):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (side, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(side):
    return base64.b64encode(png(side)).decode()


def refused(record, **options):
    with pytest.raises(BadSample) as caught:
        to_conversation(record, **options)
    return str(caught.value)


def said(conversation):
    """Roles and texts; an image is shown as [n], by its side."""
    sides = iter(load_image(image).width for image in conversation.images)
    found = []
    for message in conversation.messages:
        parts = [part["text"] if part["type"] == "text" else f"[{next(sides)}]" for part in message["content"]]
        found.append((message["role"], "".join(parts)))
    return found


@pytest.fixture
def folder(tmp_path):
    for side in (2, 3, 4):
        (tmp_path / f"{side}.png").write_bytes(png(side))
    return tmp_path


# Images.

SHAPES = [
    "3.png",
    ["3.png"],
    {"url": "3.png"},
    {"path": "3.png", "width": 3, "height": 3, "license": 1},
    {"file_name": "3.png", "id": 7},
    {"image": {"image_url": {"url": "3.png", "detail": "low"}}},
    {"bytes": png(), "path": "elsewhere.png"},
    {"bytes": encoded(3)},
    png(),
    f"data:image/png;base64,{encoded(3)}",
    {"url": f"DATA:image/png;base64,{encoded(3)}"},
    encoded(3),
    encoded(3)[:40] + "\n" + encoded(3)[40:],
]


def in_each_place(image):
    """Records that hold an image where the public layouts hold one."""
    yield {"image": image, "messages": ASKED}
    yield {"images": image, "messages": ASKED}
    yield {"image": image, "images": image, "messages": ASKED}
    for part in (
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": image},
        {"type": "input_image", "image_url": image},
        {"type": "video", "video": [image]},
        {"image": image},
    ):
        yield {"messages": [{"role": "user", "content": [part, text("Colour?")]}, ASKED[1]]}


@pytest.mark.parametrize("image", SHAPES)
def test_an_image_is_read_in_any_shape_at_any_place(folder, image):
    for record in in_each_place(image):
        assert said(to_conversation(record, images=folder)) == [("user", "[3]Colour?"), ("assistant", "Red.")]


def test_a_path_without_a_suffix_is_no_base64(folder):
    for length in range(12, 40):
        name = "images/" + "a" * length
        assert to_conversation({"image": name, "messages": ASKED}, images=folder).images == (str(folder / name),)


def test_a_file_url_is_a_path_and_judged_by_the_roots(folder):
    for url in (f"file://{folder}/3.png", f"FILE://localhost{folder}/%33.png"):
        (image,) = to_conversation({"image": url, "messages": ASKED}).images
        assert load_image(image, roots=[folder]).width == 3
        with pytest.raises(BadSample, match="image outside the roots"):
            load_image(image, roots=[folder / "other"])
    assert refused({"image": "file://host/3.png", "messages": ASKED}).startswith("image is a URL")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"src": "3.png"}, "image under an unknown key|unknown kind of image: an object with the keys src"),
        ({"id": 5}, "unknown kind of image: an object with the keys id"),
        ({"path": "2.png", "url": "3.png"}, "two keys say different things: path and url"),
        ({"bytes": "abc"}, "unknown kind of image: bytes"),
        ({"bytes": 5}, "unknown kind of image"),
        ("data:image/png;base64,****", "image is not base64"),
        ("data:image/png", "image is not base64"),
        (encoded(3)[:-3], "image is not base64"),
        (5, "unknown kind of image"),
    ],
)
def test_an_unknown_image_is_refused_by_name(folder, image, reason):
    for record in in_each_place(image):
        with pytest.raises(BadSample, match=reason):
            to_conversation(record, images=folder)


@pytest.mark.parametrize(
    "key",
    [
        *("image_path", "img", "imgs", "image_url", "image_file", "imagePath", "picture", "photo", "frames", "image_0"),
        *("image1", "img_2", "screenshot", "source_image", "image_file_name", "image_base64", "jpg"),
    ],
)
def test_a_key_that_looks_like_an_image_is_refused_with_the_remedy(key):
    for record in (
        {"messages": ASKED},
        {"question": "Colour?", "answer": "Red."},
        {"image": "2.png", "messages": ASKED},
    ):
        message = refused(record | {key: "3.png"})
        assert message == f"image under an unknown key: {key}; name it with columns: {{image: {key}}}"
    assert "messages[]" in refused({"messages": [ASKED[0] | {key: "3.png"}, ASKED[1]]})


def test_what_looks_like_an_image_by_its_value(folder):
    assert "columns: {image: scan}" in refused({"scan": "a.JPG", "messages": ASKED})
    assert "columns: {image: scan}" in refused({"scan": {"bytes": png(), "path": None}, "messages": ASKED})
    for key, value in (
        ("num_images", 2),
        ("image_id", "7"),
        ("has_image", True),
        ("image_classes", ["a"]),
        ("img", None),
    ):
        assert to_conversation({"messages": ASKED, key: value}).images == ()
    assert "columns: {image: files}" in refused({"files": [{"path": "a.png"}], "messages": ASKED})
    second = {"image": "2.png", "second": {"bytes": png(), "path": None}, "messages": ASKED}
    assert "columns: {image: second}" in refused(second)
    # Beside an image, the name of a file only says where it came from.
    assert said(to_conversation({"image": "3.png", "file_name": "x.png", "messages": ASKED}, images=folder))


def test_images_beside_image_are_never_one_of_them():
    record = {"image": "a", "images": ["a", "b"], "messages": ASKED}
    assert refused(record) == (
        "two keys say different things: image and images; write all under images, or choose one with columns"
    )
    assert to_conversation(record, chosen={"images"}).images == ("a", "b")


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("<image1> or <image2>?", "[2] or [3]?"),
        ("<image 2> or <image 1>?", "[3] or [2]?"),
        ("<image_2><image_1>", "[3][2]"),
        ("<|image_1|>\n<|image_2|>", "[2]\n[3]"),
        ("<image-0> or <image-1>?", "[2] or [3]?"),
        ("<image1>, <image2>: <image1>?", "[2], [3]: [2]?"),
        ("<|image|> or <ImageHere>?", "[2] or [3]?"),
        ("<image> or <image>?", "[2] or [3]?"),
        ("Which?", "[2][3]Which?"),
    ],
)
def test_marks_are_places_by_their_number(folder, question, shown):
    messages = [{"role": "user", "content": question}, ASKED[1]]
    assert said(to_conversation({"images": ["2.png", "3.png"], "messages": messages}, images=folder))[0][1] == shown


@pytest.mark.parametrize(
    "mark",
    ["<IMAGE>", "<Image 1>", "<img0>", "<img_1>", "[IMG]", "[image 1]", "{image}", "<start_of_image>", "<|image_pad|>"],
)
def test_other_spellings_of_a_place_are_refused_by_name(mark):
    record = {"image": "a.png", "messages": [{"role": "user", "content": f"{mark} Colour?"}, ASKED[1]]}
    assert refused(record) == f"unknown placeholder of an image: {mark}; write <image> at its place"
    assert said(to_conversation(record | {"image": None}))[0][1] == f"{mark} Colour?"
    placed = [{"role": "user", "content": f"<image>{mark} Colour?"}, ASKED[1]]
    assert to_conversation(record | {"messages": placed}).images == ("a.png",)


def test_of_bytes_and_a_path_the_bytes_count_in_base64_too(folder):
    (image,) = to_conversation({"images": [{"bytes": encoded(3), "path": "2.png"}], "messages": ASKED}).images
    assert load_image(image).width == 3


def test_messages_as_tables_keep_them():
    assert said(to_conversation({"messages": json.dumps(ASKED)})) == said(to_conversation({"messages": ASKED}))
    assert refused({"messages": "[{"}).startswith("messages are not a list of objects: key 'messages': ")


def test_answers_as_tables_keep_them():
    record = {"question": "A", "answers": {"answer": ["red", "blue", "red"], "answer_id": [1, 2, 3]}}
    made = to_conversation(record)
    assert said(made)[1] == ("assistant", "red")
    assert made.references == ["red", "blue", "red"]


@pytest.mark.parametrize("question", ["<image1>", "<image2><image3>", "<image1><image>", "<image0><image2>", "<image>"])
def test_marks_that_do_not_name_each_image_are_refused(question):
    messages = [{"role": "user", "content": question}, ASKED[1]]
    assert refused({"images": ["a", "b"], "messages": messages}).startswith("image count mismatch")


def test_the_index_of_an_image_part_is_honoured(folder):
    def record(*indices):
        parts = [{"type": "image", "index": i, "text": None} for i in indices] + [{**text("?"), "index": None}]
        return {"images": ["2.png", "3.png"], "messages": [{"role": "user", "content": parts}, ASKED[1]]}

    assert said(to_conversation(record(1, 0), images=folder))[0][1] == "[3][2]?"
    assert said(to_conversation(record(None, None), images=folder))[0][1] == "[2][3]?"
    for indices in ((0, 2), (0, None), (1, 2), (0, "1"), (-1, 0), (0, True)):
        refused(record(*indices))


# Keys beside the text.


def test_the_system_of_a_record_comes_first():
    record = {"system": "Answer in French.", "messages": ASKED}
    assert said(to_conversation(record))[0] == ("system", "Answer in French.")
    same = {"system": "S", "messages": [{"role": "system", "content": "S"}, *ASKED]}
    assert len(to_conversation(same).messages) == 3
    assert refused(same | {"system": "T"}).startswith("two system messages")
    assert refused({"system_prompt": "S", "messages": ASKED}).endswith("columns: {system: …}")
    assert refused({"system": 5, "messages": ASKED}).startswith("system is not a text")


@pytest.mark.parametrize(
    "mask",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0.0}, {"mask": True}),
        *({"train_on_turn": False}, {"compute_loss": 0}, {"is_masked": True}, {"no_train": True}, {"learnable": False}),
        *({"masked": True}, {"trainable": False}, {"loss_mask": 0}, {"training": False, "weight": 0}),
    ],
)
def test_a_masked_answer_is_context(mask):
    record = {"messages": [*ASKED[:1], ASKED[1] | mask, *ASKED]}
    assert [message.get("supervised") for message in to_conversation(record).messages] == [None, False, None, None]
    assert refused({"messages": [ASKED[0], ASKED[1] | mask]}).startswith("no answer to learn")
    assert to_conversation({"messages": [ASKED[0] | mask, ASKED[1]]}).messages[0].get("supervised") is None
    assert refused({"messages": ASKED} | mask).startswith("sample kept out of the loss")


@pytest.mark.parametrize("key", ["sample_weight", "train_detail", "lossMask", "skip_training", "trainOnThis", "masks"])
def test_masks_under_other_keys_are_refused_by_name(key):
    for record in ({"messages": [ASKED[0], ASKED[1] | {key: [0]}]}, {"messages": ASKED, key: 0.5}):
        assert refused(record).startswith("loss mask under an unknown key: key ")


@pytest.mark.parametrize("key", ["training_split", "loss_type", "weight_kg", "train_id", "mask_path", "unmasked"])
def test_keys_that_only_hold_such_a_word_are_no_masks(key):
    assert to_conversation({"messages": ASKED, key: "a"}).messages


def test_masks_that_are_not_yes_or_no_are_refused():
    for mask in ({"weight": 0.5}, {"loss": "no"}, {"mask": 1}, {"loss_mask": [0, 1]}, {"weight": 2}, {"loss": -1}):
        assert refused({"messages": [ASKED[0], ASKED[1] | mask]}).startswith("a weight that is neither 0 nor 1")
    assert refused({"messages": [ASKED[0], ASKED[1] | {"train": True, "weight": 0}]}).startswith("two keys")
    assert refused({"messages": [ASKED[0] | {"train": True}, ASKED[1]]}).startswith("only an assistant's messages")
    plain = {"messages": [message | {"weight": 1, "loss": None} for message in ASKED], "weight": 1}
    assert all("supervised" not in message for message in to_conversation(plain).messages)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1"}]},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": '{"at": "sky"}'}}]},
        {"role": "assistant", "content": "", "function_call": {"name": "look", "arguments": '{"at": "sky"}'}},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"role": "tool_call", "content": '[{"name": "look", "arguments": {"at": "sky"}}]'},
    ],
)
@pytest.mark.parametrize(
    "result",
    [
        {"role": "tool", "content": "blue", "tool_call_id": "c1", "name": "look"},
        {"from": "observation", "value": "blue"},
        {"role": "function", "name": "look", "content": "blue"},
    ],
)
@pytest.mark.parametrize(
    "tools", [{"tools": [TOOL]}, {"tools": json.dumps([TOOL["function"]])}, {"functions": [TOOL["function"]]}]
)
def test_tools_and_their_calls_are_read(call, result, tools):
    conversation = to_conversation({"messages": [ASKED[0], call, result, ASKED[1]]} | tools)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    (made,) = conversation.messages[1]["tool_calls"]
    assert {key: made[key] for key in ("type", "function")} == CALL
    assert conversation.messages[1]["content"] == []
    assert conversation.messages[2]["content"] == [text("blue")]
    assert conversation.tools == (TOOL,)


def test_broken_tools_are_refused():
    for call in ([{"function": {}}], "look", [{"function": {"name": "look", "arguments": "{"}}]):
        refused({"messages": [ASKED[0], {"role": "assistant", "tool_calls": call}]})
    refused({"messages": [ASKED[0] | {"tool_calls": [CALL]}, ASKED[1]]})
    refused({"messages": ASKED, "tools": "look"})
    refused({"messages": ASKED, "tools": [5]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(key):
    record = {"messages": [ASKED[0], ASKED[1] | {key: "It looks red."}]}
    assert to_conversation(record).messages[1]["reasoning_content"] == "It looks red."


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "A", "chosen": "B", "rejected": "C"}, "preference data is not supported: key 'chosen'"),
        ({"chosen": ASKED, "rejected": ASKED}, "preference data is not supported: key 'chosen'"),
        ({"messages": ASKED, "rejected_response": "C"}, "preference data is not supported"),
        ({"prompt": "A", "completion": "B", "label": False}, "preference data is not supported: key 'label'"),
        ({"messages": ASKED, "audios": ["a.mp3"]}, "video and audio are not supported: key 'audios'"),
        ({"question": "A", "answer": 1, "options": ["x", "y"]}, "multiple-choice rows are not supported"),
        ({"question": "A", "answer": "B", "A": "x", "B": "y"}, "multiple-choice rows are not supported"),
        ({"question": "A", "answer": "B", "option_1": "x"}, "multiple-choice rows are not supported: key 'option_1'"),
        ({"query": "A", "response": "B", "choice_a": "x"}, "multiple-choice rows are not supported: key 'choice_a'"),
        ({"messages": ASKED, "label": False}, "preference data is not supported: key 'label'"),
        ({"messages": ASKED, "documents": [{"text": "x"}]}, "documents are not supported"),
        ({"question": "A", "answer": "B", "reasoning_content": "C"}, "thought beside the answer"),
        ({"messages": [ASKED[0], ASKED[1] | {"cot": "C"}]}, r"thought under an unknown key: key 'messages\[\].cot'"),
        ({"question": "A", "answers": {"text": ["B"]}}, "answer is not a text: answers: "),
        ({"question": "A", "answers": ["B", None]}, "answer is not a text: answers: None"),
        ({"question": "A", "context": "It is red.", "answer": "B"}, "text beside the question: key 'context'"),
        ({"question": "A", "history": [["a", "b"]], "answer": "B"}, "text beside the question: key 'history'"),
        ({"messages": ASKED, "chat_template_kwargs": {"a": 1}}, "template arguments of a record"),
        (
            {"messages": [ASKED[0] | {"images": ["a.png"]}, ASKED[1]]},
            r"image under an unknown key: messages\[\].images",
        ),
        ({"messages": [ASKED[0], ASKED[1] | {"value": "Blue."}]}, "two keys say different things: content and value"),
        ({"messages": [{"role": "user", "content": "<img>a.png</img>?"}, ASKED[1]]}, "image inside a text"),
        (
            {"messages": [{"role": "user", "content": "<bbox>?"}, ASKED[1]], "objects": {"bbox": [[1, 2, 3, 4]]}},
            "grounding objects are not supported: key 'objects'",
        ),
        (
            {"messages": [{"role": "user", "content": [{**text("A"), "weight": 0}]}, ASKED[1]]},
            "a part of a message kept out of the loss",
        ),
    ],
)
def test_keys_that_change_the_meaning_are_refused_by_name(record, reason):
    with pytest.raises(BadSample, match=reason):
        to_conversation(record)


def test_other_keys_are_named_once_a_source(tmp_path):
    row = {"id": 1, "license": "MIT", "rating": 5, "empty": None, "objects": {"bbox": [1]}}
    rows = [row | {"messages": [ASKED[0] | {"mood": "x"}, ASKED[1]]}, {"messages": ASKED, "prompt": "Colour?"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(tmp_path / "rows.jsonl")
    for i in range(2):
        source[i]
    assert source.not_read == {"rating": 1, "messages[].mood": 1, "prompt": 1}


# Names of columns.


def test_columns_name_the_keys_of_any_source(folder):
    import datasets

    rows = [{"img": "3.png", "q": "Colour?", "a": "Red."}]
    (folder / "rows.jsonl").write_text(json.dumps(rows[0]))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.csv").write_text("img,q,a\n3.png,Colour?,Red.\n")
    (folder / "rows.tsv").write_text("img\tq\ta\n3.png\tColour?\tRed.\n")
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        path = folder / f"rows.{suffix}"
        source = open_source(path, columns={"image": "img", "question": "q", "answer": "a"})
        assert said(source[0]) == [("user", "[3]Colour?"), ("assistant", "Red.")]
        assert source.size(0) >= len("Colour?Red.")
        with pytest.raises(UserError, match=r"columns of .* no record has the key b; there are img, q, a"):
            open_source(path, columns={"answer": "b"})
        with pytest.raises(UserError, match=r"names 'picture'; known are messages, .*image"):
            open_source(path, columns={"picture": "img"})


def test_what_a_person_chose_is_not_asked_again(folder):
    def opened(record, **columns):
        (folder / "rows.jsonl").write_text(json.dumps(record))
        return open_source(folder / "rows.jsonl", columns=columns)

    source = opened({"image": "2.png", "image_path": "3.png", "messages": ASKED}, image="image_path")
    assert (said(source[0])[0][1], source.not_read) == ("[3]Colour?", {"image": 1})
    source = opened({"chosen": ASKED, "rejected": ASKED}, messages="chosen")
    assert (said(source[0])[1][1], source.not_read) == ("Red.", {"rejected": 1})
    source = opened({"question": "A", "context": "C", "reply": "B"}, answer="reply")
    assert (said(source[0])[1][1], source.not_read) == ("B", {"context": 1})
