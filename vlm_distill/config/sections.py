"""The typed configuration of a VLM run, section by section. Rules between sections are in `checks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from . import deepspeed_keys
from .checks import check_run
from .fields import (
    AboveZero,
    AtLeastZero,
    Beta,
    DType,
    Fraction,
    Measure,
    NotNegative,
    Part,
    Positive,
    Replaces,
    Rules,
    Section,
    TrackerName,
)
from .model_sections import StudentSection, TeacherSection
from .on_policy_sections import OnPolicySection


class LossSection(Section):
    """One term of the loss; parameters beyond name and weight are the loss's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="The loss: a name such as `taid`, or your own class, `package.module:Class`.")
    weight: AtLeastZero = Field(1.0, description="Factor on the loss in the sum of all terms.")


class TermSection(LossSection):
    """One term of the loss of vision-language models."""

    on: Literal["text", "images"] = Field(
        "text", description="Where the models are compared: `text`, the answers' tokens, or `images`, the image tokens."
    )
    answers: Literal["data", "own", "both"] = Field(
        "both",
        description="Which answers it learns from: the `data`'s, the student's `own` (`on_policy`), or `both`.",
    )
    mean: Literal["tokens", "sequences"] = Field(
        "tokens",
        description="What the loss is a mean over: a step's `tokens`, or each answer's tokens, then the `sequences`.",
    )
    match: Literal["none", "hungarian", "pool"] = Field(
        "none",
        description="How image tokens are paired: `none`, one by one; `hungarian`, by the distance of their logits; "
        "`pool`, averaged over the coarser of both grids.",
    )


class SourceSection(Section):
    """One source of samples."""

    path: str = Field(description="File, folder, or name of a dataset.")
    name: str | None = Field(None, description="Name in metrics and messages; by default made from the path.")
    images: str | None = Field(None, description="Folder that relative image paths start from.")
    format: Literal["auto", "json", "jsonl", "csv", "tsv", "huggingface", "webdataset", "text"] = Field(
        "auto", description="Layout of the data; `auto` infers it from the path."
    )
    split: str | None = Field(None, description="Split of a Hugging Face dataset.")
    config: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    weight: AboveZero = Field(1.0, description="How often each row is seen in an epoch; 0.5 is every other epoch.")
    labelled: bool = Field(True, description="`false`: answers are placeholders; losses that read them are refused.")
    skip: NotNegative = Field(0, description="Leave out this many rows, the first ones, as to evaluate on them.")
    limit: Positive | None = Field(None, description="Use only this many rows, the first ones after `skip`.")
    teacher: str | Annotated[dict[str, AboveZero], Field(min_length=1)] | None = Field(
        None,
        description="Which of `teachers` teaches this source: a name, or several with weights, `{big: 2, small: 1}`.",
    )
    combine: Literal["losses", "probabilities", "logits"] = Field(
        "losses", description="What is averaged over several teachers; the last two need one vocabulary."
    )
    columns: dict[str, str] = Field(
        {}, description="Which column holds what: our name, then the data's, as in `{image: image_path}`."
    )
    layout: str | None = Field(
        None, description="A function of your own that reads the records, `package.module:function`."
    )

    @property
    def lesson(self) -> dict[str, float]:
        """Weights of the named teachers, which sum to 1."""
        named = {self.teacher: 1.0} if isinstance(self.teacher, str) else self.teacher or {}
        return {name: weight / sum(named.values()) for name, weight in named.items()}

    @model_validator(mode="after")
    def _read_in_one_way(self) -> SourceSection:
        if self.layout is not None and (self.columns or self.format == "text"):
            raise ValueError("layout reads the records' own keys; leave it out, or columns and format: text")
        return self


class VideoSection(Section):
    """How the files of videos are read."""

    fps: AboveZero = Field(1.0, description="Frames per second.")
    max_frames: Positive = Field(16, description="Most frames; those of a longer video are further apart.")
    max_seconds: AboveZero = Field(3600.0, description="Longest video; longer ones are bad samples.")
    timeout: AboveZero = Field(60.0, description="Seconds that reading one video may take.")


