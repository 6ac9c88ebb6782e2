"""Every recipe of configs/vlm and configs/language takes two steps and an evaluation, on tiny models and data."""

import base64
import json
import math
from pathlib import Path

import families
import pandas
import pytest
import tiny
import transformers
from byte_tokenizer import make_tokenizer
from PIL import Image

from vlm_distill.caching.fill import fill
from vlm_distill.config.file import load_config, merged_config
from vlm_distill.models.lora import WithoutAdapters
from vlm_distill.trainer import Trainer

CONFIGS = Path("configs")
ROWS, HELD_OUT = 16, 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Miniatures of teacher and student by recipe: folders below the fixture's.
PAIRS = {
    "internvl2_8b_to_2b": ("internvl_student", "internvl"),
    "internvl3_8b_2b": ("internvl_student", "internvl"),
    "onevision_7b_0_5b": ("llava_onevision_student", "llava_onevision"),
    "qwen2_5_vl_7b_3b": ("qwen2_5_vl_student", "qwen2_5_vl"),
    "smolvlm_2_2b_256m": ("smolvlm_student", "smolvlm"),
    "llm_neo": ("llama_student", "llama"),
    "qwen2_72b_1_5b": ("llama_student", "llama"),
    # Students that take the teacher's tokenizer have another one of their own.
    **dict.fromkeys(["phi3_mini_tinyllama", "phi3_medium_tinyllama", "llama2_tinyllama"], ("other_student", "llama")),
    **dict.fromkeys(["stablelm_pythia", "gkd", "distillm", "distillm2"], ("other_student", "llama")),
}
ANSWERS = {"A": "red", "B": "blue", "C": "green", "D": "black", "answer": "A"}
#: A row of each benchmark that a recipe names, in VLMEvalKit's files.
BENCHMARKS = {
    "AI2D_TEST": ANSWERS,
    "MMStar": ANSWERS,
    "POPE": {"answer": "Yes"},
    "ChartQA_TEST": {"answer": "['3']", "split": "test_human"},
    "DocVQA_VAL": {"answer": "['red']"},
    "TextVQA_VAL": {"answer": str(["red"] * 10)},
    "MathVista_MINI": {
        "answer": "3",
        "answer_option": "",
        "choices": "[]",
        "question_type": "free_form",
        "answer_type": "integer",
        "precision": "",
        "task": "figure question answering",
        "skills": "['algebraic reasoning']",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, conversations with and without pictures, texts, and benchmarks' files."""
    folder = tmp_path_factory.mktemp("recipes")
    write_data(folder)
    maker = families.Maker(make_tokenizer)
    for family in ("internvl", "llava_onevision", "qwen2_5_vl", "smolvlm"):
        maker.write(family, folder / family, seed=1)
        maker.write(family, folder / f"{family}_student", seed=0)
    maker.write("qwen2_5_vl", folder / "charts", seed=2)

    # Language models, and the parts of assembled students; `other_` ones have a tokenizer of their own.
    own, other = maker.tokenizer("<image>"), make_tokenizer(TEMPLATE, extra=["<|im_start|>"])
    own.chat_template = TEMPLATE
    for name, tokenizer in (("llama", own), ("llama_student", own), ("other_student", other)):
        config = transformers.LlamaConfig(**SIZES, vocab_size=340, num_key_value_heads=1)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=42, patch_size=7)
    transformers.SiglipVisionModel(vision).save_pretrained(folder / "siglip")
    transformers.SiglipImageProcessor(size={"height": 42, "width": 42}).save_pretrained(folder / "siglip")
    return folder


def write_data(folder):
    tiny.write_data(folder / "data", rows=ROWS, size=(84, 56))
    for path in (folder / "data").glob("*.png"):
        Image.effect_noise((84, 56), 90).convert("RGB").save(path)  # so that a blur changes something
    tiny.write_text(folder / "text", ROWS)
    tiny.write_data(folder / "talks", ROWS, text_only=tuple(range(ROWS)))
    image = base64.b64encode((folder / "data" / "0.png").read_bytes()).decode()
    (folder / "LMUData").mkdir()
    for name, row in BENCHMARKS.items():
        cells = {"index": 0, "image": image, "question": "what?", "category": "c", "l2_category": "l", **row}
        pandas.DataFrame([cells]).to_csv(folder / "LMUData" / f"{name}.tsv", sep="\t", index=False)


def sources(folder, path):
    """Overrides that put tiny data in place of a recipe's, with as many sources; what is held out stays apart."""
    data, words = merged_config(path)["data"], []
    for part in ("train", "eval"):
        for number, source in enumerate(data[part]):
            key = f"data.{part}.{number}"
            file = "data" if path.parent.name == "vlm" else "talks"
            tiny_one = "text/text.jsonl" if source.get("format") == "text" else f"{file}/data.jsonl"
            words.append(f"{key}.path={folder / tiny_one}")
            words += [f"{key}.{name}=null" for name in ("config", "split", "images") if name in source]
            words += [f"{key}.{name}={HELD_OUT}" for name in ("skip", "limit") if name in source]
    return words


def shrunk(folder, path, *more):
    """The recipe with tiny models, data and sizes; everything else is its own."""
    student, teacher = PAIRS.get(path.stem, (None, None))
    words = [f"student.path={folder / student}", f"teacher.path={folder / teacher}"] if student else []
    if merged_config(path).get("on_policy"):
        words.append("on_policy.max_new_tokens=4")
    return load_config(
        path,
        [
            *words,
            *sources(folder, path),
            *("data.max_length=512", "data.workers=0", "data.roots=[]"),
            *("training.steps=2", "training.batch_size=4", "training.micro_batch_size=2", "training.device=cpu"),
            *("evaluation.every=2", "evaluation.max_new_tokens=4", f"evaluation.benchmark_data={folder / 'LMUData'}"),
            f"output={folder / 'runs' / path.stem}",
            *more,
        ],
    )


def trained(config, processes):
    """Train; return the run and its steps' metrics, after looking at them and at the evaluation."""
    run = Trainer(config, processes)
    run.run()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    evaluated = {line["data"]: line for line in lines if line["kind"] == "eval"}
    assert len(evaluated) == len(config.data.eval) + len(config.evaluation.benchmarks) > 0
    for source in config.data.eval:
        values = evaluated[source.name or Path(source.path).stem]
        assert values["n"] == (source.limit or ROWS)
        assert all(math.isfinite(values[name]) for name in config.evaluation.measures)
    assert all(evaluated[name]["score"] >= 0 for name in config.evaluation.benchmarks)
    return run, steps


RECIPES = [path for kind in ("vlm", "language") for path in sorted((CONFIGS / kind).glob("*.yaml"))]
#: Tried by tests of their own below; `plan_example` has shapes alone.
OTHERS = {"self_distillation", "privileged_on_policy", "visual_advantage", "two_teachers", "plan_example"}
#: What else is the miniatures' own.
MORE = {
    "onevision_to_composed": ("student.decoder.name=F/llama", "student.vision_encoder.name=F/siglip"),
    "qwen2_5_vl_to_composed": ("student.decoder.name=F/other_student", "student.vision_encoder.name=F/siglip"),
    "smollm2_every_third": ("student.from_teacher.layers=[0]", "teacher.path=F/llama"),
}
MORE["onevision_to_composed"] += ("teacher.path=F/llava_onevision",)
MORE["qwen2_5_vl_to_composed"] += ("teacher.path=F/qwen2_5_vl",)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in OTHERS], ids=lambda path: path.stem)
def test_a_recipe_trains_and_is_evaluated(folder, processes, path):
    more = [word.replace("=F", f"={folder}") for word in MORE.get(path.stem, ())]
    with families.num2words():
        trained(shrunk(folder, path, *more), processes)


