"""Write the data and the models that characterise.py's scenarios read: nothing of the project is imported for them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30)}
SHAPES = ("rectangle", "circle", "triangle")
WORDS = "what is the color of a red circle in the image ? there is no blue triangle not present"


def write_inputs(folder: Path, tree: Path) -> None:
    """Write all of them into a folder that does not exist; the teacher is the one that ships in a checkout."""
    (folder / "images").mkdir(parents=True)
    for number in range(48):
        picture(number).save(folder / "images" / f"{number}.png")
    (folder / "images" / "5.png").write_bytes(b"not an image")
    write_rows(folder / "train.jsonl", samples(range(32)))
    write_rows(folder / "test.jsonl", samples(range(33, 45)))
    write_rows(folder / "talk.jsonl", samples(range(3, 64, 8)))
    words = WORDS.split()
    texts = [words[start % 7 : start % 7 + 4 + start % 9] for start in range(16)]
    write_rows(folder / "documents.jsonl", [{"text": " ".join(text)} for text in texts])
    for number in range(64):
        place = folder / "classes" / ("train" if number % 4 else "test") / SHAPES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(number, size=20).save(place / f"{number}.png")
    write_benchmarks(folder / "benchmarks", folder / "images")
    write_models(folder, tree)


def picture(number: int, size: int = 64) -> Image.Image:
    """Return a shape in a colour on grey; both follow from the number."""
    image = Image.new("RGB", (size, size), (200, 200, 200))
    draw, low, high = ImageDraw.Draw(image), size // 5, size * 4 // 5 - number % 7
    colour, shape = list(COLOURS.values())[number % 4], SHAPES[number % 3]
    if shape == "rectangle":
        draw.rectangle((low, low, high, high), colour)
    elif shape == "circle":
        draw.ellipse((low, low, high, high), colour)
    else:
        draw.polygon([(low, high), (high, high), (size // 2, low)], colour)
    return image


def samples(numbers: range) -> Iterator[dict[str, Any]]:
    """Yield conversations in LLaVA's layout: one in eight has no picture, one in three has two questions."""
    for number in numbers:
        colour, shape = list(COLOURS)[number % 4], SHAPES[number % 3]
        row: dict[str, Any] = {"id": str(number), "question_type": "colour"}
        if number % 8 == 3:
            turns = [("what is yellow ?", "yellow"), ("is red a color ?", "yes")]
        else:
            row["image"] = f"images/{number}.png"
            turns = [(f"<image>what color is the {shape} ?", colour), ("what shape is in the image ?", shape)]
        row["conversations"] = []
        for question, answer in turns if number % 3 == 0 else turns[:1]:
            row["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield row


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_benchmarks(folder: Path, images: Path) -> None:
    """Write benchmarks as VLMEvalKit's tables, eight questions each."""
    folder.mkdir()
    for name in ("MMStar", "Example", "POPE", "GQA_TestDev_Balanced"):
        rows = []
        for number in range(8):
            colour, shape = list(COLOURS)[number % 4], SHAPES[number % 3]
            image = base64.b64encode((images / f"{number + 8}.png").read_bytes()).decode()
            row = {"index": str(number), "image": image, "question": f"what color is the {shape} ?", "answer": colour}
            if name == "POPE":
                row |= {"question": f"is there a {shape} in the image ?", "answer": ("no", "yes")[number % 2]}
            elif name in ("MMStar", "Example"):
                row |= dict(zip("ABCD", COLOURS, strict=True)) | {"answer": "ABCD"[number % 4]}
            rows.append(row | {"category": f"kind {number % 2}", "l2_category": f"part {number % 4}"})
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        (folder / f"{name}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))


def write_models(folder: Path, tree: Path) -> None:
    """Write the demo's teacher, its tokenizer with other ids, and a language model that only Transformers knows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shutil.copytree(tree / "configs/demo/teacher", folder / "teacher")
    shutil.copytree(folder / "teacher", folder / "tokenizer", ignore=shutil.ignore_patterns("model.*", "vlm_*"))
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    special = {"<unk>", *(token["content"] for token in content["added_tokens"])}
    plain = [word for word in vocabulary if word not in special]
    content["model"]["vocab"] |= dict(zip(plain, [vocabulary[word] for word in reversed(plain)], strict=True))
    path.write_text(json.dumps(content))
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(vocab_size=len(vocabulary), num_hidden_layers=3, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "language")