class DataSection(Section):
    """Training and evaluation data, and how samples become batches."""

    train: list[SourceSection] = Field(min_length=1, description="Sources to train on.")
    eval: list[SourceSection] = Field([], description="Sources to evaluate on.")
    roots: list[str] = Field([], description="The only folders that images are read from; by default any.")
    max_length: Positive = Field(2048, description="Longest sample in tokens, image tokens included.")
    max_prompt: Positive | None = Field(
        None, description="Longest prompt before the last answer, in tokens (needs `answers: last`)."
    )
    max_response: Positive | None = Field(None, description="Longest last answer, in tokens (needs `answers: last`).")
    answers: Literal["all", "last"] = Field("all", description="Which answers of a conversation are learnt.")
    turns: Literal["together", "split"] = Field(
        "together", description="`split` makes each answer of a conversation a sample of its own."
    )
    template_text: Literal["prompt", "learn"] = Field(
        "prompt",
        description="Whether text that a chat template writes before an answer, such as an empty thought, is learnt.",
    )
    max_pixels: Positive = Field(
        89_478_485, description="Largest image, or a video's frames together, in pixels; larger ones are bad samples."
    )
    video: VideoSection | None = Field(None, description="How to read video files; without it, they are bad samples.")
    bad_samples: Literal["skip", "fail"] = Field("skip", description="What to do with a sample that cannot be used.")
    max_bad: Fraction = Field(0.5, description="The run ends when it leaves out a larger share of its samples.")
    length_window: NotNegative = Field(
        0, description="Sort the rows of this many consecutive batches by length, for less padding; 0 keeps the order."
    )
    packing: bool = Field(False, description="Put several samples into one row instead of padding.")
    workers: NotNegative = Field(2, description="Loader processes per rank.")
    prefetch: Positive = Field(2, description="Steps that each loader process prepares ahead.")


class OptimizerSection(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "sgd", "adamw8bit", "muon"] = Field(
        "adamw", description="AdamW, SGD with momentum, AdamW with 8-bit states (bitsandbytes), or Muon with AdamW."
    )
    lr: AboveZero = Field(1e-4, description="Peak learning rate.")
    muon_lr: AboveZero = Field(0.02, description="Peak learning rate of the matrices that Muon updates.")
    part_lr: dict[Part, AboveZero] = Field({}, description="Learning rates of single parts, in place of `lr`.")
    weight_decay: AtLeastZero = Field(0.01, description="Weight decay of matrices; decoupled, except with SGD.")
    momentum: Beta = Field(0.9, description="Momentum of SGD and Muon.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's decay rates of its two moments.")
    eps: AboveZero = Field(1e-8, description="AdamW's term against division by zero.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup: AtLeastZero = Field(0.0, description="Warm-up in steps; below 1, a share of the run.")
    min_lr_ratio: Fraction = Field(0.0, description="Learning rate at the end, as a share of the peak.")
    max_grad_norm: AboveZero | None = Field(1.0, description="Clip the gradient to this norm; `null` does not clip.")


class TrackerSection(Section):
    """A service that shows the run beside ``metrics.jsonl`` and TensorBoard."""

    name: TrackerName = Field(description="The tracker: `wandb` (Weights & Biases), `mlflow` or `trackio`.")
    project: str | None = Field(
        None,
        description="Project that shows the run, MLflow's experiment; by default what `WANDB_PROJECT` or "
        "`MLFLOW_EXPERIMENT_NAME` says, else `vlm-distill`.",
    )
    run: str | None = Field(None, description="Name of the run; by default its folder's.")
    group: str | None = Field(None, description="Group of runs shown together; a tag in MLflow.")
    tags: list[str] = Field([], description="Tags of the run.")
    server: str | None = Field(
        None,
        description="Where the run is kept, by default what the tracker's environment variables say: W&B's base URL, "
        "MLflow's tracking URI, trackio's Space or URL.",
    )
    entity: str | None = Field(None, description="User or team in W&B that owns the run.")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="For W&B: `offline` keeps the run on disk until `wandb sync` sends it."
    )

    @model_validator(mode="after")
    def _keys_of_this_tracker(self) -> TrackerSection:
        for key in ("entity", "mode"):
            if self.name != "wandb" and getattr(self, key) is not None:
                raise ValueError(f"only wandb has the key {key}; leave it out for {self.name}")
        return self


def _as_section(entry: Any) -> Any:
    """Return an entry of ``training.trackers``, in which a name alone is short for ``{name: NAME}``."""
    return {"name": entry} if isinstance(entry, str) else entry


