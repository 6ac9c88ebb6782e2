"""Benchmarks open from small files in their published layouts, ask as the rules do, and are answered by the runner."""

import base64
import csv
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from data.tsv import TsvTable
from vlm_distill.evaluation import benchmark_layouts, benchmark_lookup
from vlm_distill.evaluation.answering import Asking, evaluate
from vlm_distill.evaluation.benchmark_entry import Benchmark, load_benchmark
from vlm_distill.evaluation.benchmark_layouts import Tsv
from vlm_distill.evaluation.benchmark_lookup import find_questions, get_benchmark
from vlm_distill.evaluation.benchmarks import BENCHMARKS
from vlm_distill.evaluation.prompts import LETTER, SHORT, ask, parts
from vlm_distill.evaluation.scoring.scorers import rules_of, score
from vlm_distill.models.answers import Answer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "scoring"
CASES = [json.loads(line) for line in (GOLDEN / "vlmevalkit__load_tsv.jsonl").read_text().splitlines()]


def png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def b64(colour="red"):
    return base64.b64encode(png(colour)).decode()


def write_tsv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")


def shown(conversation):
    """The parts of a question, images as their paths or colours."""
    images = iter(conversation.images)
    content = conversation.messages[0]["content"]
    return [part["text"] if part["type"] == "text" else _shown(next(images)) for part in content]


def _shown(image):
    return Path(image).name if isinstance(image, str) else load_image(image).getpixel((0, 0))


RED, BLUE = (255, 0, 0), (0, 0, 255)


# VLMEvalKit's prompts.


@pytest.mark.parametrize(
    "case", [case for case in CASES if "rows" in case["expected"]], ids=lambda case: Path(case["input"]["file"]).stem
)
def test_prompts_are_vlmevalkits(case):
    kind, path = case["input"]["kind"], GOLDEN / case["input"]["file"]
    prompt = {"mcq": "options", "vqa": "short", "mmmu": "options"}[kind]
    entry = Benchmark(
        name="t", tsv=Tsv(name="t"), prompt=prompt, interleave=("vlmevalkit",) if kind == "mmmu" else (), scorer="vqa"
    )
    questions = entry.questions(TsvTable(path), entry.tsv)
    for number, expected in enumerate(case["expected"]["rows"]):
        content = questions[number].messages[0]["content"]
        want = [part if part["type"] == "text" else {"type": "image"} for part in expected["prompt"]]
        assert content == [{"type": "text", "text": p["value"]} if p["type"] == "text" else p for p in want]
        assert len(questions[number].images) == sum(part["type"] == "image" for part in content)


def test_images_stand_where_the_text_says():
    text = "<image 2> or <image 1><image 2>?"
    content, images = parts(text, ["a", "b", "unused"], True)
    assert images == ("b", "a", "b")
    assert [part.get("text", "*") for part in content] == ["*", " or ", "*", "*", "?"]
    content, images = parts(text, ["a", "b"], False)
    assert ([part.get("text", "*") for part in content], images) == (["*", "*", text], ("a", "b"))
    with pytest.raises(BadSample, match="shows image 2, the row has 1"):
        parts(text, ["a"], True)


# The registry.


def test_names_are_found_and_belong_to_one_benchmark():
    owners = {}
    for entry in BENCHMARKS:
        for name in (entry.name, *entry.aliases, entry.dataset):
            assert owners.setdefault(benchmark_lookup._plain(name), entry.name) == entry.name
    assert get_benchmark("MMBench_DEV_EN_V11") is get_benchmark("mmbench-v11-dev") is get_benchmark("MMBench")
    with pytest.raises(UserError, match="did you mean 'mmstar'"):
        get_benchmark("mmstarr")
    with pytest.raises(UserError, match="did you mean 'mmstar'"):
        get_benchmark("LMUData/MMStar.tsv")
    with pytest.raises(UserError, match="there are mmbench"):
        get_benchmark("zzzz")


