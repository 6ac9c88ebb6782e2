"""The demo's data and tokenizer: easy-VQA written in the ordinary formats, so that the demo goes the way of any run.

``python -m vlm_distill.demo FOLDER`` writes ``train.jsonl``, ``test.jsonl`` and ``tokenizer/``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.errors import UserError

_COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prepare(folder: Path) -> Path:
    """Writes easy-VQA as LLaVA-style JSONL, and a tokenizer of whole words.

    The training rows are ordered by image in a fixed shuffle, so that the first rows are few pictures with all their
    questions: ``limit`` on the source makes the setting with few labels.

    Args:
        folder: made if need be.

    Returns:
        ``folder``.

    Raises:
        UserError: the package ``easy-vqa`` is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise UserError("demo: its data is the package easy-vqa; install vlm-distill[demo]") from None
    folder.mkdir(parents=True, exist_ok=True)
    words: set[str] = set()
    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    for name, ((questions, answers, image_ids), images) in splits.items():
        by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, image in zip(questions, answers, image_ids, strict=True):
            by_image[image].append((question, answer))
            words.update(_words(question), _words(answer))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            # Multiplication by a number prime to the count is a shuffle that needs no generator.
            order = sorted(by_image, key=lambda image: image * 7919 % len(by_image))
            for image in order:
                for number, (question, answer) in enumerate(by_image[image]):
                    row = {
                        "id": f"{name}-{image}-{number}",
                        "image": str(Path(images[image]).resolve()),
                        "question_type": _question_type(answer),
                        "conversations": [
                            {"from": "human", "value": f"<image>{question}"},
                            {"from": "gpt", "value": answer},
                        ],
                    }
                    file.write(json.dumps(row) + "\n")
    make_tokenizer(sorted(words)).save_pretrained(folder / "tokenizer")
    return folder


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and punctuation, with a chat template of two special tokens."""
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
