"""Random tables in VLMEvalKit's layout, one for each benchmark, and random answers to them."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]

LETTERS = "ABCD"
TEXTS = ("oak", "pine", "a birch", "3.5", "12", "No", "None", "Denmark", "the red car", "left of B", "a", "É")
WORDS = (
    *("A", "B", "C", "D", "(A)", "B.", "C:", "D)", "**C**", "A,", "(C).", "a", "b", "F", "Z", "\n", "  ", ".", "!"),
    *("the answer is", "The answer is A", "answer is **D", "I choose", "Cannot determine the answer", "not"),
    *(
        "Yes",
        "yes.",
        "no",
        "No,",
        "YES",
        "maybe",
        "nan",
        "None",
        "N/A",
        "",
        "dog's",
        "dont",
        "two",
        "none",
        "an",
        "the",
    ),
    *("3.5", "1,000", "20%", "0", "$5", "-2", "1e3", "7", "12", "007", "14.0", "İ", "ß", "?", "'", '"', "A\r\n"),
)
MME_TASKS = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
    *("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"),
)
OCR_KINDS = (
    *("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition", "Handwriting Recognition"),
    *("Digit String Recognition", "Non-Semantic Text Recognition", "Scene Text-centric VQA", "Doc-oriented VQA"),
    *("Key Information Extraction", "Handwritten Mathematical Expression Recognition"),
)


def write(folder: Path, name: str, draw: random.Random, count: int) -> list[Row]:
    """Write ``{name}.tsv`` and return its rows."""
    rows = TABLES[name](draw, count)
    for number, row in enumerate(rows):
        row["index"] = row.get("index", number)
        row["image"] = _picture(number)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([columns, *([row.get(column) for column in columns] for row in rows)])
    return rows


def answers(rows: Sequence[Row], draw: random.Random) -> list[str]:
    """Return an answer to each row: right, nearly right, an option's text, or any words."""
    found = []
    for row in rows:
        right = str(row["answer"])
        near = [right, right, f"{right}.", f" {right.lower()}", f"The answer is {right}", right.strip("[]'\"")]
        near += [str(row[letter]) for letter in LETTERS if row.get(letter)]
        words = draw.choice(("", " ")).join(draw.choices(WORDS, k=draw.randint(0, 6)))
        found.append(draw.choice([*near, words, words, words]))
    # Now and then a column of nothing but numbers, which its file then holds as such.
    return [draw.choice(["7", "12", "2.5", "0"]) for _ in rows] if draw.random() < 0.1 else found