@pytest.mark.parametrize("entry", BENCHMARKS, ids=lambda entry: entry.name)
def test_missing_data_is_told_in_one_line(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path))
    with pytest.raises(UserError) as caught:
        find_questions(entry.name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{entry.name}: no data in {tmp_path}; put there ")
    if entry.tsv is not None:
        assert f"{entry.tsv.name}.tsv" in message


def test_published_place_and_other_layouts_are_named(tmp_path):
    with pytest.raises(UserError) as caught:
        find_questions("pope", tmp_path)
    assert str(caught.value) == (
        f"pope: no data in {tmp_path}; put there POPE.tsv "
        "(https://opencompass.openxlab.space/utils/VLMEval/POPE.tsv) or the Hugging Face data set lmms-lab/POPE or "
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json "
        "(https://github.com/AoiDragon/POPE); or name another folder (--data, evaluation.benchmark_data, $LMUData)"
    )
    with pytest.raises(UserError, match="pope does not come as source; it comes as tsv, huggingface, official"):
        find_questions("pope", tmp_path, format="source")


def test_part_of_the_official_files_is_told(tmp_path):
    write_json(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []})
    with pytest.raises(UserError, match=r"not v2_mscoco_val2014_annotations.json; put it there \(https://visualqa"):
        find_questions("vqav2", tmp_path)


# TSV.


def test_md5_is_checked_unless_the_file_has_another_name(tmp_path):
    columns = ["index", "image", "question", "A", "B"]
    write_tsv(tmp_path / "MMBench_V11.tsv", columns, [1, b64(), "q", "x", "y"])
    with pytest.warns(UserWarning, match="not the published b9276414f57af1308dcc4d0cd9b42e7c"):
        find_questions("mmbench_test", tmp_path)
    (tmp_path / "MMBench_V11.tsv").rename(tmp_path / "MMBench_TEST_EN_V11.tsv")
    questions = find_questions("mmbench_test", tmp_path)
    assert questions[0].references == []  # hidden
    assert questions[0].metadata["A"] == "x"


@pytest.mark.filterwarnings("ignore:.*md5")
def test_mmmu_asks_its_validation_rows_with_images_in_place(tmp_path):
    (tmp_path / "MMMU_DEV_VAL.tsv").write_bytes((GOLDEN / "data" / "GoldPublicMMMU.tsv").read_bytes())
    questions = find_questions("mmmu", tmp_path)
    assert [row["split"] for row in questions.rows()] == ["validation", "validation"]
    assert [type(part) for part in shown(questions[0])] == [str, tuple, str, tuple, str]
    assert (questions[0].references, questions[1].references) == (["B"], ["0.5", "1/2"])
    asked = shown(find_questions("mmmu", tmp_path, rules="lmms-eval")[0])
    assert asked[2] == f"<image 1> Compare it with <image 2> and answer.\nA. 1\nB. 2\n{LETTER}"


@pytest.mark.filterwarnings("ignore:.*md5")
def test_rules_put_one_file_differently(tmp_path):
    columns = ["index", "image", "question", "hint", "A", "B", "answer", "category", "l2-category"]
    row = [7, b64(), "Which one?", "Look.", "cat", "dog", "B", "c", "l"]
    for name in ("MMStar", "ScienceQA_TEST", "MMBench_DEV_EN_V11", "AI2D_TEST"):
        write_tsv(tmp_path / f"{name}.tsv", columns, row)
    text = "Hint: Look.\nQuestion: Which one?\nOptions:\nA. cat\nB. dog\n"
    text += "Please select the correct answer from the options above. \n"
    for name in ("mmstar", "scienceqa", "mmbench", "ai2d"):
        assert shown(find_questions(name, tmp_path)[0]) == [RED, text]
    choices = "\nA. cat\nB. dog"
    asked = {
        name: shown(find_questions(name, tmp_path, rules="lmms-eval")[0])[1]
        for name in ("mmstar", "scienceqa", "mmbench")
    }
    assert asked == {
        "mmstar": f"Which one?{choices}{LETTER.rstrip('.')}",
        "scienceqa": f"Context: Look.\nWhich one?{choices}{LETTER}",
        "mmbench": f"Look. Which one? There are several options:{choices}\n{LETTER}",
    }
    # lmms-eval's scorers take these two benchmarks' answers as numbers of options.
    row = find_questions("ai2d", tmp_path, rules="lmms-eval").row(0)
    assert (row["options"], row["answer"]) == (["cat", "dog"], 1)
    assert find_questions("ai2d", tmp_path, rules="lmms-eval")[0].references == ["B"]
    assert find_questions("mmstar", tmp_path, rules="lmms-eval").row(0)["l2_category"] == "l"


