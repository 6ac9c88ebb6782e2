"""The demo: distil a VLM on easy-VQA, compare with training on few labels, score both and write a report.

``python -m vlm_distill.demo FOLDER`` only writes the data: easy-VQA as ``train.jsonl``, ``unlabelled.jsonl`` and
``test.jsonl`` in LLaVA's layout, and a tokenizer of whole words.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.errors import UserError
from data.opening import open_source
from vlm_distill.config import shipped
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import launch

if TYPE_CHECKING:
    from vlm_distill.evaluation.predictions import Prediction

_COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}
# The number of labels is that in configs/demo/cross_entropy.yaml.
_TAID, _CROSS_ENTROPY = "TAID, no labels", "cross-entropy, 500 labels"
_RUNS = {_TAID: "taid", _CROSS_ENTROPY: "cross_entropy"}
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(out: Path, nproc: int) -> None:
    """Distil the demo's student by TAID, train it again on few labels, score both, and write the report.

    Args:
        out: folder for data, runs, the exported student and the report.
        nproc: number of ranks.

    Raises:
        UserError: the package ``easy-vqa`` is not installed.
    """
    from vlm_distill.evaluation.predictions import read_predictions
    from vlm_distill.evaluation.question_only import question_only_baseline
    from vlm_distill.evaluation.source_scores import summarise
    from vlm_distill.export import export_student
    from vlm_distill.reporting.report import write_report

    console = plain_console(stderr=True)
    console.print("1/4 writing easy-VQA: 5,000 pictures, 48,248 questions")
    data = prepare(out / "data")
    for number, (label, name) in enumerate(_RUNS.items(), start=2):
        console.print(f"{number}/4 training a student by {label}, on {nproc} rank(s)")
        _train(name, out / name, data, nproc)

    console.print("4/4 scoring, exporting, writing the report")
    baseline = question_only_baseline(open_source(str(data / "train.jsonl")), open_source(str(data / "test.jsonl")))
    evaluated = {label: out / name / "evaluation" / "test" for label, name in _RUNS.items()}
    answers = {label: read_predictions(folder / "student" / "predictions.jsonl") for label, folder in evaluated.items()}
    answers["the teacher"] = read_predictions(evaluated[_TAID] / "teacher" / "predictions.jsonl")
    answers["the question alone"] = baseline
    _print_scores(answers, console)
    student = export_student(out / "taid", out / "student")
    page = write_report(
        {label: out / name for label, name in _RUNS.items()},
        out / "report.html",
        title="easy-VQA: a student distilled by TAID without labels, and one trained on 500 labels",
        baselines={"the question alone": summarise(baseline)},
    )
    picture = answers[_TAID][0].image
    # The last line is a command to copy: it must not be broken.
    told = f"student: {student}\nreport:  {page}\nnow try: vlm-distill ask {student} {picture} 'what shape is present?'"
    console.print(told, soft_wrap=True)


def _train(name: str, out: Path, data: Path, nproc: int) -> None:
    """Run one of the demo's configurations on the demo's data; a failure ends the demo."""
    configs = shipped.FOLDER / "demo"
    overrides = [
        f"student.tokenizer={configs / 'teacher'}",
        f"data.train.0.path={data / ('unlabelled.jsonl' if name == 'taid' else 'train.jsonl')}",
        f"data.eval.0.path={data / 'test.jsonl'}",
        f"output={out}",
    ]
    if name == "taid":
        overrides.append(f"teacher.path={configs / 'teacher'}")
    code = launch("vlm_distill.train", [str(configs / f"{name}.yaml"), *overrides], nproc)
    if code:
        raise SystemExit(code)


def _print_scores(answers: Mapping[str, list[Prediction]], console: Console) -> None:
    from vlm_distill.evaluation.compare import paired
    from vlm_distill.evaluation.source_scores import summarise

    table = Table("", "right answers", title="easy-VQA, test split", title_justify="left")
    for label, predictions in answers.items():
        table.add_row(label, f"{summarise(predictions)['exact']:.2%}")
    console.print(table)
    duel = paired(answers[_TAID], answers[_CROSS_ENTROPY])
    console.print(
        f"TAID − cross-entropy: {100 * duel.difference:+.2f} points "
        f"(95 % interval {100 * duel.low:+.2f} to {100 * duel.high:+.2f}, paired, by picture)"
    )


def prepare(folder: Path) -> Path:
    """Write easy-VQA as LLaVA-style JSONL and a tokenizer of whole words, and return ``folder``.

    Training samples are ordered by image in a fixed shuffle, so that a ``limit`` on the source keeps few pictures with
    all their questions: the setting with few labels. ``unlabelled.jsonl`` has the same samples with all possible
    answers in turn, whatever the question. A loss that learns from the teacher alone uses the teacher's distribution
    at the answer's position, never the answer itself, and then learns to end.

    Args:
        folder: created if missing.

    Raises:
        UserError: the package ``easy-vqa`` is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise UserError("demo: needs the package easy-vqa; install vlm-distill[demo]") from None
    folder.mkdir(parents=True, exist_ok=True)
    words: set[str] = set()
    train = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    splits = {
        "train": train,
        "unlabelled": train,
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    for name, ((questions, answers, image_ids), images) in splits.items():
        by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in zip(questions, answers, image_ids, strict=True):
            by_image[image].append((question, answer))
            words.update(_words(question), _words(answer))
        placeholders = itertools.cycle(sorted(set(answers)))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            # Multiplying by a number coprime to the count is a shuffle without a random generator.
            order = sorted(by_image, key=lambda image: image * 7919 % len(by_image))
            for image in order:
                for number, (question, answer) in enumerate(by_image[image]):
                    row = {
                        "id": f"{name}-{image}-{number}",
                        "image": str(Path(images[image]).resolve()),
                        "question_type": _question_type(answer),
                        "conversations": [
                            {"from": "human", "value": f"<image>{question}"},
                            {"from": "gpt", "value": next(placeholders) if name == "unlabelled" else answer},
                        ],
                    }
                    file.write(json.dumps(row) + "\n")
    make_tokenizer(sorted(words)).save_pretrained(folder / "tokenizer")
    return folder


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words and punctuation, with a chat template of two special tokens."""
    special = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"user_token": "<user>", "assistant_token": "<assistant>"},
        chat_template=_TEMPLATE,
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _question_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if answer in _COLOURS else "shape"


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/data")))
