"""The command ``vlm-distill``. Each file beside this one holds a group of commands with their options."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlm_distill import __version__
from vlm_distill.runtime.launch import guarded

from . import evaluation, publishing, training

app = typer.Typer(
    name="vlm-distill",
    help="Distil a large vision-language model into a small one. Start with [bold]vlm-distill demo[/].",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; a user's mistake becomes one line and exit code 2, never a traceback."""
    sys.exit(guarded(lambda: app(standalone_mode=True)))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"vlm-distill {__version__}")
        raise typer.Exit


<<<<<<< HEAD
# In the order of --help.
app.command()(publishing.demo)
app.command()(training.train)
app.command()(training.cache)
app.command()(training.classify)
app.command()(training.inspect)
app.command()(training.plan)
app.command()(training.generate)
app.command("eval")(evaluation.evaluate)
app.command()(evaluation.score)
app.command()(evaluation.compare)
app.command()(evaluation.ask)
app.command()(publishing.export)
app.command()(publishing.report)
app.command()(publishing.losses)
app.command()(publishing.models)
=======
@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's runs and report.")] = Path("runs/demo"),
    nproc: Processes = 2,
) -> None:
    """The whole way on embedded data: distil, score, export, report. About four minutes on two cores."""
    from vlm_distill.demo import run

    run(out, nproc)