class TrainingSection(Section):
    """Length, batch, precision and bookkeeping of a run; shared by both paths."""

    replaces: ClassVar[Replaces] = {"epochs": ("steps",), "steps": ("epochs",)}

    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, description="Length of the run in epochs.")
    steps: Positive | None = Field(None, description="Length of the run in optimizer steps, in place of `epochs`.")
    batch_size: Positive = Field(64, description="Samples of an optimizer step, over all ranks.")
    micro_batch_size: Positive | None = Field(
        None, description="Samples of one forward on one rank; by default a rank's whole share of the step."
    )
    dtype: DType = Field("fp32", description="Precision of the forward; optimizer and losses stay in float32.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` uses a GPU if there is one.")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward to save memory.")
    seed: NotNegative = Field(0, description="Seed of weights, data order and all random draws.")
    checkpoint_every: Positive = Field(500, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Number of checkpoints kept.")
    resume: bool = Field(True, description="Continue from the output folder's checkpoint; `false` refuses instead.")
    timeout: AboveZero = Field(30, description="Minutes that a rank waits for the others before the run ends.")
    on_oom: Literal["fail", "halve"] = Field(
        "fail",
        description="`halve` restarts with half the micro-batch when memory runs out, under this suite's own commands.",
    )
    stopped_exit_code: Annotated[int, Field(ge=0, le=255)] | None = Field(
        None, description="Exit code of a run that a signal stopped; by default 130 after SIGINT, 143 after SIGTERM."
    )
    trackers: list[
        Annotated[TrackerSection, BeforeValidator(_as_section, json_schema_input_type=TrackerName | TrackerSection)]
    ] = Field([], description="Services that show the run, by name or with settings: `wandb`, `mlflow`, `trackio`.")
    smoke: bool = Field(False, description="Marks the folder of a smoke run; `--smoke` sets it.")

    @model_validator(mode="before")
    @classmethod
    def _trackers_in_place_of_wandb(cls, section: Any) -> Any:
        """Name the key that replaced ``wandb``. Folders of earlier runs say ``wandb: false``, which is left out."""
        if not isinstance(section, Mapping) or "wandb" not in section:
            return section
        if section["wandb"]:
            raise ValueError(
                "wandb is now an entry of trackers: write trackers: [wandb], or [{name: wandb, project: …}], where "
                "`run` names the run"
            )
        return {key: value for key, value in section.items() if key != "wandb"}

    @model_validator(mode="after")
    def _each_tracker_once(self) -> TrainingSection:
        names = [tracker.name for tracker in self.trackers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"trackers names {name} more than once; leave one entry")
        return self

    @model_validator(mode="after")
    def _length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("say how long to train: set epochs or steps, not both")
        return self


class LanguageTrainingSection(TrainingSection):
    """What only the VLM path has."""

    recompute_logits: bool = Field(False, description="Form the logits twice, in tiles, to save memory.")
    sequence_parallel: Positive = Field(1, description="Ranks that share the tokens of the same samples.")


class DeepSpeedSection(Section):
    """ZeRO's stage, and further keys of DeepSpeed's own configuration, which are passed on.

    Keys that the run sets itself (``deepspeed_keys.set_by_run``) may be repeated here with the run's value or ``auto``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    replaces: ClassVar[Replaces] = {"stage": ("zero_optimization.stage",), "zero_optimization.stage": ("stage",)}

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="What ZeRO shards: nothing (0), optimizer states (1), gradients too (2), parameters too (3)."
    )

    @model_validator(mode="before")
    @classmethod
    def _as_in_files_of_deepspeed(cls, section: Any) -> Any:
        """Leave ``auto`` out, and read the stage where DeepSpeed has it."""
        if not isinstance(section, Mapping):
            return section
        section = deepspeed_keys.without_auto(section)
        zero = section.get("zero_optimization")
        if isinstance(zero, dict) and "stage" in zero:
            if section.setdefault("stage", zero["stage"]) != zero["stage"]:
                raise ValueError("zero_optimization.stage differs from stage; leave one of them out")
            del zero["stage"]
            section = deepspeed_keys.without_auto(section)
        return section

    @model_validator(mode="after")
    def _known_keys(self) -> DeepSpeedSection:
        deepspeed_keys.check_keys(self.extra)
        return self

    @property
    def extra(self) -> dict[str, Any]:
        """DeepSpeed's own keys, which are passed on."""
        return self.model_extra or {}

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer steps in main memory."""
        return self._offloads("offload_optimizer")

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters are kept in main memory while they are not used."""
        return self._offloads("offload_param")

    def _offloads(self, what: str) -> bool:
        place = self.zero.get(what)
        return isinstance(place, dict) and place.get("device", "none") != "none"

    @property
    def zero(self) -> dict[str, Any]:
        """The ``zero_optimization`` part of these keys."""
        zero = self.extra.get("zero_optimization")
        return zero if isinstance(zero, dict) else {}


class EvaluationSection(Section):
    """What is evaluated, when, and by which measures."""

    every: Positive | None = Field(None, description="Steps between evaluations; by default only at the end.")
    limit: Positive | None = Field(None, description="Samples of each source while training; all of them at the end.")
    batch_size: Positive = Field(64, description="Samples answered at once on a rank.")
    max_new_tokens: Positive | None = Field(None, description="Longest answer, in tokens.")
    measures: Annotated[list[Measure], Field(min_length=1)] = Field(
        ["exact"], description="Measures of `data.eval`: `exact`, `rouge_l`, `perplexity`, `kl`."
    )
    teacher: bool = Field(True, description="Evaluate the teacher, too, at the end.")
    benchmarks: list[str] = Field([], description="Benchmarks by name.")
    benchmark_data: str | None = Field(None, description="Folder of the benchmarks' files.")
    rules: Rules = Field("vlmevalkit", description="Whose prompts and scoring benchmarks follow.")
    best: str | None = Field(None, description="Data or benchmark whose score chooses the best student kept.")

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationSection:
        if self.best is not None and self.every is None:
            raise ValueError("best chooses among evaluations while training; say how often they are (every)")
        return self


class RunConfig(Section):
    """A run that trains a vision-language or language model."""

    replaces: ClassVar[Replaces] = {"teacher": ("teachers",), "teachers": ("teacher",)}

    student: StudentSection = Field(description="The model that is trained.")
    teacher: TeacherSection | None = Field(
        None, description="The model to learn from; without it, only losses that need no teacher (plain fine-tuning)."
    )
    teachers: dict[str, TeacherSection] = Field(
        {}, description="Several teachers by name, in place of `teacher`; each source of `data.train` names its own."
    )
    loss: list[TermSection] = Field(min_length=1, description="Terms of the loss.")
    data: DataSection = Field(description="Training and evaluation data.")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="Optimizer and learning-rate schedule.")
    training: LanguageTrainingSection = Field(description="Length, batch, precision and bookkeeping.")
    deepspeed: DeepSpeedSection = Field(DeepSpeedSection(), description="ZeRO, and DeepSpeed's own keys.")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="What is evaluated, and when.")
    on_policy: OnPolicySection | None = Field(None, description="Learning from the student's own answers.")
    output: str = Field(description="Folder of the run.")

    @model_validator(mode="before")
    @classmethod
    def _of_a_classifier(cls, plain: Any) -> Any:
        student = plain.get("student") if isinstance(plain, dict) else None
        if isinstance(student, dict) and "name" in student and not {"path", "decoder", "from_teacher"} & student.keys():
            raise ValueError(
                "this file configures an image classifier (student.name); run it with vlm-distill classify"
            )
        return plain

    @property
    def all_teachers(self) -> dict[str, TeacherSection]:
        """The sections of all teachers by name; a single one is called ``teacher``."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    def only(self, name: str) -> RunConfig:
        """Return the run with one of ``teachers`` as its teacher, and with the sources that it teaches."""
        taught = [source for source in self.data.train if name in source.lesson]
        data = self.data.model_copy(update={"train": taught})
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}, "data": data})

    @property
    def taught_by_base(self) -> bool:
        """Whether the teacher is the student's own base with the adapters off, which is in memory anyway."""
        alone = self.student.lora is not None and not self.student.trained_whole
        return alone and self.teacher is not None and self.teacher.from_student and self.teacher.ema is None

    @model_validator(mode="after")
    def _between_sections(self) -> RunConfig:
        deepspeed_keys.check_equal(
            self.deepspeed.extra, deepspeed_keys.set_by_run(self, autocast=self.deepspeed.stage == 0)
        )
        check_run(self)
        return self


class AnyRun(Protocol):
    """What the two paths' configurations have in common."""

    @property
    def loss(self) -> Sequence[LossSection]: ...
    @property
    def data(self) -> AnyData: ...
    @property
    def optimizer(self) -> AnyOptimizer: ...
    @property
    def training(self) -> TrainingSection: ...
    @property
    def deepspeed(self) -> DeepSpeedSection: ...
    @property
    def output(self) -> str: ...
    def model_dump(self, *, mode: str = ..., exclude_none: bool = ...) -> dict[str, Any]: ...


class AnyData(Protocol):
    @property
    def roots(self) -> list[str]: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def max_bad(self) -> float: ...


class AnyOptimizer(Protocol):
    @property
    def max_grad_norm(self) -> float | None: ...