def _picture(number: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _choice(draw: random.Random, count: int) -> list[Row]:
    rows = []
    for number in range(count):
        options = draw.choices(TEXTS, k=4)
        given = {letter: text if draw.random() < 0.9 else "" for letter, text in zip(LETTERS, options, strict=True)}
        kinds = {"category": f"kind {number % 5}", "l2-category": f"group {number % 3}"}
        rows.append({"question": "Which?", **given, "answer": draw.choice(LETTERS), **kinds})
    return rows


def _split_choice(draw: random.Random, count: int) -> list[Row]:
    return [row | {"split": "test"} for row in _choice(draw, count)]


def _circular(draw: random.Random, count: int) -> list[Row]:
    rows = []
    for number, row in enumerate(_choice(draw, count // 4)):
        kinds = ("coarse_perception", "logic_reasoning", "attribute_reasoning")
        row |= {"l2-category": kinds[number % 3], "split": "dev"}
        for turn in range(4):
            turned = {letter: row[LETTERS[(place + turn) % 4]] for place, letter in enumerate(LETTERS)}
            right = LETTERS[(LETTERS.index(row["answer"]) - turn) % 4]
            rows.append({**row, **turned, "answer": right, "index": number + turn * 1_000_000})
    return rows


def _mmmu(draw: random.Random, count: int) -> list[Row]:
    rows = _choice(draw, count)
    for number, row in enumerate(rows):
        row["split"] = "validation" if number % 4 else "dev"
        if number % 7 == 0:  # an open question
            row |= dict.fromkeys(LETTERS, "") | {"answer": draw.choice(["['0.5', '1/2']", "12", "red"])}
    return rows


def _texts(lists: bool, split: Sequence[str] = ()) -> Any:
    def made(draw: random.Random, count: int) -> list[Row]:
        rows = []
        for number in range(count):
            pool = [draw.choice(WORDS).strip() or "x" for _ in range(3)]
            right = str([draw.choice(pool) for _ in range(draw.choice([1, 3, 10]))]) if lists else pool[0]
            row = {"question": "What?", "answer": right}
            rows.append(row | ({"split": split[number % len(split)]} if split else {}))
        if not lists and draw.random() < 0.3:
            rows = [row | {"answer": draw.choice(["7", "12", "2.5", "0"])} for row in rows]
        return rows

    return made


def _yes(draw: random.Random, count: int) -> list[Row]:
    kinds = ("random", "popular", "adversarial", "random,popular", "popular,adversarial")
    rows = [
        {"question": "Is it?", "answer": draw.choice(["Yes", "No"]), "category": kinds[n % 5]} for n in range(count)
    ]
    return rows


def _mme(draw: random.Random, count: int) -> list[Row]:
    return [
        {
            "question": "Is it?",
            "answer": ("Yes", "No")[n % 2],
            "category": MME_TASKS[n // 2 % 14],
            "image_path": f"{n // 2}.png",
        }
        for n in range(count // 28 * 28)
    ]


def _hallusion(draw: random.Random, count: int) -> list[Row]:
    rows = {}
    for _ in range(count):
        kind, fine = draw.choice(["VD", "VS"]), draw.choice(["figure", "chart", "map"])
        name = f"{kind}_{fine}_0_{draw.randint(0, 5)}_{draw.randint(0, 3)}_{draw.randint(0, 3)}"
        rows[name] = {
            "index": name,
            "question": "Is it?",
            "answer": draw.choice(["Yes", "No"]),
            "category": kind,
            "l2-category": fine,
        }
    return list(rows.values())


def _ocr(draw: random.Random, count: int) -> list[Row]:
    return [row | {"category": OCR_KINDS[n % 10]} for n, row in enumerate(_texts(lists=True)(draw, count))]


def _math(draw: random.Random, count: int) -> list[Row]:
    rows = []
    for number in range(count):
        row: Row = {
            "question": "How many?",
            "task": f"task {number % 4}",
            "skills": str([f"skill {number % 3}", "all"]),
        }
        if number % 3 == 0:
            choices = draw.sample(TEXTS, 4)
            place = draw.randrange(4)
            row |= {"question_type": "multi_choice", "answer_type": "text", "choices": str(choices)}
            row |= {"answer": choices[place], "answer_option": LETTERS[place]}
        else:
            kind = draw.choice(["integer", "float", "list"])
            right = {"integer": draw.randint(0, 3), "float": draw.choice([0.5, 2.5]), "list": "[1, 2]"}[kind]
            row |= {
                "question_type": "free_form",
                "answer_type": kind,
                "choices": "",
                "answer": right,
                "answer_option": "",
            }
        rows.append(row)
    return rows


def _vet(draw: random.Random, count: int) -> list[Row]:
    kinds = ("rec", "ocr,math", "rec,know,gen", "spat")
    return [{"question": "What?", "answer": "a<OR>b", "category": kinds[n % 4]} for n in range(count)]


TABLES = {
    "MMBench_DEV_EN_V11": _circular,
    "MMBench_DEV_EN": _circular,
    **dict.fromkeys(("MMStar", "AI2D_TEST", "AI2D_TEST_NO_MASK", "SEEDBench_IMG", "RealWorldQA"), _choice),
    **dict.fromkeys(("ScienceQA_TEST", "ScienceQA_VAL"), _split_choice),
    "MMMU_DEV_VAL": _mmmu,
    "TextVQA_VAL": _texts(lists=True),
    "DocVQA_VAL": _texts(lists=True),
    "InfoVQA_VAL": _texts(lists=True),
    "ChartQA_TEST": _texts(lists=True, split=("test_human", "test_augmented")),
    "OCRVQA_TEST": _texts(lists=False),
    "GQA_TestDev_Balanced": _texts(lists=False),
    "POPE": _yes,
    "MME": _mme,
    "HallusionBench": _hallusion,
    "OCRBench": _ocr,
    "MathVista_MINI": _math,
    "MMVet": _vet,
}