def of_qwen(folder, recipe, *more):
    return shrunk(folder, CONFIGS / f"vlm/{recipe}.yaml", f"student.path={folder / 'qwen2_5_vl_student'}", *more)


def test_a_moving_average_that_sees_the_answer(folder, processes):
    run, found = trained(of_qwen(folder, "self_distillation"), processes)
    assert run.teacher.ema == 0.999
    # The answers in the question make the copy another teacher than the student is to itself.
    assert all(line["forward_kl/loss"] > 0 for line in found)


def test_own_answers_judged_by_a_base_that_sees_answer_and_full_images(folder, processes):
    run, found = trained(of_qwen(folder, "privileged_on_policy", "student.image={max_pixels: 784}"), processes)
    assert all(line["on_policy/step"] == 1 and line["reverse_kl/loss"] > 0 for line in found)
    assert isinstance(run.teacher.model, WithoutAdapters)
    student, teacher = run.student.processor, run.teacher.processor
    picture = Image.new("RGB", (200, 200))
    assert len(student.image_row([picture]).input_ids) < len(teacher.image_row([picture]).input_ids)


def test_own_answers_weighed_by_what_their_images_tell(folder, processes):
    _, found = trained(of_qwen(folder, "visual_advantage", f"teacher.path={folder / 'qwen2_5_vl'}"), processes)
    assert all(line["on_policy/visual_advantage"] != 0 for line in found)


def test_two_teachers_one_of_them_cached(folder, processes):
    paths = {"general": "qwen2_5_vl", "charts": "charts"}
    config = of_qwen(
        folder,
        "two_teachers",
        *(f"teachers.{name}.path={folder / path}" for name, path in paths.items()),
        f"teachers.charts.cache.folder={folder / 'cache'}",
        "teachers.general.placement=replicate",
    )
    fill(config, processes)
    _, found = trained(config, processes)
    shares = [line["teacher/general/share"] + line["teacher/general+charts/share"] for line in found]
    assert shares == pytest.approx([1, 1])