# Official JSON.


@pytest.mark.filterwarnings("ignore:.*md5")
@pytest.mark.parametrize(
    ("name", "dataset", "rules"),
    [
        ("ai2d", "AI2D_TEST", "lmms-eval"),
        ("scienceqa", "ScienceQA_TEST", "lmms-eval"),
        ("mmmu", "MMMU_DEV_VAL", "lmms-eval"),
        ("mmmu", "MMMU_DEV_VAL", "official"),
        ("realworldqa", "RealWorldQA", "lmms-eval"),
        ("mmbench", "MMBench_DEV_EN_V11", "lmms-eval"),
    ],
)
@pytest.mark.parametrize("empty", ["", "None", "NA", "null"])
def test_options_keep_their_letters_where_one_is_empty(name, dataset, rules, empty, tmp_path):
    header = ["index", "image", "question", "A", "B", "C", "D", "answer", "split", "category"]
    rows = [[0, b64(), "First?", empty, "x1", "y1", "z1", "D"], [1, b64(), "Last?", "w1", "x1", "y1", empty, "D"]]
    write_tsv(tmp_path / f"{dataset}.tsv", header, *([*row, "validation", "Art"] for row in rows))
    questions = find_questions(name, tmp_path, rules=rules)
    text = shown(questions[0])[-1]
    assert all(f"{letter}. {option}" in text for letter, option in (("B", "x1"), ("C", "y1"), ("D", "z1")))
    assert "A." not in text
    for answer, hits in (("D", [1, 1]), ("C", [0, 0])):
        table = [row | {"prediction": answer} for row in questions.rows()]
        found = score(get_benchmark(name).scorer, table, rules).rows
        # A right answer that is no option can be named all the same, but not under MMMU's rules.
        assert list(found)[: 1 if name == "mmmu" else 2] == hits[: 1 if name == "mmmu" else 2]


@pytest.mark.parametrize(
    ("name", "rules", "length"),
    [
        ("chartqa", "lmms-eval", 16),
        *((name, "lmms-eval", 32) for name in ("docvqa", "infovqa")),
        *((name, "lmms-eval", 16) for name in ("ai2d", "scienceqa", "realworldqa", "mme", "gqa", "vqav2")),
        *((name, "lmms-eval", 1024) for name in ("mmbench", "mmstar", "seedbench", "okvqa", "textvqa", "mmvet")),
        *((name, "lmms-eval", 128) for name in ("mmmu", "ocrbench", "pope", "hallusionbench")),
        ("mathvista", "lmms-eval", 16384),
        *((name, "vlmevalkit", 128) for name in ("docvqa", "ai2d", "mmbench", "pope")),
        ("textvqa", "official", 16),
    ],
)
def test_answers_are_as_long_as_each_rule_set_allows(name, rules, length):
    assert get_benchmark(name).length_for(rules) == length


def test_chartqa_asks_as_each_rule_set_does():
    assert ask(get_benchmark("chartqa").prompt_for("lmms-eval"), {"question": "How many?"}) == (
        "How many?\nAnswer the question with a single word."
    )
    assert ask(get_benchmark("chartqa").prompt_for("vlmevalkit"), {"question": "How many?"}) == f"How many?{SHORT}"


def save_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())


