"""What the recipes of configs/vlm and configs/language need, by `vlm-distill plan`: the numbers in their headers.

    PYTHONPATH=.:tests/support python benchmarks/recipe_plans.py [--only NAME …] [--output FILE.csv]

The models are folders with the published shapes (config.json) and without weights; their tokenizers and processors are
the tests' tiny ones, with as many tokens, pixels and tiles as the models'. The data is not read: every row is planned
as long as data.max_length allows, with one small image. Numbers of rows (``ROWS``) are those that the authors of the
data sets name; for other recipes (``UNKNOWN``) the time is that of 1,000 steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import families
import transformers as hf
from byte_tokenizer import make_tokenizer

from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.planning import Plan, plan
from vlm_distill.reporting.plots import duration

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
#: Processes by recipe; 8 of any other.
GPUS = {"smolvlm_2_2b_256m": 1, "qwen2_72b_1_5b": 16}
#: Rows of the sources by their names in the recipes.
ROWS = {
    "chartqa": 18_265,
    "docvqa": 10_189,
    "ai2d": 2_434,
    "vqav2": 82_772,
    "textvqa": 21_953,
    "iam": 5_663,
    "llava_v1_5_mix665k": 665_298,
    "ultrachat": 207_865,
}
UNKNOWN = ("internvl2_8b_to_2b", "internvl3_8b_2b", "llm_neo", "phi3_medium_tinyllama", "qwen2_72b_1_5b")
STEPS = 1000
#: Qwen's tokenizers have no more; the embeddings of its models do, by different numbers.
QWEN_TOKENS = 151_643
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Shape = dict[str, Any]


def decoder(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> Shape:
    """Return the keys in which the decoders' configurations differ."""
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more


def tower(width: int, mlp: int, layers: int, heads: int, **more: Any) -> Shape:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | more


LANGUAGE: dict[str, tuple[str, Shape]] = {
    "TinyLlama/TinyLlama_v1.1": ("llama", decoder(2048, 5632, 22, 32, 4, 32000)),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", decoder(3072, 8192, 32, 32, 32, 32064)),
    "microsoft/Phi-3-medium-4k-instruct": ("phi3", decoder(5120, 17920, 40, 40, 10, 32064)),
    "meta-llama/Llama-2-7b-chat-hf": ("llama", decoder(4096, 11008, 32, 32, 32, 32000)),
    "EleutherAI/pythia-410m": ("gpt_neox", decoder(1024, 4096, 24, 16, 16, 50304)),
    "stabilityai/stablelm-zephyr-3b": ("stablelm", decoder(2560, 6912, 32, 32, 32, 50304)),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", decoder(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", decoder(4096, 14336, 32, 32, 8, 128256)),
    "Qwen/Qwen2-0.5B-Instruct": ("qwen2", decoder(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)),
    "Qwen/Qwen2-1.5B-Instruct": ("qwen2", decoder(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True)),
    "Qwen/Qwen2-72B-Instruct": ("qwen2", decoder(8192, 29568, 80, 64, 8, 152064)),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("llama", decoder(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True)),
}
SIGLIP = tower(1152, 4304, 27, 16, image_size=384, patch_size=14)
TOWERS = {
    "google/siglip-so400m-patch14-384": SIGLIP,
    "google/siglip-base-patch16-384": tower(768, 3072, 12, 12, image_size=384, patch_size=16),
}
INTERN = tower(1024, 4096, 24, 16, image_size=[448, 448], patch_size=[14, 14])
QWEN = {"depth": 32, "num_heads": 16, "hidden_size": 1280, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}


def qwen(text: Shape, mlp: int) -> tuple[str, Shape, Shape]:
    vision = QWEN | {"intermediate_size": mlp, "out_hidden_size": text["hidden_size"]}
    return "qwen2_5_vl", text | {"head_dim": 128, "rope_parameters": MROPE}, vision


