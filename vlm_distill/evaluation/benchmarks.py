"""The table of benchmarks: the only module that knows a benchmark by name.

Names, prompts, md5 sums and places are those of VLMEvalKit (commit e8e78f0, ``vlmeval/dataset``) and lmms-eval (commit
75571cf, ``lmms_eval/tasks``); layouts of official files are those of the benchmarks' own pages.
"""

from __future__ import annotations

from typing import Any

from . import prompts
from .benchmark_entry import Benchmark, Rules
from .benchmark_layouts import HuggingFace, Join, Official, Only, Tsv
from .scoring.leaderboard import SUITE

#: Our name → the Open VLM Leaderboard's, for the benchmarks of its average.
LEADERBOARD = dict(
    zip(("mmbench", "mmstar", "mmmu", "mathvista", "ocrbench", "ai2d", "hallusionbench", "mmvet"), SUITE, strict=True)
)


# The entries. A score depends on the exact words of its prompt and on which columns are read.

_KIT = "https://opencompass.openxlab.space/utils/VLMEval/"
_KIT_BENCHMARKS = "https://opencompass.openxlab.space/utils/benchmarks/"
_MMBENCH: dict[str, Any] = {"url": f"{_KIT_BENCHMARKS}MMBench/", "columns": {"L2-category": "l2-category"}}
_CHOICE: dict[Rules, str] = {"vlmevalkit": "options", "lmms-eval": "letter"}
_CATEGORIES = ("category", "l2-category")
_VQA: dict[str, Any] = {"prompt": "short", "max_new_tokens": 16}
# The longest answers, in tokens. VLMEvalKit leaves them to each model class. lmms-eval's are its tasks' own; for a task
# that names none, 1,024, the default of most of its model classes.
_LETTER_LENGTH: dict[Rules, int] = {"vlmevalkit": 128, "lmms-eval": 16}
_LONG_LETTER_LENGTH: dict[Rules, int] = {"vlmevalkit": 128, "lmms-eval": 1024}
_WORD_LENGTH: dict[Rules, int] = {"vlmevalkit": 16, "lmms-eval": 1024, "official": 16}
_MATHVISTA = {"index": "pid", "task": "{metadata[task]}", "skills": "{metadata[skills]}"}
_COCO = "COCO_val2014_{image_id:012d}.jpg"


def _kit(name: str, md5: str | None, url: str = _KIT, **settings: Any) -> Tsv:
    return Tsv(name=name, md5=md5, url=url, **settings)


def _lmms(name: str, split: str, **settings: Any) -> HuggingFace:
    """Return one of lmms-eval's data sets, which has moved to a new owner on the hub; the old one is tried first."""
    return HuggingFace(paths=(f"lmms-lab/{name}", f"lmms-lab-encoder/{name}"), split=split, **settings)