@app.command()
def train(config: Config, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Trains a student as CONFIG says, evaluates it and its teacher, exports it.

    A run that was stopped goes on from its latest checkpoint when started again. Under DeepSpeed's own launcher, with
    a hostfile for many nodes: deepspeed --module vlm_distill.train CONFIG.
    """
    from vlm_distill.config.batch_split import split_batch
    from vlm_distill.config.file import load_config

    # Mistakes are told here, before processes are started, and before what takes seconds to import.
    settings = load_config(config, overrides or ())
    split_batch(settings, nproc)
    from vlm_distill.training.build import build_terms
    from vlm_distill.training.on_policy import check_on_policy

    check_on_policy(settings, build_terms(settings))
    raise typer.Exit(launch_training("vlm_distill.train", [str(config), *(overrides or ())], nproc))


@app.command()
def cache(config: Config, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Runs CONFIG's teacher once over all of its data, and keeps its outputs in the folder of teacher.cache.

    Training then reads them there and never loads the teacher. With student.vision_cache, the same for what a frozen
    vision encoder makes of the images. What was stopped goes on when started again.
    """
    from vlm_distill.caching.fill import check
    from vlm_distill.config.file import load_config

    check(load_config(config, overrides or ()))
    raise typer.Exit(launch("vlm_distill.cache", [str(config), *(overrides or ())], nproc))


@app.command()
def classify(config: Config, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Trains an image classifier as CONFIG says, evaluates it and its teacher, exports it.

    The other path of this suite, from ImageNet, CIFAR or any folder of images: configs/imagenet, configs/cifar100.
    Under DeepSpeed's own launcher: deepspeed --module vision.train CONFIG.
    """
    words = [str(config), *(overrides or ())]
    # By name, as it is started: nothing here imports the other path.
    import_module("vision.train").check(words, nproc)
    raise typer.Exit(launch_training("vision.train", words, nproc))


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many samples; default: 4, with --json all of them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the images.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write what training would learn, a line a sample; - is standard output.")
    ] = None,
) -> None:
    """Shows samples as each model receives them, supervised tokens highlighted."""
    from vlm_distill.config.file import load_config
    from vlm_distill.inspection import Inspection
    from vlm_distill.reporting.inspection_page import render_html, render_terminal, write_lines

    inspection = Inspection(load_config(config, overrides or ()))
    out = sys.stdout
    if json is not None:
        # Standard output has nothing but the lines.
        out = sys.stderr if json == Path("-") else out
        write_lines(inspection.lines(samples), json)
        print(inspection.summary(), file=out)
    if html is not None or json is None:
        shown = inspection.shown(samples or 4)
        if json is None:
            render_terminal(shown, plain_console())
            print(inspection.summary())
        if html is not None:
            print(render_html(shown, html), file=out)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB of a GPU; default: the device's.")] = None,
    device: Annotated[str, typer.Option(help="What runs it, such as h100 or a100; cpu.")] = "h100",
    json: Annotated[
        Path | None, typer.Option(help="Where to write it; default: plan.json in the run's folder.")
    ] = None,
) -> None:
    """What a run will cost, no weight loaded: parameters, memory by ZeRO stage, FLOPs, tokens, time and GPU-hours.

    The run's report shows the plan beside what came of it. docs/planning.md says what is counted, and how well.
    """
    from vlm_distill.config.file import load_config

    settings = load_config(config, overrides or ())
    # These take seconds, for which a mistake in the configuration need not wait.
    from vlm_distill.planning import plan as make_plan
    from vlm_distill.reporting.plan_tables import render, write_plan

    found = make_plan(settings, gpus=gpus, memory=memory, device=device)
    render(found, plain_console())
    print(write_plan(found, json or Path(settings.output) / "plan.json"))


@app.command()
def generate(
    config: Config,
    out: Annotated[Path, typer.Option(help="The JSONL file to write.", show_default=False)],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Folder or name of a model, instead of the teacher.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are left out.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest tokens.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers drawn to each question.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    nproc: Processes = 1,
) -> None:
    """Writes the teacher's answers to CONFIG's training questions as data, for distillation on the sequence level.

    Started again after it was stopped, it goes on.
    """
    from vlm_distill.config.file import load_config

    load_config(config, overrides or ())
    words = [str(config), *(overrides or ()), "--out", str(out), "--max-new-tokens", str(max_new_tokens)]
    words += ["--temperature", str(temperature), "--samples", str(samples), "--batch-size", str(batch_size)]
    words += [] if model is None else ["--model", model]
    raise typer.Exit(launch("vlm_distill.generate", words, nproc))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or name of a model, or a run's folder.", show_default=False)],
    benchmarks: Annotated[
        list[str] | None, typer.Option(help="Names with commas between, or YAML files; may be repeated.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Questions in any of the readers' formats, may be repeated; or the benchmarks' folder."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Keys of the data by our names, as '{image: image_path, question: q}'.")
    ] = None,
    rules: Annotated[str, typer.Option(help="Whose: vlmevalkit, lmms-eval or official.")] = "vlmevalkit",
    format: Annotated[
        str | None, typer.Option(help="Of the benchmarks' files: tsv, huggingface, official or source; of data: text.")
    ] = None,
    score: Annotated[str, typer.Option(help="generate, or likelihood of the options.")] = "generate",
    measures: Annotated[
        str, typer.Option(help="Of data: exact, rouge_l, perplexity, kl; with commas between.")
    ] = "exact",
    teacher: Annotated[str | None, typer.Option(help="The model that kl is measured from.")] = None,
    template_arguments: TemplateArguments = None,
    teacher_template_arguments: TeacherArguments = None,
    max_length: Annotated[int, typer.Option(min=1, help="Most tokens of a sample, for perplexity and kl.")] = 2048,
    judge: JudgeAddress = None,
    judge_model: JudgeModel = "judge",
    judge_rate: JudgeRate = None,
    images: Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")] = None,
    root: Annotated[list[Path] | None, typer.Option(help="Read no image outside this folder; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for predictions and scores.")] = Path("runs/eval"),
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Most of the questions to leave out, 0 to 1.")] = 0.5,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask this many questions, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the benchmark's own, or 32; more for models that think.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default: as saved.")] = None,
    shard: Annotated[bool, typer.Option(help="Each process holds its share of the weights (ZeRO-3).")] = False,
    nproc: Processes = 1,
) -> None:
    """Answer questions with a model and score the answers: benchmarks by the rules of the field, or any data.

    Data are scored by exact match and VQA accuracy, by question type, or by other measures. What was interrupted
    resumes with the questions that are still open when it is started again.
    """
    words = ["--model", model, "--out", str(out), "--batch-size", str(batch_size), "--rules", rules, "--score", score]
    words += ["--judge-model", judge_model, "--measures", measures, "--max-length", str(max_length)]
    words += ["--max-bad", str(max_bad)]
    for flag, values in (("--benchmarks", benchmarks), ("--data", data), ("--root", root)):
        for value in values or []:
            words += [flag, str(value)]
    single = {
        "--columns": columns,
        "--images": images,
        "--limit": limit,
        "--dtype": dtype,
        "--format": format,
        "--teacher": teacher,
        "--template-arguments": template_arguments,
        "--teacher-template-arguments": teacher_template_arguments,
        "--judge": judge,
        "--judge-rate": judge_rate,
        "--max-new-tokens": max_new_tokens,
    }
    for flag, given in single.items():
        words += [flag, str(given)] if given is not None else []
    words += ["--shard"] if shard else []
    raise typer.Exit(launch("vlm_distill.evaluate", words, nproc))


@app.command()
def score(
    answers: Annotated[
        Path, typer.Argument(help="Folder of an evaluation or a run, or a predictions.jsonl.", show_default=False)
    ],
    rules: Annotated[
        str | None, typer.Option(help="vlmevalkit, lmms-eval or official; default: as they were scored.")
    ] = None,
    judge: JudgeAddress = None,
    judge_model: JudgeModel = "judge",
    judge_rate: JudgeRate = None,
    data: Annotated[Path | None, typer.Option(help="The benchmarks' folder, if it is not where it was.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for scores; default: a new one beside ANSWERS.")] = None,
) -> None:
    """Score the answers of an evaluation again, by other rules or with a judge, without the model.

    The answers stay as they are.
    """
    from vlm_distill.evaluate import open_judge, report_failures
    from vlm_distill.evaluation.rescoring import default_out, known_rules, score_again
    from vlm_distill.reporting.score_tables import print_results

    by = known_rules(rules)
    place = out or default_out(answers, by, judge_model if judge is not None else None)
    asked = open_judge(judge, judge_model, judge_rate, place)
    results, failures, warnings = score_again(answers, by, place, judge=asked, data=data)
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    if results:
        print_results(results)
        print(place / "scores.csv")
    report_failures(failures)


@app.command()
def compare(
    answers: Annotated[
        list[Path], typer.Argument(help="Folders of evaluations or runs, or predictions.jsonl.", show_default=False)
    ],
    metric: Annotated[str | None, typer.Option(help="exact, soft or score; default: score where all have it.")] = None,
) -> None:
    """Compares models on the same questions, each with the first: paired bootstrap interval and McNemar's test."""
    from vlm_distill.evaluation.compare import compare_all

    for name, result in compare_all(answers, metric):
        if isinstance(result, float):
            print(f"{name}: {result:.2%}")
            continue
        print(
            f"{name}: {result.mean_a:.2%}, {100 * result.difference:+.2f} points "
            f"({100 * result.low:+.2f} to {100 * result.high:+.2f}, 95 %) on {result.n:,} questions about "
            f"{result.clusters:,} pictures; better on {result.only_a:,}, worse on {result.only_b:,}, "
            f"McNemar's p = {result.p_mcnemar:.2g}"
        )


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="Folder or name of a model, or a run's folder.", show_default=False)],
    image: Annotated[str, typer.Argument(help="An image file, or - for none.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    teacher: Annotated[str | None, typer.Option(help="Another model, to answer beside it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    template_arguments: TemplateArguments = None,
    teacher_template_arguments: TeacherArguments = None,
) -> None:
    """Asks a model one question about an image."""
    import math

    from data.conversation import Conversation
    from data.errors import BadSample
    from data.images import load_image
    from vlm_distill.evaluate import mapping_of, model_of
    from vlm_distill.models import load_vlm

    asked = [(model_of(model), "--template-arguments", template_arguments)]
    if teacher is not None:
        asked.append((teacher, "--teacher-template-arguments", teacher_template_arguments))
    elif teacher_template_arguments is not None:
        raise UserError("--teacher-template-arguments: there is no --teacher; leave it out")
    arguments = {flag: mapping_of(flag, text) for _, flag, text in asked}
    try:
        images = [] if image == "-" else [load_image(image)]
    except BadSample as error:
        raise UserError(f"{image}: {error}") from None
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    conversation = Conversation(({"role": "user", "content": content},), tuple(images))
    for name, flag, _ in asked:
        try:
            loaded = load_vlm(name, dtype="float32")
            loaded.processor.set_template_arguments(arguments[flag], flag)
            (answer,) = loaded.generate([(conversation, images)], max_new_tokens=max_new_tokens)
        except BadSample as error:
            raise UserError(f"{name}: {error}") from None
        prefix = f"{name}: " if teacher is not None else ""
        print(f"{prefix}{answer.text}  ({math.exp(sum(answer.logprobs)):.1%})")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where to write the student.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as trained.")] = None,
    format: Annotated[str, typer.Option(help="native, or llava: an assembled student as a LLaVA.")] = "native",
    onnx: Annotated[bool, typer.Option("--onnx", help="Of a classifier: write and check model.onnx, too.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Also upload it, as owner/name, private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see what is uploaded.")] = False,
) -> None:
    """Writes a run's student, finished or at its latest checkpoint, as a folder with a model card.

    docs/export.md says what loads it. A classifier, whose run must be finished, becomes a folder that timm reads.
    """
    from vlm_distill.export import check_hub, export_student, is_classifier, push

    if push_to_hub is not None:
        check_hub(push_to_hub)
    elif public:
        raise UserError("export: --public says how to upload; name what is uploaded by --push-to-hub")
    if is_classifier(run):
        if dtype is not None or format != "native":
            raise UserError("export: a classifier is written as it was trained, in fp32; leave --dtype, --format out")
        code = launch("vision.export", [str(run), str(folder), *(["--onnx"] if onnx else [])], 1)
        if code:
            raise typer.Exit(code)
    else:
        if onnx:
            raise UserError(
                f"export: {run} is no classifier's run, and others are not written as ONNX; leave --onnx out"
            )
        print(export_student(run, folder, dtype, format))
    if push_to_hub is not None:
        print(push(folder, push_to_hub, public))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, shown side by side.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first run.")] = None,
) -> None:
    """Writes one self-contained page about one or more runs."""
    from vlm_distill.reporting.report import write_report

    print(write_report(runs, out))


