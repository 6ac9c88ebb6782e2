"""Tables: VLMEvalKit's TSV against its golden cases, official JSON, Hugging Face; errors say what is broken."""

import base64
import csv
import hashlib
import io
import json
import pickle
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from data.json_tables import Records, join_rows, json_table, read_records
from data.opening import open_source
from data.tables import HuggingFaceTable, Selection, SourceTable
from data.tsv import TsvTable

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "scoring"
CASES = [json.loads(line) for line in (GOLDEN / "vlmevalkit__load_tsv.jsonl").read_text().splitlines()]


def png(colour="red", size=(3, 2)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def b64(colour="red"):
    return base64.b64encode(png(colour)).decode()


def write_tsv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return path


def colour(source):
    return load_image(source).getpixel((0, 0))


# The TSV.


@pytest.mark.parametrize("case", CASES, ids=lambda case: Path(case["input"]["file"]).stem)
def test_tsv_is_read_as_vlmevalkit_reads_it(case):
    path, want = GOLDEN / case["input"]["file"], case["expected"]
    if "error" in want:
        with pytest.raises(UserError, match=r"row 2 \(line 3\).*'9', there is none"):
            TsvTable(path)
        return
    table = TsvTable(path)
    assert (len(table), list(table.columns)) == (want["n_rows"], want["columns"])
    for number, expected in enumerate(want["rows"]):
        row = table[number]
        cells = {key: expected[key] for key in expected if key not in ("image_is_list", "choices", "prompt", "images")}
        assert row == cells
        assert [type(cell) for cell in row.values()] == [type(cells[key]) for key in row]
        if want["meta_only"]:
            paths = [part["value"] for part in expected["prompt"] if part["type"] == "image"]
            assert table.images(number) == [str(path.parent / name) for name in paths]
            continue
        images = [load_image(image, alpha="drop") for image in table.images(number)]
        assert [list(image.size) for image in images] == [image["size"] for image in expected["images"]]
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        assert hashes == [image["sha256_of_rgb_bytes"] for image in expected["images"]]


def test_tsv_cells_with_tabs_lines_quotes_and_long_images(tmp_path):
    big = base64.b64encode(png() + bytes(200_000)).decode()  # over the limit of 131,072 that csv sets itself
    path = write_tsv(
        tmp_path / "t.tsv",
        ["index", "image", "question"],
        [1, b64("red"), 'tab\there, "quoted"\nand a line'],
        [2, big, "größer\r\n日本"],
        [3, "1", "pointer"],
    )
    table = TsvTable(path)
    assert [table[i]["question"] for i in range(3)] == ['tab\there, "quoted"\nand a line', "größer\r\n日本", "pointer"]
    assert colour(table.images(2)[0]) == (255, 0, 0)
    assert table.images(1)[0].startswith(png())
    assert [table.line(i) for i in range(3)] == [2, 4, 6]
    again = pickle.loads(pickle.dumps(table))
    assert again.images(0) == table.images(0)
    assert [len(Selection(table, [2, 0])), Selection(table, [2, 0])[0]["index"]] == [2, 3]


def test_tsv_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(f"\ufeffindex\timage\tquestion\r\n1\t{b64('blue')}\tq\r\n".encode())
    table = TsvTable(path)
    assert table[0] == {"index": 1, "question": "q"}
    assert colour(table.images(0)[0]) == (0, 0, 255)


def test_tsv_md5(tmp_path, recwarn):
    path = write_tsv(tmp_path / "t.tsv", ["index", "image", "question"], [1, b64(), "q"])
    TsvTable(path, md5=hashlib.md5(path.read_bytes()).hexdigest())
    assert not recwarn
    with pytest.warns(UserWarning, match="not the published 0123"):
        TsvTable(path, md5="0123")


def test_a_bad_image_leaves_the_other_rows_good(tmp_path):
    rows = [[1, b64(), "q"], [2, "!" * 100, "q"], [3, "['" + "a" * 80, "q"], [4, "['" + "a" * 80 + ", ]", "q"]]
    text = base64.b64encode(b"no picture at all, " * 5).decode()
    table = TsvTable(write_tsv(tmp_path / "t.tsv", ["index", "image", "question"], *rows, [5, text, "q"]))
    assert colour(table.images(0)[0]) == (255, 0, 0)
    for row, reason in ((1, "image is not base64"), (2, "image is not base64"), (3, "list of images is broken")):
        with pytest.raises(BadSample, match=reason):
            table.images(row)
    with pytest.raises(BadSample, match="not an image"):
        load_image(table.images(4)[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column index and no column question and no column image or image_path.*empty"),
        (b"index\tquestion\n1\tq\n", "no column image or image_path; its columns: index, question"),
        (b"index\timage_path\tquestion\n", "has no rows"),
        (b"index\timage_path\tquestion\n1\ta.png\tq\n2\ta.p", r"row 2 \(line 3\) has 2 of 3 columns.*truncated"),
        (b"index\timage_path\tquestion\n1\ta.png\tq\tx\n", r"row 1 \(line 2\) has 4 of 3"),
        (b'index\timage_path\tquestion\n1\ta.png\tq\n2\ta.png\t"q\n3', "row 2: a quotation mark is never closed"),
        (b"index\timage_path\tquestion\n1\ta.png\tq\n2\ta.png\t\xff\n", r"row 2 \(line 3\): not UTF-8"),
        (b"index\timage\tquestion\n1\t2\tq\n2\t1\tq\n", r"row 1 \(line 2\): its image is that of row index '2', which"),
    ],
)
def test_a_broken_tsv_is_refused_with_file_and_row(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"t.tsv.*{message}") as caught:
        TsvTable(path)
    assert "\n" not in str(caught.value)


# Official JSON.


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def test_questions_find_their_annotations_by_id_not_by_place(tmp_path):
    questions = write_json(tmp_path / "q.json", {"questions": [{"question_id": i, "image_id": i} for i in (1, 2)]})
    annotations = write_json(
        tmp_path / "a.json", {"annotations": [{"question_id": i, "answers": [str(i)]} for i in (3, 2, 1)]}
    )
    asked, answered = read_records(Records(questions, "questions")), read_records(Records(annotations, "annotations"))
    rows = join_rows(asked, "question_id", answered, files=(questions, annotations))
    assert [row["answers"] for row in rows] == [["1"], ["2"]]
    table = json_table("vqa", rows, [questions], tmp_path, "val/COCO_{image_id:012d}.jpg")
    assert table.images(1) == [str(tmp_path / "val" / "COCO_000000000002.jpg")]
    with pytest.raises(UserError, match=r"q.json, record 1: .*a.json has no question_id 1"):
        join_rows(asked, "question_id", answered[:2], files=(questions, annotations))
    with pytest.raises(UserError, match=r"record 1 has no key 'id'"):
        json_table("vqa", rows, [questions], tmp_path, "{id}.jpg")


def test_records_in_every_layout(tmp_path):
    rows = [{"id": "a", "x": 1}, {"id": "b", "x": 2}]
    lines = tmp_path / "lines.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_records(Records(lines)) == rows
    assert read_records(Records(write_json(tmp_path / "list.json", rows))) == rows
    assert read_records(Records(write_json(tmp_path / "ids.json", {r["id"]: {"x": r["x"]} for r in rows}))) == rows
    lists = write_json(tmp_path / "lists.json", [["a", 1], ["b", 2]])
    assert read_records(Records(lists, fields=("id", "x"))) == rows
    texts = write_json(tmp_path / "texts.json", {"a": 1, "b": 2})
    assert read_records(Records(texts, fields=("x",))) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"b', "not valid JSON.*line 2"),
        ('{"questions": [', "not valid JSON"),
        ('{"other": []}', "nothing under 'questions' .keys other"),
        ('{"questions": 3}', "holds a int, not a list of records"),
        ('{"questions": [3]}', "record 1: not an object but 3"),
    ],
)
def test_broken_json_is_refused(tmp_path, content, message):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"q.json.*{message}"):
        read_records(Records(path, "questions"))