BENCHMARKS: tuple[Benchmark, ...] = (
    # The eight of the Open VLM Leaderboard's average.
    Benchmark(
        name="mmbench",
        aliases=("mmbench_v11_dev",),
        tsv=Tsv(name="MMBench_DEV_EN_V11", md5="30c05be8f2f347a50be25aa067248184", **_MMBENCH),
        prompt={"vlmevalkit": "options", "lmms-eval": "several_options"},
        max_new_tokens=_LONG_LETTER_LENGTH,
        scorer="mmbench",
        groups=_CATEGORIES,
        together=("index",),
    ),
    Benchmark(  # its answers are hidden: predictions only
        name="mmbench_test",
        aliases=("mmbench_v11_test",),
        tsv=Tsv(name="MMBench_V11", also=("MMBench_TEST_EN_V11",), md5="b9276414f57af1308dcc4d0cd9b42e7c", **_MMBENCH),
        prompt={"vlmevalkit": "options", "lmms-eval": "several_options"},
        max_new_tokens=_LONG_LETTER_LENGTH,
        scorer="mmbench",
        groups=_CATEGORIES,
        together=("index",),
    ),
    Benchmark(
        name="mmstar",
        tsv=_kit("MMStar", "e1ecd2140806c1b1bbf54b43372efb9e", columns={"l2_category": "l2-category"}),
        huggingface=HuggingFace(paths=("Lin-Chen/MMStar",), split="val", columns={"l2-category": "l2_category"}),
        # lmms-eval's file has the options in the question, and its request no full stop.
        prompt={"vlmevalkit": "options", "lmms-eval": "{question}{options}" + prompts.LETTER.rstrip(".")},
        max_new_tokens=_LONG_LETTER_LENGTH,
        scorer="mmstar",
        groups=_CATEGORIES,
    ),
    Benchmark(
        name="mmmu",
        aliases=("mmmu_val",),
        tsv=_kit(
            "MMMU_DEV_VAL",
            "585e8ad75e73f75dcad265dfd0417d64",
            columns={"id": "{split}_{category}_{index}"},
            lists=("answer",),
        ),
        huggingface=_lmms(
            "MMMU", "validation", images=tuple(f"image_{k}" for k in range(1, 8)), columns={"index": "id"}
        ),
        where={"split": "validation"},
        prompt={"vlmevalkit": "options", "lmms-eval": "letter_or_short"},
        interleave=("vlmevalkit",),
        scorer="mmmu",
        groups=_CATEGORIES,
    ),
    Benchmark(
        name="mathvista",
        aliases=("mathvista_testmini",),
        tsv=_kit("MathVista_MINI", "f199b98e178e5a2a20e7048f5dcb0464"),
        huggingface=HuggingFace(
            paths=("AI4Math/MathVista",), split="testmini", images=("decoded_image",), columns=_MATHVISTA
        ),
        official=Official(
            files="testmini.json",
            key="pid",
            join=(Join(file="query.json", by="pid", fields=("query",)),),
            image="{image}",
            columns=_MATHVISTA,
            url="https://mathvista.github.io",
        ),
        prompt={"vlmevalkit": "question", "lmms-eval": "query"},
        max_new_tokens={"vlmevalkit": 1024, "lmms-eval": 16384},
        scorer="mathvista",
        groups=("task", "question_type"),
    ),
    Benchmark(
        name="ocrbench",
        tsv=_kit(
            "OCRBench", "e953d98a987cc6e26ef717b61260b778", columns={"question_type": "category"}, lists=("answer",)
        ),
        huggingface=HuggingFace(paths=("echo840/OCRBench",), split="test", columns={"category": "question_type"}),
        scorer="ocrbench",
        metric="right answers",
        out_of=1000,
        worth={"question": 1},
        groups=("category",),
    ),
    Benchmark(
        name="ai2d",
        aliases=("ai2d_mask",),
        tsv=_kit("AI2D_TEST", "0f593e0d1c7df9a3d69bf1f947e71975"),
        huggingface=_lmms("ai2d", "test", index_answers=True),
        prompt=_CHOICE,
        max_new_tokens=_LETTER_LENGTH,
        scorer="ai2d",
        groups=("category",),
    ),
    Benchmark(
        name="ai2d_no_mask",
        tsv=_kit("AI2D_TEST_NO_MASK", "fd8f463634d4fe9fbd23b876e8eea5be"),
        huggingface=HuggingFace(paths=("Efficient-Large-Model/ai2d-no-mask",), split="test", index_answers=True),
        prompt=_CHOICE,
        max_new_tokens=_LETTER_LENGTH,
        scorer="ai2d",
        groups=("category",),
    ),
    Benchmark(
        name="hallusionbench",
        aliases=("hallusion_bench_image",),
        tsv=_kit("HallusionBench", "0c23ac0dc9ef46832d7a24504f2a0c7c"),
        huggingface=_lmms(
            "HallusionBench",
            "image",
            columns={
                "index": "hb_{category}_{subcategory}_{set_id}_{figure_id}_{question_id}",
                "l2-category": "subcategory",
                "answer": "gt_answer",
            },
            values={"answer": {"0": "No", "1": "Yes"}},
        ),
        scorer="hallusionbench",
        metric="mean of aAcc, fAcc and qAcc",
        groups=_CATEGORIES,
        together=("index:4",),  # hb, category, subcategory and set: the questions about all figures of a set
    ),
    Benchmark(
        name="mmvet",
        tsv=_kit("MMVet", None),
        huggingface=_lmms("MMVet", "test", columns={"index": "question_id", "category": "capability"}),
        official=Official(
            files="mm-vet.json",
            key="question_id",
            image="{imagename}",
            folder="images",
            columns={"index": "question_id", "category": "capability"},
            url="https://github.com/yuweihao/MM-Vet",
        ),
        prompt={
            "vlmevalkit": "question",
            "lmms-eval": "First please perform reasoning, and think step by step to provide best answer to the "
            "following question: \n\n{question}",
            "official": "question",
        },
        max_new_tokens=1024,
        scorer="mmvet",
        metric="judged",
        groups=("category",),
    ),
    # Short answers.
    Benchmark(
        name="vqav2",
        aliases=("vqav2_val",),
        huggingface=_lmms("VQAv2", "validation", columns={"index": "question_id"}),
        official=Official(
            files="v2_OpenEnded_mscoco_val2014_questions.json",
            under="questions",
            join=(Join(file="v2_mscoco_val2014_annotations.json", under="annotations", by="question_id"),),
            image=_COCO,
            folder="val2014",
            columns={"index": "question_id"},
            url="https://visualqa.org/download.html",
        ),
        scorer="vqa",
        metric="VQA accuracy",
        groups=("answer_type", "question_type"),
        **_VQA,
    ),
    Benchmark(  # its answers are hidden: predictions only
        name="vqav2_testdev",
        aliases=("vqav2_test_dev",),
        official=Official(
            files="v2_OpenEnded_mscoco_test-dev2015_questions.json",
            under="questions",
            image="COCO_test2015_{image_id:012d}.jpg",
            folder="test2015",
            columns={"index": "question_id"},
            url="https://visualqa.org/download.html",
        ),
        scorer="vqa",
        metric="VQA accuracy",
        **_VQA,
    ),
    Benchmark(
        name="okvqa",
        aliases=("ok_vqa", "ok_vqa_val2014"),
        huggingface=_lmms("OK-VQA", "val2014", columns={"index": "question_id"}),
        official=Official(
            files="OpenEnded_mscoco_val2014_questions.json",
            under="questions",
            join=(Join(file="mscoco_val2014_annotations.json", under="annotations", by="question_id"),),
            image=_COCO,
            folder="val2014",
            columns={"index": "question_id"},
            url="https://okvqa.allenai.org/download.html",
        ),
        prompt={
            "lmms-eval": "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            + prompts.SHORT,
            "vlmevalkit": "short",
            "official": "short",
        },
        max_new_tokens=_WORD_LENGTH,
        scorer="vqa",
        metric="VQA accuracy",
        groups=("answer_type", "question_type"),
    ),
    Benchmark(
        name="gqa",
        tsv=_kit("GQA_TestDev_Balanced", "99b62f22e224d9b2f32dcbe41359d1c9"),
        huggingface=_lmms(
            "GQA",
            "testdev",
            config="testdev_balanced_instructions",
            pictures="testdev_balanced_images",
            pictures_on="imageId",
            columns={"index": "id"},
        ),
        official=Official(
            files="testdev_balanced_questions.json",
            image="{imageId}.jpg",
            folder="images",
            columns={"index": "id"},
            url="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        ),
        scorer="gqa",
        **_VQA,
    ),
    Benchmark(
        name="textvqa",
        tsv=_kit("TextVQA_VAL", "b233b31f551bbf4056f2f955da3a92cd"),
        huggingface=_lmms("textvqa", "validation", columns={"index": "question_id"}),
        official=Official(
            files="TextVQA_0.5.1_val.json",
            under="data",
            image="{image_id}.jpg",
            folder="train_images",
            columns={"index": "question_id"},
            url="https://textvqa.org/dataset",
        ),
        prompt={"vlmevalkit": "short", "lmms-eval": "short_capitalised", "official": "short"},
        max_new_tokens=_WORD_LENGTH,
        scorer="textvqa",
        metric="VQA accuracy",
    ),
    Benchmark(
        name="docvqa",
        tsv=_kit("DocVQA_VAL", "d5ee77e1926ff10690d469c56b73eabf"),
        huggingface=_lmms("DocVQA", "validation", config="DocVQA", columns={"index": "questionId"}),
        prompt="short",
        max_new_tokens={"vlmevalkit": 128, "lmms-eval": 32},
        scorer="anls",
        metric="ANLS",
    ),
    Benchmark(
        name="infovqa",
        tsv=_kit("InfoVQA_VAL", "2342e9c225222f0ef4dec545ebb126fe"),
        huggingface=_lmms("DocVQA", "validation", config="InfographicVQA", columns={"index": "questionId"}),
        prompt="short",
        max_new_tokens={"vlmevalkit": 128, "lmms-eval": 32},
        scorer="anls",
        metric="ANLS",
    ),
    Benchmark(
        name="chartqa",
        tsv=_kit(
            "ChartQA_TEST",
            "c902e0aa9be5582a7aad6dcf52734b42",
            columns={"type": "split"},
            values={"type": {"test_human": "human_test", "test_augmented": "augmented_test"}},
        ),
        huggingface=_lmms(
            "ChartQA",
            "test",
            columns={"split": "type"},
            values={"split": {"human_test": "test_human", "augmented_test": "test_augmented"}},
        ),
        prompt={"vlmevalkit": "short", "lmms-eval": "{question}\nAnswer the question with a single word."},
        max_new_tokens=16,
        scorer="chartqa",
        metric="relaxed accuracy",
        groups=("split",),
    ),
    Benchmark(
        name="ocrvqa",
        tsv=_kit("OCRVQA_TEST", "ca46a6d74b403e9d6c0b670f6fc00db9"),
        scorer="ocrvqa",
        **_VQA,
    ),
    # Yes or no.
    Benchmark(
        name="pope",
        tsv=_kit("POPE", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
        huggingface=_lmms("POPE", "test"),
        official=Official(
            files={track: f"coco_pope_{track}.json" for track in ("random", "popular", "adversarial")},
            image="{image}",
            folder="val2014",
            columns={"question": "text", "answer": "label"},
            values={"answer": {"yes": "Yes", "no": "No"}},
            url="https://github.com/AoiDragon/POPE",
        ),
        prompt={"vlmevalkit": "question", "lmms-eval": "short", "official": "question"},
        scorer="pope",
        metric="F1",
        groups=("category",),
    ),
    Benchmark(
        name="mme",
        tsv=_kit("MME", "b36b43c3f09801f5d368627fb92187c3", columns={"question_id": "image_path"}),
        huggingface=_lmms("MME", "test", columns={"image_path": "question_id"}),
        prompt={"vlmevalkit": "question", "lmms-eval": "short_yes_no"},
        max_new_tokens=16,
        scorer="mme",
        metric="perception and cognition",
        out_of=2800,
        worth={"group": 200},
        groups=("category",),
        together=("category", "image_path"),
        least=2,
    ),
    # Multiple choice.
    Benchmark(
        name="scienceqa",
        aliases=("scienceqa_img",),
        tsv=_kit("ScienceQA_TEST", "e42e9e00f9c59a80d8a5db35bc32b71f", f"{_KIT_BENCHMARKS}ScienceQA/"),
        huggingface=_lmms(
            "ScienceQA", "test", config="ScienceQA-IMG", columns={"category": "subject"}, index_answers=True
        ),
        official=Official(
            files="problems.json",
            only=Only(file="pid_splits.json", split="test"),
            required=("image",),
            image="{split}/{id}/{image}",
            folder="images",
            columns={"index": "id", "category": "subject"},
            index_answers=True,
            url="https://scienceqa.github.io",
        ),
        prompt={"vlmevalkit": "options", "lmms-eval": "{context}{question}{options}" + prompts.LETTER},
        max_new_tokens=_LETTER_LENGTH,
        scorer="scienceqa",
        groups=("category",),
    ),
    Benchmark(
        name="scienceqa_val",
        tsv=_kit("ScienceQA_VAL", "96320d05e142e585e7204e72affd29f3", f"{_KIT_BENCHMARKS}ScienceQA/"),
        prompt="options",
        scorer="choice",
        groups=("category",),
    ),
    Benchmark(
        name="seedbench",
        aliases=("seedbench_image",),
        tsv=_kit(
            "SEEDBench_IMG",
            "68017231464752261a2526d6ca3a10c0",
            f"{_KIT_BENCHMARKS}SEEDBench/",
            constants={"data_type": "image"},
        ),
        huggingface=_lmms(
            "SEED-Bench",
            "test",
            columns={"index": "question_id", **{letter: f"choice_{letter.lower()}" for letter in "ABCD"}},
        ),
        where={"data_type": "image"},
        prompt=_CHOICE,
        max_new_tokens=_LONG_LETTER_LENGTH,
        scorer="seedbench",
        groups=("category",),
    ),
    Benchmark(
        name="realworldqa",
        tsv=_kit("RealWorldQA", "4de008f55dc4fd008ca9e15321dc44b7"),
        huggingface=_lmms("RealWorldQA", "test"),
        # lmms-eval's file has options and request in the question.
        prompt={"vlmevalkit": "options", "lmms-eval": "{question}{options}"},
        max_new_tokens=_LETTER_LENGTH,
        scorer="realworldqa",
    ),
    Benchmark(
        name="mmbench_v1",
        aliases=("mmbench_en_dev",),
        tsv=Tsv(name="MMBench_DEV_EN", md5="b6caf1133a01c6bb705cf753bb527ed8", **_MMBENCH),
        huggingface=_lmms("MMBench", "dev", config="en", columns={"l2-category": "L2-category"}),
        prompt={"vlmevalkit": "options", "lmms-eval": "several_options"},
        max_new_tokens=_LONG_LETTER_LENGTH,
        scorer="mmbench",
        groups=_CATEGORIES,
        together=("index",),
    ),
    # Small, made of shapes.
    Benchmark(
        name="easy-vqa",
        official=Official(
            files="questions.json",
            fields=("question", "answer", "image_id"),
            image="{image_id}.png",
            folder="images",
            url="the Python package easy-vqa, easy_vqa/data/test in it",
        ),
        scorer="gqa",  # one right answer each, of one word
        max_new_tokens=16,
    ),
)
