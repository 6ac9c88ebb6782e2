"""Models and data small enough for a test: coloured squares, a question about the colour, a teacher, a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlm_distill import models
from vlm_distill.demo import make_tokenizer

COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Pieces of two tokenizers that cut the colours in different places: re·d and r·ed, gr·een and gree·n.
PIECES = {
    "student": ["re", "gr", "een", "bl", "ue", "black", "what", "color"],
    "teacher": ["ed", "gree", "blue", "bl", "ack", "wh", "at", "col", "or"],
}
#: Metrics that differ from one run to the next.
TIMES = {
    "seconds",
    "waiting",
    "tokens_per_second",
    "images_per_second",
    "answers_per_second",
    "flops_per_second",
    "peak_bytes",
    "on_policy/time",
}
WORDS = ["what", "color", "is", "it", "say", "no", "yes", "?", *COLOURS]


def settings(width: int = 16, layers: int = 2, tied: bool = False) -> dict[str, Any]:
    """A composed model's sections: a ViT of two layers, an mlp, a Llama decoder."""
    return {
        "vision_encoder": {
            "source": "timm",
            "name": "vit_tiny_patch16_224",
            "config": {"patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2},
            "image_size": 16,
        },
        "projector": {"type": "mlp"},
        "decoder": {
            "config": {
                "model_type": "llama",
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
                "tie_word_embeddings": tied,
            }
        },
    }


def write_data(
    folder: Path,
    rows: int = 24,
    text_only: tuple[int, ...] = (),
    broken: tuple[int, ...] = (),
    size: tuple[int, int] = (20, 16),
) -> Path:
    """LLaVA-style JSONL with one picture a row; some rows without a picture, some with a picture that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        colour = list(COLOURS)[i % len(COLOURS)]
        row: dict[str, Any] = {"id": str(i), "question_type": "colour"}
        if i in text_only:
            row["conversations"] = [{"from": "human", "value": f"say {colour}"}, {"from": "gpt", "value": colour}]
        else:
            image = folder / f"{i}.png"
            Image.new("RGB", size, COLOURS[colour]).save(image)
            if i in broken:
                image.write_bytes(b"not an image")
            row["image"] = image.name
            row["conversations"] = [
                {"from": "human", "value": "<image>what color is it?"},
                {"from": "gpt", "value": colour},
            ]
        lines.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def write_text(folder: Path, documents: int = 16) -> Path:
    """JSONL of plain text: documents of one to fifteen words."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1 + i % 15)) for i in range(1, documents + 1)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "text.jsonl"


def write_teacher(folder: Path) -> Path:
    """An untrained teacher whose logits are far from flat."""
    torch.manual_seed(7)
    model = models.build_vlm(settings(width=24, layers=3), tokenizer=make_tokenizer(WORDS))
    _sharpen(model.decoder)
    model.save_pretrained(folder)
    return folder


def write_student(folder: Path) -> Path:
    """An untrained student with a vision encoder of its own."""
    torch.manual_seed(8)
    models.build_vlm(settings(), tokenizer=make_tokenizer(WORDS)).save_pretrained(folder)
    return folder


def pieces_tokenizer(who: str) -> Any:
    """Letters and the pieces of ``PIECES[who]``, the longest first; ids differ between the two."""
    tokenizer = make_tokenizer([*PIECES[who], *sorted({letter for word in WORDS for letter in word})])
    model = tokenizer_models.WordPiece(tokenizer.get_vocab(), unk_token="<unk>", continuing_subword_prefix="")
    tokenizer.backend_tokenizer.model = model
    return tokenizer


def write_pieces_teacher(folder: Path) -> Path:
    """An untrained teacher with a tokenizer of its own, and beside it in ``student`` that of its students."""
    torch.manual_seed(9)
    model = models.build_vlm(settings(width=24, layers=3), tokenizer=pieces_tokenizer("teacher"))
    _sharpen(model.decoder)
    model.save_pretrained(folder)
    pieces_tokenizer("student").save_pretrained(folder / "student")
    return folder


def write_language_model(folder: Path) -> Path:
    """An untrained teacher that reads text alone."""
    torch.manual_seed(8)
    model = models.build_vlm({"decoder": settings(width=24)["decoder"]}, tokenizer=make_tokenizer(WORDS))
    _sharpen(model.decoder)
    model.save_pretrained(folder)
    return folder


def write_llava(folder: Path, layers: int, size: int = 16) -> Path:
    """Transformers' own LLaVA with a CLIP tower, untrained, of which the last but one layer is used."""
    torch.manual_seed(layers)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token = "<image>"
    tokenizer.chat_template = TEMPLATE
    width = {"hidden_size": size, "intermediate_size": 3 * size // 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**width, num_hidden_layers=3, image_size=28, patch_size=7),
            text_config=LlamaConfig(**width, num_hidden_layers=layers, num_key_value_heads=1, vocab_size=32),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
        )
    )
    _sharpen(model.model.language_model)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def _sharpen(decoder: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)


def config(folder: Path, data: Path, teacher: Path | None, **changes: Any) -> dict[str, Any]:
    """A run's configuration as plain data; ``changes`` are ``section__key=value``."""
    plain: dict[str, Any] = {
        "student": settings(),
        "loss": [{"name": "taid", "t_start": 0.4}, {"name": "cross_entropy", "weight": 0.5}],
        "data": {"train": [{"path": str(data)}], "workers": 0, "max_length": 64},
        "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup": 0.2},
        "training": {"steps": 5, "batch_size": 8, "micro_batch_size": 2, "device": "cpu"},
        "deepspeed": {"stage": 0},
        "evaluation": {"batch_size": 8, "max_new_tokens": 4},
        "output": str(folder),
    }
    if teacher is None:
        plain["student"]["tokenizer"] = str(data.parent / "tokenizer")
        plain["loss"] = [{"name": "cross_entropy"}]
        make_tokenizer(WORDS).save_pretrained(data.parent / "tokenizer")
    else:
        plain["teacher"] = {"path": str(teacher)}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            plain[section][key] = value
        else:
            plain[section] = value
    return plain
