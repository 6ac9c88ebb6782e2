"""Commands around answers: eval, score, compare, ask."""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data.errors import UserError
from vlm_distill.evaluation.scoring.scores import Rules
from vlm_distill.runtime.gpus import process_count
from vlm_distill.runtime.launch import launch

from .options import Processes, expanded, mapping, positive_rate, renaming, video_sampling, words_of

_MODEL = "Folder or name of a model, or a run's folder."
_Mapping = partial(typer.Option, parser=mapping, metavar="MAPPING")
TemplateArguments = Annotated[
    dict[str, Any] | None, _Mapping(help="Arguments of the model's chat template, such as '{enable_thinking: false}'.")
]
TeacherArguments = Annotated[dict[str, Any] | None, _Mapping(help="Arguments of the teacher's chat template.")]
VideoSampling = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=video_sampling,
        metavar="MAPPING",
        help="How videos are sampled, as data.video: '{fps: 1, max_frames: 16}'.",
    ),
]
JudgeAddress = Annotated[str | None, typer.Option(help="Base address of an OpenAI-compatible endpoint.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's name at that endpoint.")]
JudgeRate = Annotated[
    float | None, typer.Option(parser=positive_rate, metavar="NUMBER", help="Maximum requests per minute.")
]


def _check_teacher(options: EvalOptions | AskOptions) -> None:
    if options.teacher_template_arguments is not None and options.teacher is None:
        raise UserError("--teacher-template-arguments: there is no --teacher; leave it out")


@dataclass(kw_only=True)
class EvalOptions:
    """What to ask a model, and how to score its answers."""

    model: Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
    benchmarks: Annotated[
        list[str], typer.Option(help="Names, separated by commas, or YAML files; may be repeated.", show_default=False)
    ] = field(default_factory=list)
    data: Annotated[
        list[str],
        typer.Option(
            help="Questions in any format that training reads, may be repeated; or the benchmarks' folder.",
            show_default=False,
        ),
    ] = field(default_factory=list)
    columns: Annotated[
        dict[str, str] | None,
        typer.Option(
            parser=renaming,
            metavar="MAPPING",
            help="Which keys of the data hold what, as '{image: image_path, question: q}'.",
        ),
    ] = None
    layout: Annotated[
        str | None, typer.Option(help="A function of your own that reads the data's records: package.module:function.")
    ] = None
    rules: Annotated[Rules, typer.Option(help="Whose scoring rules to follow.")] = "vlmevalkit"
    format: Annotated[
        Literal["tsv", "huggingface", "official", "source", "text"] | None,
        typer.Option(help="Format of the benchmarks' files; of data: text."),
    ] = None
    score: Annotated[
        Literal["generate", "likelihood"], typer.Option(help="Score generated answers, or the options' likelihood.")
    ] = "generate"
    measures: Annotated[str, typer.Option(help="For data: exact, rouge_l, perplexity, kl; separated by commas.")] = (
        "exact"
    )
    teacher: Annotated[str | None, typer.Option(help="Model to measure kl from.")] = None
    template_arguments: TemplateArguments = None
    teacher_template_arguments: TeacherArguments = None
    max_length: Annotated[int, typer.Option(min=1, help="Maximum tokens per sample, for perplexity and kl.")] = 2048
    judge: JudgeAddress = None
    judge_model: JudgeModel = "judge"
    judge_rate: JudgeRate = None
    images: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None
    root: Annotated[
        list[Path], typer.Option(help="Read no image outside this folder; may be repeated.", show_default=False)
    ] = field(default_factory=list)
    video_sampling: VideoSampling = None
    out: Annotated[Path, typer.Option(help="Folder for predictions and scores.")] = Path("runs/eval")
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of questions that may be left out, 0 to 1.")
    ] = 0.5
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only this many questions, evenly spaced.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 64
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum tokens of an answer; default: the benchmark's, or 32. Raise it for models that think."
        ),
    ] = None
    dtype: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Default: as saved; fp32 on a CPU.")] = None
    shard: Annotated[bool, typer.Option("--shard", help="Shard the weights over the processes (ZeRO-3).")] = False

    def __post_init__(self) -> None:
        if self.benchmarks:
            unused, about = ["columns", "layout", "measures", "teacher", "video_sampling"], "data, not benchmarks"
        else:
            unused, about = ["judge", "rules", "score"], "benchmarks (--benchmarks), not data"
        defaults = {option.name: option.default for option in fields(self) if option.default is not MISSING}
        for name in unused:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')}: is about {about}; leave it out")
        _check_teacher(self)


@dataclass(kw_only=True)
class RankEvalOptions(EvalOptions):
    """The same options for ``python -m vlm_distill.eval``, where the model is an option, too."""

    model: Annotated[str, typer.Option(help=_MODEL, show_default=False)]


@expanded
def evaluate(options: EvalOptions, nproc: Processes = None) -> None:
    """Answer questions with a model and score the answers: benchmarks by the field's own rules, or any data.

    Data are scored by exact match and VQA accuracy, by question type, or by other measures. An interrupted command
    resumes when started again, with the questions that are still open.
    """
    raise typer.Exit(launch("vlm_distill.eval", words_of(options, RankEvalOptions), process_count(nproc)))