ANSWERS = [{"answer": "net", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
OFFICIAL = {
    "vqav2": (
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {
                "questions": [{"question_id": 9, "image_id": 42, "question": "What?"}]
            },
            "v2_mscoco_val2014_annotations.json": {
                "annotations": [
                    {"question_id": 8, "answers": []},
                    {"question_id": 9, "image_id": 42, "answer_type": "other", "answers": ANSWERS},
                ]
            },
        },
        "val2014/COCO_val2014_000000000042.jpg",
        ("What?" + SHORT, ["net"] * 10, {"index": 9, "answer_type": "other", "answers": ANSWERS}),
    ),
    "vqav2_testdev": (
        {
            "v2_OpenEnded_mscoco_test-dev2015_questions.json": {
                "questions": [{"question_id": 9, "image_id": 42, "question": "What?"}]
            }
        },
        "test2015/COCO_test2015_000000000042.jpg",
        ("What?" + SHORT, [], {"index": 9}),
    ),
    "okvqa": (
        {
            "OpenEnded_mscoco_val2014_questions.json": {
                "questions": [{"question_id": 9, "image_id": 42, "question": "What?"}]
            },
            "mscoco_val2014_annotations.json": {"annotations": [{"question_id": 9, "answers": ANSWERS}]},
        },
        "val2014/COCO_val2014_000000000042.jpg",
        ("What?" + SHORT, ["net"] * 10, {"index": 9}),
    ),
    "gqa": (
        {"testdev_balanced_questions.json": {"201": {"imageId": "n1", "question": "Is it?", "answer": "yes"}}},
        "images/n1.jpg",
        ("Is it?" + SHORT, ["yes"], {"index": "201"}),
    ),
    "textvqa": (
        {
            "TextVQA_0.5.1_val.json": {
                "data": [{"question_id": 1, "image_id": "ab", "question": "Sign?", "answers": ["stop"] * 10}]
            }
        },
        "train_images/ab.jpg",
        ("Sign?" + SHORT, ["stop"] * 10, {"index": 1}),
    ),
    "scienceqa": (
        {
            "problems.json": {
                str(i): {
                    "question": "Which?",
                    "choices": ["x", "y"],
                    "answer": 1,
                    "hint": "",
                    "image": image,
                    "subject": "s",
                    "split": "test",
                }
                for i, image in ((1, "image.png"), (2, None), (3, "image.png"))
            },
            "pid_splits.json": {"train": ["3"], "test": ["1", "2"]},
        },
        "images/test/1/image.png",
        ("Which?\nA. x\nB. y" + LETTER, ["B"], {"index": "1", "category": "s", "answer": 1}),
    ),
    "pope": (
        {
            f"coco_pope_{track}.json": json.dumps({"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "no"})
            + "\n"
            for track in ("random", "popular", "adversarial")
        },
        "val2014/a.jpg",
        ("A dog?", ["No"], {"index": 0, "category": "random", "answer": "No"}),
    ),
    "mmvet": (
        {
            "mm-vet.json": {
                "v1_0": {"imagename": "a.jpg", "question": "x?", "answer": "1<AND>2", "capability": ["ocr", "math"]}
            }
        },
        "images/a.jpg",
        ("x?", ["1<AND>2"], {"index": "v1_0", "category": ["ocr", "math"]}),
    ),
    "mathvista": (
        {
            "testmini.json": {
                "1": {
                    "question": "x?",
                    "image": "images/1.jpg",
                    "answer": "2 m",
                    "choices": ["1 m", "2 m"],
                    "question_type": "multi_choice",
                    "answer_type": "text",
                    "metadata": {"task": "geometry", "skills": ["logic"]},
                }
            },
            "query.json": {"1": "Hint: be short.\nQuestion: x?", "2": "other"},
        },
        "images/1.jpg",
        ("Hint: be short.\nQuestion: x?", ["2 m"], {"index": "1", "task": "geometry", "answer_option": "B"}),
    ),
    "easy-vqa": (
        {"questions.json": [["what shape?", "circle", 7]]},
        "images/7.png",
        ("what shape?", ["circle"], {"index": 0}),
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files(name, tmp_path):
    content, image, (text, answers, cells) = OFFICIAL[name]
    folder = tmp_path / name  # a folder of the benchmark's name is looked into as well
    for file, value in content.items():
        write_json(folder / file, value)
    save_images(folder, image)
    questions = find_questions(name, tmp_path, rules="official")
    conversation = questions[0]
    assert shown(conversation) == [Path(image).name, text]
    assert conversation.images == (str(folder / image),)
    assert load_image(conversation.images[0]).size == (2, 2)
    assert conversation.references == answers
    row = questions.row(0)
    assert {key: row[key] for key in cells} == cells
    assert len(questions) == (3 if name == "pope" else 1)
    assert questions.size(0) == len(text)
    again = find_questions(name, tmp_path, rules="official", images=tmp_path / "else")
    assert again[0].images[0].startswith(str(tmp_path / "else"))


def test_a_split_that_asks_for_a_missing_question_is_refused(tmp_path):
    write_json(tmp_path / "problems.json", {"1": {"question": "q", "image": "i"}})
    write_json(tmp_path / "pid_splits.json", {"test": ["1", "4"]})
    with pytest.raises(UserError, match=r"pid_splits.json: split 'test' asks for id 4"):
        find_questions("scienceqa", tmp_path)
    write_json(tmp_path / "pid_splits.json", {"val": ["1"]})
    with pytest.raises(UserError, match="no split 'test'; it has val"):
        find_questions("scienceqa", tmp_path)


# Hugging Face.


def save_parquet(path, rows, **features):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(path)


def picture(colour):
    return {"bytes": png(colour), "path": None}


TEXT = datasets.Value("string")


def test_a_local_copy_of_lmms_evals_data(tmp_path):
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "H", "subject": "s"}
    save_parquet(
        tmp_path / "lmms-lab" / "ScienceQA" / "ScienceQA-IMG" / "test-00000-of-00001.parquet",
        [row | {"image": picture("blue")}],
        image=datasets.Image(),
        question=TEXT,
        choices=datasets.List(TEXT),
        answer=datasets.Value("int64"),
        hint=TEXT,
        subject=TEXT,
    )
    lmms, kit = find_questions("scienceqa", tmp_path, rules="lmms-eval"), find_questions("scienceqa", tmp_path)
    assert shown(lmms[0]) == [BLUE, f"Context: H\nWhich?\nA. x\nB. y{LETTER}"]
    assert [lmms.row(0)["answer"], lmms.row(0)["choices"], kit.row(0)["answer"]] == [1, ["x", "y"], "B"]
    assert lmms[0].references == kit[0].references == ["B"]
    assert kit.row(0)["category"] == "s"


def test_gqa_finds_its_images_in_their_own_configuration(tmp_path):
    folder = tmp_path / "GQA"
    save_parquet(
        folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet",
        [{"id": "201", "imageId": "n2", "question": "Is it?", "answer": "yes"}],
        **dict.fromkeys(("id", "imageId", "question", "answer"), TEXT),
    )
    save_parquet(
        folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet",
        [{"id": "n1", "image": picture("red")}, {"id": "n2", "image": picture("blue")}],
        id=TEXT,
        image=datasets.Image(),
    )
    questions = find_questions("gqa", tmp_path, rules="lmms-eval")
    assert shown(questions[0]) == [BLUE, "Is it?" + SHORT]
    assert questions[0].metadata["index"] == "201"


def test_hallusionbench_and_seedbench_get_the_columns_that_other_rules_need(tmp_path):
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer")
    save_parquet(
        tmp_path / "HallusionBench" / "image-00000-of-00001.parquet",
        [dict(zip(names, ("VD", "math", "0", "1", "2", "q", "1"), strict=True)) | {"image": picture("red")}],
        **dict.fromkeys(names, TEXT),
        image=datasets.Image(),
    )
    row = find_questions("hallusionbench", tmp_path).row(0)
    assert (row["index"], row["answer"], row["l2-category"]) == ("hb_VD_math_0_1_2", "Yes", "math")
    options = {f"choice_{letter}": letter for letter in "abcd"}
    rows = [
        options | {"question": kind, "data_type": kind, "answer": "A", "question_id": kind}
        for kind in ("video", "image")
    ]
    save_parquet(
        tmp_path / "SEED-Bench" / "test-00000-of-00001.parquet",
        [row | {"image": [picture("red"), picture("blue")]} for row in rows],
        **dict.fromkeys(rows[0], TEXT),
        image=datasets.List(datasets.Image()),
    )
    questions = find_questions("seedbench", tmp_path)
    assert [row["index"] for row in questions.rows()] == ["image"]
    assert shown(questions[0])[:2] == [RED, BLUE]
    assert "Options:\nA. a\nB. b\n" in shown(questions[0])[2]


def test_the_hub_is_asked_only_by_name_of_the_format(tmp_path, monkeypatch):
    asked = []

    def hub(path, given, split, config):
        asked.append((given, split, config))
        if given.startswith("lmms-lab/"):
            raise UserError("no such data set")
        rows = [{"image": picture("red"), "question": "q", "answer": "Yes"}]
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    monkeypatch.setattr(benchmark_layouts, "open_dataset", hub)
    with pytest.raises(UserError, match="no data"):
        find_questions("pope", tmp_path)
    assert asked == []
    assert shown(find_questions("pope", tmp_path, rules="lmms-eval", format="huggingface")[0]) == [RED, "q" + SHORT]
    assert asked == [("lmms-lab/POPE", "test", None), ("lmms-lab-encoder/POPE", "test", None)]


# Scoring.

CHOICE = {"A": "cat", "B": "dog", "answer": "B", "category": "c", "l2-category": "l", "split": "dev"}
#: Scorer → the columns of a TSV beside index, image and question; and a right answer.
CELLS = {
    **dict.fromkeys(("mmbench", "mmstar", "ai2d", "scienceqa", "seedbench", "realworldqa", "choice"), (CHOICE, "B")),
    "mmmu": (CHOICE | {"split": "validation"}, "B"),
    "mathvista": (
        {"answer": 2, "question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None}
        | {"task": "t", "skills": "['s']"},
        "2",
    ),
    "ocrbench": ({"answer": "['two']", "category": "Regular Text Recognition"}, "two"),
    "hallusionbench": ({"answer": "Yes", "category": "VD", "l2-category": "math"}, "Yes"),
    "mmvet": ({"answer": "two", "category": "ocr,math"}, "two"),
    "textvqa": ({"answer": str(["two"] * 10)}, "two"),
    **dict.fromkeys(("gqa", "ocrvqa"), ({"answer": "two"}, "two")),
    "anls": ({"answer": "['two']"}, "two"),
    "chartqa": ({"answer": "two", "split": "test_human"}, "two"),
    "pope": ({"answer": "Yes", "category": "random"}, "Yes"),
    "mme": ({"answer": "Yes", "category": "OCR", "image_path": "a.jpg"}, "Yes"),
}
PAIRS = [(entry, rules) for entry in BENCHMARKS for rules in rules_of(entry.scorer)]


@pytest.mark.filterwarnings("ignore:.*md5")
@pytest.mark.parametrize(
    ("entry", "rules"), [pair for pair in PAIRS if pair[0].tsv], ids=lambda x: getattr(x, "name", x)
)
def test_rows_of_a_tsv_can_be_scored(entry, rules, tmp_path):
    cells, right = CELLS[entry.scorer]
    indices = ["hb_VD_math_0_0_0", "hb_VD_math_0_1_0"] if entry.name == "hallusionbench" else [5, 6]
    rows = [[index, b64(), f"q {index}?", *cells.values()] for index in indices]
    write_tsv(tmp_path / f"{entry.tsv.name}.tsv", ["index", "image", "question", *cells], *rows)
    questions = find_questions(entry.name, tmp_path, rules=rules)
    table = [row | {"prediction": right} for row in questions.rows()]
    if (entry.name, rules) in (("hallusionbench", "lmms-eval"), ("mme", "vlmevalkit")):
        # The one needs columns of lmms-eval's data set, the other questions of every task.
        with pytest.raises(UserError, match=r"no column 'subcategory'|MME is incomplete"):
            score(entry.scorer, table, rules)
        return
    best = {"ocrbench": 2.0, "mme": 200.0}.get(entry.name, 100.0)
    assert score(entry.scorer, table, rules).main == pytest.approx(best)
    other = "No" if right == "Yes" else "elephant"
    wrong = score(entry.scorer, [row | {"prediction": other} for row in table], rules)
    assert wrong.main == 0 or math.isnan(wrong.main)


@pytest.mark.parametrize(
    ("entry", "rules"), [pair for pair in PAIRS if pair[0].name in OFFICIAL], ids=lambda x: getattr(x, "name", x)
)
def test_rows_of_official_files_can_be_scored(entry, rules, tmp_path):
    content, _, (_, answers, _) = OFFICIAL[entry.name]
    for file, value in content.items():
        write_json(tmp_path / file, value)
    questions = find_questions(entry.name, tmp_path, rules=rules)
    if not answers:
        assert questions[0].references == []
        return
    right = {"1<AND>2": "1, 2", "2 m": "B" if rules == "vlmevalkit" else "2 m"}.get(answers[0], answers[0])
    scores = score(entry.scorer, [row | {"prediction": right} for row in questions.rows()], rules)
    assert scores.rows[0] == 1


# A benchmark of one's own.


def test_yaml_gives_a_length_for_each_rule_set(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("tsv: {name: X}\nscorer: choice\nmax_new_tokens: {vlmevalkit: 9, lmms-eval: 7}\n")
    assert [load_benchmark(own).length_for(rules) for rules in ("vlmevalkit", "lmms-eval", "official")] == [9, 7, 7]


def test_yaml_adds_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(
        tmp_path / "configs/benchmarks/shapes.yaml",
        'tsv: {name: Shapes}\nscorer: choice\nmax_new_tokens: 8\nprompt: "{question}{options}\\nLetter, {level}:"\n',
    )
    write_tsv(
        tmp_path / "Shapes.tsv",
        ["index", "image", "question", "A", "B", "answer", "level"],
        [1, b64(), "Q?", 1, 2, "A", "x"],
    )
    questions = find_questions("shapes", tmp_path)
    assert (questions.name, shown(questions[0])) == ("shapes", [RED, "Q?\nA. 1\nB. 2\nLetter, x:"])
    write_json(tmp_path / "own.yaml", "source: {path: rows.jsonl}\nscorer: vqa\n")
    write_json(tmp_path / "rows.jsonl", json.dumps({"question": "<image> so?", "image": "a.png", "answer": "yes"}))
    own = find_questions(str(tmp_path / "own.yaml"), tmp_path)
    assert (own.name, shown(own[0]), own[0].references) == ("own", ["a.png", " so?"], ["yes"])


def test_the_shipped_example_is_valid():
    assert load_benchmark(Path(__file__).resolve().parents[2] / "configs/benchmarks/example.yaml").name == "example"


def test_the_manuals_examples_work(tmp_path):
    manual = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text("utf-8")
    _, whole, official = (block.split("```")[0] for block in manual.split("```yaml")[:3])
    write_json(tmp_path / "a.yaml", whole)
    assert load_benchmark(tmp_path / "a.yaml").prompt == "{question}{options}\nAnswer with the letter."
    write_json(tmp_path / "b.yaml", official + "scorer: vqa")
    write_json(tmp_path / "questions.json", {"questions": [{"id": 7, "picture": "a", "text": "Q?"}]})
    write_json(tmp_path / "answers.json", [{"id": 7, "answer": "yes"}])
    question = find_questions(str(tmp_path / "b.yaml"), tmp_path)[0]
    assert (shown(question), question.references) == (["a.jpg", "Q?"], ["yes"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tsv: {name: X}\nscorer: vqa\nmax_tokens: 3", "max_tokens: unknown key; did you mean 'max_new_tokens'"),
        ("tsv: {name: X, md: 1}\nscorer: vqa", "tsv.md: unknown key; did you mean 'md5'"),
        ("tsv: {name: X}", "scorer: missing"),
        ("scorer: vqa", "name its files: one or more of tsv, huggingface, official, source"),
        ("tsv: {name: X}\nscorer: vqa\nprompt: shrt", "no prompt 'shrt'; there are question, short"),
        ("tsv: {name: X}\nscorer: vqa\nprompt: '{question'", "prompt: .*expected '}'"),
        ("tsv: {name: X}\nscorer: vqqa", "there is no scorer 'vqqa'; there are vqa"),
        ("tsv: {name: X}\nscorer: vqa\nmax_new_tokens: 0", "greater than 0"),
        ("- a", "is a mapping with keys"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_mistakes_in_yaml_are_told_in_one_line(tmp_path, text, message):
    write_json(tmp_path / "b.yaml", text)
    with pytest.raises(UserError, match=f"b.yaml: .*{message}") as caught:
        find_questions(str(tmp_path / "b.yaml"), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_template_that_asks_for_a_missing_column(tmp_path):
    write_json(tmp_path / "b.yaml", "tsv: {name: X}\nscorer: vqa\nprompt: '{question} {level}'")
    write_tsv(tmp_path / "X.tsv", ["index", "image", "question"], [1, b64(), "q"])
    with pytest.raises(UserError, match="the data have no column 'level'; they have index, question"):
        find_questions(str(tmp_path / "b.yaml"), tmp_path)[0]


# Answering.


class Eyes:
    """Answers with the letter of the option that is the image's colour."""

    def __init__(self):
        self.processor = SimpleNamespace(encode=lambda conversation, images, generation: None)

    def generate(self, prompts, *, max_new_tokens):
        names = {RED: "red", BLUE: "blue"}
        answers = []
        for conversation, images in prompts:
            row = conversation.metadata
            seen = names[images[0].getpixel((0, 0))]
            letter = next((letter for letter in "AB" if row[letter] == seen), "?")
            answers.append(Answer(text=letter, token_ids=(1,), logprobs=(math.log(0.5),)))
        return answers


@pytest.mark.filterwarnings("ignore:.*md5")
def test_the_runner_answers_a_benchmark_and_leaves_out_what_is_broken(tmp_path):
    rows = [
        [1, b64("red"), "q", "red", "blue", "A"],
        [1_000_001, "1", "q", "blue", "red", "B"],
        [2, b64("blue"), "longer?", "blue", "red", "B"],
        [3, "x" * 99, "q", "blue", "red", "A"],
    ]
    write_tsv(tmp_path / "MMStar.tsv", ["index", "image", "question", "A", "B", "answer"], *rows)
    skipped = []
    predictions = evaluate(Eyes(), find_questions("mmstar", tmp_path), Asking(batch_size=2), skipped=skipped)
    assert [(p.index, p.answer, p.exact) for p in predictions] == [(0, "A", 1.0), (1, "B", 1.0), (2, "A", 0.0)]
    assert [(problem.source, problem.reason) for problem in skipped] == [("mmstar", "image is not base64")]


def test_an_index_that_is_there_twice_is_warned_of(tmp_path):
    rows = [[7, b64(), "Is it?", "Yes", "random"], [7, b64(), "Is it not?", "No", "random"]]
    write_tsv(tmp_path / "POPE.tsv", ["index", "image", "question", "answer", "category"], *rows)
    with pytest.warns(UserWarning, match="1 values of index occur more than once, the first is 7"):
        find_questions("pope", tmp_path)