#: Family, decoder, vision encoder.
VISION_LANGUAGE: dict[str, tuple[str, Shape, Shape]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen(decoder(2048, 11008, 36, 16, 2, 151936), 3420),
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen(decoder(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False), 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": qwen(decoder(5120, 27648, 64, 40, 8, 152064, tie_word_embeddings=False), 3456),
    "runs/qwen2_5_vl_7b_charts/student": qwen(decoder(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False), 3420),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        "llava_onevision",
        decoder(896, 4864, 24, 14, 2, 152000, tie_word_embeddings=True),
        SIGLIP | {"num_hidden_layers": 26},
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (
        "llava_onevision",
        decoder(3584, 18944, 28, 28, 4, 152128, tie_word_embeddings=False),
        SIGLIP | {"num_hidden_layers": 26},
    ),
    "OpenGVLab/InternVL2-2B": ("internvl", decoder(2048, 8192, 24, 16, 8, 92553, model_type="llama"), INTERN),
    "OpenGVLab/InternVL2-8B": ("internvl", decoder(4096, 14336, 32, 32, 8, 92553, model_type="llama"), INTERN),
    "OpenGVLab/InternVL3-2B-hf": ("internvl", decoder(1536, 8960, 28, 12, 2, 151674), INTERN),
    "OpenGVLab/InternVL3-8B-hf": ("internvl", decoder(3584, 18944, 28, 28, 4, 151674), INTERN),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": (
        "smolvlm",
        decoder(576, 1536, 30, 9, 3, 49280),
        tower(768, 3072, 12, 12, image_size=512, patch_size=16),
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": ("smolvlm", decoder(2048, 8192, 24, 32, 32, 49280), SIGLIP),
}


def set_processor(processor: Any, family: str, vision: Shape) -> dict[str, Any]:
    """Give a tiny processor the model's pixels and tiles; return what its configuration says of them."""
    images, side = processor.image_processor, vision.get("image_size")
    if family == "qwen2_5_vl":
        images.size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
        return {}
    if family == "llava_onevision":
        grid = [[side * i, side * j] for i in range(1, 7) for j in range(1, 7)]
        images.size, images.image_grid_pinpoints = {"height": side, "width": side}, grid
        processor.num_image_tokens = (side // vision["patch_size"]) ** 2
        return {"image_grid_pinpoints": grid}
    if family == "internvl":
        images.size, images.max_patches = {"height": side[0], "width": side[1]}, 12
        processor.image_seq_length = 256
        return {"image_seq_length": 256}
    scale = 3 if side == 384 else 4
    images.size, images.max_image_size = {"longest_edge": 4 * side}, {"longest_edge": side}
    processor.image_seq_len = (side // vision["patch_size"] // scale) ** 2
    return {"scale_factor": scale}


def write_vision_language(folder: Path, family: str, text: Shape, vision: Shape) -> None:
    """Write a family's configuration with these shapes, and its processor."""
    model, processor = families.Maker(make_tokenizer).build(family)
    own = set_processor(processor, family, vision)
    plain = model.config.to_dict() | own
    for part, shape in (("text_config", text), ("vision_config", vision)):
        kept = {key: value for key, value in plain[part].items() if key not in ("layer_types", "head_dim")}
        plain[part] = kept | shape
    plain["text_config"]["max_position_embeddings"] = 32768
    plain["tie_word_embeddings"] = text.get("tie_word_embeddings", family == "qwen2_5_vl")
    type(model.config).from_dict(plain).save_pretrained(folder)
    processor.save_pretrained(folder)
    fill_vocabulary(folder / "tokenizer.json", text["vocab_size"])


def write_language(folder: Path, kind: str, shape: Shape) -> None:
    config = hf.AutoConfig.for_model(kind, **shape, max_position_embeddings=4096)
    config.save_pretrained(folder)
    make_tokenizer(TEMPLATE, extra=families.EXTRA).save_pretrained(folder)
    fill_vocabulary(folder / "tokenizer.json", shape["vocab_size"])


def write_tower(folder: Path, shape: Shape) -> None:
    hf.SiglipVisionConfig(**shape, vision_use_head=False).save_pretrained(folder)
    side = shape["image_size"]
    hf.SiglipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def fill_vocabulary(file: Path, size: int) -> None:
    """Add tokens that no text has, until there are ``size``: the heads get as many columns as the models'."""
    size = min(size, QWEN_TOKENS)
    content = json.loads(file.read_text())
    known = content["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in content["added_tokens"])}
    known |= {f"unused {number}": number for number in range(size) if number not in taken}
    file.write_text(json.dumps(content))


def write_models(folder: Path) -> None:
    """Write a folder for each model, under its name on the hub."""
    for name, shapes in VISION_LANGUAGE.items():
        write_vision_language(folder / name, *shapes)
    for name, (kind, shape) in LANGUAGE.items():
        write_language(folder / name, kind, shape)
    for name, shape in TOWERS.items():
        write_tower(folder / name, shape)


def steps_of(config: RunConfig, recipe: str) -> int:
    """Return the steps of a recipe; 1,000 if the rows of its data are unknown."""
    if recipe in UNKNOWN or config.training.epochs is None:
        return config.training.steps or STEPS
    rows = 0.0
    for source in config.data.train:
        rows += source.weight * (ROWS[source.name or Path(source.path).stem] - source.skip)
    return math.ceil(config.training.epochs * rows / config.training.batch_size)


def planned(path: Path, device: str) -> dict[str, Any]:
    """Plan a recipe; return its row of the table."""
    recipe, gpus = path.stem, GPUS.get(path.stem, 8)
    steps = steps_of(load_config(path), recipe)
    config = load_config(path, [f"training.steps={steps}"])
    found: Plan = plan(config, gpus=gpus, device=device)
    memory = found.memory[found.configured]
    drawn = config.on_policy is not None
    return {
        "recipe": f"{path.parent.name}/{recipe}",
        "gpus": gpus,
        "device": device,
        "zero": memory.stage,
        "teacher": memory.placement,
        "peak_gb": round(memory.peak / 1e9, 1),
        "largest_micro_batch": memory.largest_micro_batch,
        "steps": steps,
        # The plan leaves out how long answers are drawn, which is most of the time.
        "time": "" if drawn or found.seconds is None else duration(found.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    output = options.output and options.output.resolve()
    paths = [path for kind in ("vlm", "language") for path in sorted((CONFIGS / kind).glob("*.yaml"))]
    # Their models are in this repository, or made by a study of their own.
    paths = [path for path in paths if path.stem not in ("plan_example", "smollm2_every_third")]
    rows = []
    with tempfile.TemporaryDirectory() as folder, families.num2words():
        write_models(Path(folder))
        os.chdir(folder)  # the names of models are folders here
        for path in paths:
            if not options.only or path.stem in options.only:
                rows.append(planned(path, options.device))
                print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    if output:
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