def test_an_empty_image_cell_is_a_row_without_image(tmp_path):
    table = json_table("t", [{"image": None, "id": 1}, {"image": "a.png", "id": 2}], [], tmp_path, "{id}/{image}")
    assert [table.images(0), table.images(1)] == [[], [str(tmp_path / "2/a.png")]]


# Hugging Face and our own sources.


def test_hugging_face_rows_with_their_images_still_encoded():
    features = datasets.Features({"q": datasets.Value("string"), "image": datasets.Image(), "more": datasets.Image()})
    rows = [{"q": "1", "image": {"bytes": png("red"), "path": None}, "more": None}] * 2
    table = HuggingFaceTable(datasets.Dataset.from_list(rows, features), "t", ["image", "more"], given="t")
    assert (len(table), table[1], table.images(1)) == (2, {"q": "1"}, [png("red")])
    with pytest.raises(UserError, match=r"no image column \(picture\); its columns: q, image, more"):
        HuggingFaceTable(datasets.Dataset.from_list(rows, features), "t", ["picture"], given="t")


def test_hugging_face_images_in_a_data_set_of_their_own():
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    pictures = datasets.Dataset.from_list(
        [{"id": name, "image": {"bytes": png(name), "path": None}} for name in ("red", "blue")], features
    )
    asked = datasets.Dataset.from_list([{"imageId": "blue"}, {"imageId": "green"}])
    table = HuggingFaceTable(asked, "t", ["image"], pictures=pictures, pictures_on="imageId", given="t")
    assert table.images(0) == [png("blue")]
    with pytest.raises(BadSample, match="no picture green"):
        table.images(1)


def test_any_source_is_a_table(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "question": "Q?", "answers": ["b", "b"]}))
    table = SourceTable(open_source(tmp_path / "x.jsonl"))
    assert table[0] == {"index": 0, "question": "Q?", "answers": ["b", "b"]}
    assert table.images(0) == [str(tmp_path / "a.png")]