@dataclass(kw_only=True)
class ScoreOptions:
    """Which answers to score again, and how."""

    answers: Annotated[
        Path, typer.Argument(help="Folder of an evaluation or a run, or a predictions.jsonl.", show_default=False)
    ]
    rules: Annotated[
        str | None, typer.Option(help="vlmevalkit, lmms-eval or official; default: the rules used before.")
    ] = None
    judge: JudgeAddress = None
    judge_model: JudgeModel = "judge"
    judge_rate: JudgeRate = None
    data: Annotated[Path | None, typer.Option(help="The benchmarks' folder, if it has moved.")] = None
    out: Annotated[Path | None, typer.Option(help="Folder for scores; default: a new one beside ANSWERS.")] = None


@expanded
def score(options: ScoreOptions) -> None:
    """Score an evaluation's answers again, by other rules or with a judge, without running the model.

    The answers themselves are left unchanged.
    """
    from vlm_distill.evaluation.judge import open_judge
    from vlm_distill.evaluation.left_out import report_failures
    from vlm_distill.evaluation.rescoring import default_out, known_rules, score_again
    from vlm_distill.reporting.score_tables import print_results

    rules = known_rules(options.rules)
    out = options.out or default_out(options.answers, rules, options.judge_model if options.judge is not None else None)
    judge = open_judge(options.judge, options.judge_model, options.judge_rate, out)
    results, failures, warnings = score_again(options.answers, rules, out, judge=judge, data=options.data)
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    if results:
        print_results(results)
        print(out / "scores.csv")
    report_failures(failures)


def compare(
    answers: Annotated[
        list[Path], typer.Argument(help="Folders of evaluations or runs, or predictions.jsonl.", show_default=False)
    ],
    metric: Annotated[str | None, typer.Option(help="exact, soft or score; default: score where all have it.")] = None,
) -> None:
    """Compare models with the first one on the same questions: paired bootstrap interval and McNemar's test.

    Runs that differ only by their seed are one model: all pairs of models are then compared over their seeds.
    """
    from vlm_distill.evaluation.compare import compare_all
    from vlm_distill.evaluation.seed_groups import compare_groups, group_by_seed
    from vlm_distill.reporting.score_tables import print_groups

    groups = group_by_seed(answers)
    if any(len(group.members) > 1 for group in groups):
        print_groups(*compare_groups(groups, metric))
        return
    for name, result in compare_all(answers, metric):
        if isinstance(result, float):
            print(f"{name}: {result:.2%}")
            continue
        questions = f"{result.n:,} questions"
        if result.clusters < result.n:
            questions += f" about {result.clusters:,} picture{'s' * (result.clusters > 1)}"
        print(
            f"{name}: {result.mean_a:.2%}, {100 * result.difference:+.2f} points "
            f"({100 * result.low:+.2f} to {100 * result.high:+.2f}, 95 %) on {questions}; "
            f"better on {result.only_a:,}, worse on {result.only_b:,}, McNemar's p = {result.p_mcnemar:.2g}"
        )


@dataclass(kw_only=True)
class AskOptions:
    """One question about an image, a video, or both."""

    model: Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
    image: Annotated[str, typer.Argument(help="An image file, or - for none.", show_default=False)]
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)]
    video: Annotated[str | None, typer.Option(help="A video file; it follows the image.")] = None
    video_sampling: VideoSampling = None
    teacher: Annotated[str | None, typer.Option(help="Another model that also answers.")] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of the answer.")] = 64
    template_arguments: TemplateArguments = None
    teacher_template_arguments: TeacherArguments = None

    def __post_init__(self) -> None:
        _check_teacher(self)
        if self.video_sampling is not None and self.video is None:
            raise UserError("--video-sampling: there is no --video; leave it out")


@expanded
def ask(options: AskOptions) -> None:
    """Ask a model one question about an image or a video."""
    from data.conversation import Conversation, ImageSource, VideoFile
    from data.errors import BadSample
    from data.sample_images import ImageLoader, load_images
    from vlm_distill.config.sections import VideoSection
    from vlm_distill.evaluation.model_identity import student_of
    from vlm_distill.models import load_vlm
    from vlm_distill.training.open_data import video_limits

    asked = [(student_of(options.model), "--template-arguments", options.template_arguments)]
    if options.teacher is not None:
        asked.append((options.teacher, "--teacher-template-arguments", options.teacher_template_arguments))
    limits = None
    if options.video is not None:
        limits = video_limits(VideoSection(**options.video_sampling or {}))

    # Read what the question is about.
    sources: list[ImageSource] = [] if options.image == "-" else [options.image]
    content: list[dict[str, Any]] = [{"type": "image"} for _ in sources]
    if options.video is not None:
        sources.append(VideoFile(options.video))
        content.append({"type": "video"})
    content.append({"type": "text", "text": options.question})
    conversation = Conversation(({"role": "user", "content": content},), tuple(sources))
    try:
        conversation, images = load_images(conversation, ImageLoader(video=limits))
    except BadSample as error:
        raise UserError(f"cannot ask about {options.video or options.image}: {error}") from None

    for name, flag, arguments in asked:
        try:
            model = load_vlm(name, dtype="float32")
            model.processor.set_template_arguments(arguments or {}, flag)
            model.processor.video_frames = None if limits is None else limits.max_frames
            (answer,) = model.generate([(conversation, images)], max_new_tokens=options.max_new_tokens)
        except BadSample as error:
            raise UserError(f"{name}: {error}") from None
        prefix = f"{name}: " if options.teacher is not None else ""
        print(f"{prefix}{answer.text}  ({math.exp(sum(answer.logprobs)):.1%})")