@app.command()
def losses() -> None:
    """Lists the losses."""
    from vlm_distill.losses import available

    _table("Losses", available())


@app.command()
def models() -> None:
    """Lists the kinds of models that a configuration can name; docs/models.md has them in full."""
    _table(
        "Whole models: student.path, teacher.path",
        {
            "a folder": "that this suite exported",
            "a name or folder of Transformers": "an image-text-to-text model or a causal language model",
        },
    )
    _table(
        "Vision encoders: vision_encoder.source",
        {
            "timm": "any architecture of timm: transformers and convolutional nets",
            "open_clip": "the visual tower of an open_clip model",
            "transformers": "CLIP, SigLIP and DINO towers, and other vision models",
        },
    )
    _table(
        "Projectors: projector.type",
        {
            "linear": "one linear layer",
            "mlp": "linear layers with GELU between them (LLaVA-1.5's has two)",
            "pixel_shuffle_mlp": "squares of neighbouring patches joined to one token (InternVL)",
            "resampler": "learned queries that attend to the patches (Perceiver)",
        },
    )
    _table(
        "Decoders: decoder.name or decoder.config",
        {"a name or folder": "any causal language model of Transformers", "config": "a new one, by its model_type"},
    )
    _table(
        "Students cut from the teacher: student.from_teacher", {"layers": "decoder layers to keep: how many, or which"}
    )


def _table(title: str, entries: dict[str, str]) -> None:
    table = Table("name", "what it is", title=title, title_justify="left")
    for name, what in entries.items():
        table.add_row(name, what)
    plain_console().print(table)


if __name__ == "__main__":
    main()
>>>>>>> c67ea6f (Rules between sections are a table; every field of a configuration is described)
