"""The typed configuration of a run: its sections, and what they refuse by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from data.errors import UserError
from vlm_distill.evaluation.scoring.scores import Rules

from . import deepspeed_keys

DType = Literal["fp32", "bf16"]
Measure = Literal["exact", "rouge_l", "perplexity", "kl"]
#: In place of a tokenizer's name: the student takes its teacher's.
TEACHERS = "teacher"
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Part = Literal["vision_encoder", "projector", "decoder"]


def _takes_truth(annotation: Any) -> bool:
    """Return whether true and false are values of a field of this type; pydantic takes them for 1 and 0."""
    return annotation in (bool, Any) or any(_takes_truth(part) for part in get_args(annotation))


class Section(BaseModel):
    """A section of a configuration, or all of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Keys, and those that each replaces when a later layer (an override, a file that builds on another) sets it:
    #: alternatives of which a configuration has one. Set in one layer, they are refused.
    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _means_something(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse empty text, a home folder's ``~``, which nothing expands, and ``true`` for a number."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise ValueError("is empty; give a value, or leave the key out")
            if isinstance(text, str) and text.startswith("~/"):
                raise ValueError("~ is not expanded; write ${oc.env:HOME} or the whole path")
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _takes_truth(field.annotation):
            raise ValueError("give a value other than true or false")
        return value


class ModelSection(Section):
    """A model: loaded (``path``), assembled from parts (``decoder`` and others), or cut from the teacher.

    ``template_arguments`` are given to its chat template wherever it is used: ``{enable_thinking: false}``.
    """

    path: str | None = None
    vision_encoder: dict[str, Any] | None = None
    projector: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    template_arguments: dict[str, Any] = {}
    from_teacher: dict[str, Any] | None = None
    dtype: DType | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    #: Keys of which one says where the model comes from.
    ways: ClassVar[tuple[str, ...]] = ("path", "decoder", "from_teacher")
    replaces = {
        "path": ("decoder", "vision_encoder", "projector", "from_teacher"),
        "decoder": ("path", "from_teacher"),
        "decoder.name": ("decoder.config",),
        "decoder.config": ("decoder.name",),
        "from_teacher": ("path", "decoder", "vision_encoder", "projector"),
    }

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        ways = [name for name in self.ways if getattr(self, name) not in (None, False)]
        if len(ways) != 1:
            found = " and ".join(ways) or "none of them"
            raise ValueError(f"name exactly one of {', '.join(self.ways)} (found {found})")
        return self


class LoraSection(Section):
    """Low-rank adapters on linear layers; ``alpha`` left out is 2 · ``rank``."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    parts: Annotated[list[Part], Field(min_length=1)] = ["decoder"]
    rslora: bool = False
    merge: bool = True


class StudentSection(ModelSection):
    """The student. ``train`` names what trains whole: everything, or with ``lora`` nothing unless it is said.

    With ``vision_cache``, ``vlm-distill cache`` keeps a frozen vision encoder's features in that folder, where a run
    reads them.
    """

    train: list[Part] | None = None
    lora: LoraSection | None = None
    quantize: Literal["nf4"] | None = None
    vision_cache: str | None = None

    @property
    def trained_whole(self) -> list[Part]:
        if self.train is not None:
            return self.train
        return list(get_args(Part)) if self.lora is None else []

    @property
    def base(self) -> str | None:
        """The name or folder of the model that an adapter would be for; ``None`` where the model is nowhere on disk."""
        alone = self.decoder is not None and self.vision_encoder is None
        return self.decoder.get("name") if self.decoder is not None and alone else self.path

    @model_validator(mode="after")
    def _frozen_vision(self) -> StudentSection:
        adapted = [] if self.lora is None else self.lora.parts
        if self.vision_cache is not None and "vision_encoder" in [*self.trained_whole, *adapted]:
            raise ValueError(
                "vision_cache: features change while the vision encoder trains; leave it out of train and lora.parts"
            )
        return self

    @model_validator(mode="after")
    def _lora(self) -> StudentSection:
        if self.lora is None:
            if self.quantize is not None:
                raise ValueError("quantize: weights of 4 bits are not trained; add lora, or leave quantize out")
            return self
        both = [part for part in self.trained_whole if part in self.lora.parts]
        if both:
            raise ValueError(f"train and lora.parts both name the {both[0]}; it trains whole or by LoRA")
        if not self.lora.merge:
            if self.base is None:
                raise ValueError("lora.merge: false keeps an adapter, whose base must be on disk; give its path")
            if "decoder" in self.trained_whole:
                raise ValueError("lora.merge: false keeps an adapter, and a decoder trained whole is none; merge")
        elif self.quantize is not None:
            raise ValueError("quantize: nothing is merged into 4 bits; set lora.merge to false (export merges)")
        return self


class CacheSection(Section):
    """Where a teacher's outputs lie on disk: hidden states at supervised tokens, or the ``k`` likeliest tokens."""

    folder: str
    form: Literal["hidden", "topk"] = "hidden"
    k: Positive = 64


class ServerSection(Section):
    """An OpenAI-compatible server that scores and answers for the teacher.

    ``model`` left out is the teacher's path. Each rank has ``workers`` requests under way at once, of which each may
    take ``timeout`` seconds.
    """

    url: str
    model: str | None = None
    top_logprobs: Positive = 20
    workers: Positive = 16
    timeout: Positive = 300


class TeacherSection(ModelSection):
    """The teacher. ``from_student`` makes it of a LoRA student's own weights, its adapters off.

    ``placement`` is where its weights lie: whole on every rank, each rank's share on its device (``shard``) or in main
    memory, to be fetched layer by layer (``offload``). ``quantize`` keeps those of its linear layers in fewer bits.

    With ``cache``, ``vlm-distill cache`` fills that folder, and a run learns from it without loading the teacher.

    With ``server``, it runs there, and of its ``path`` only tokenizer and image processing are read.
    """

    ways: ClassVar[tuple[str, ...]] = ("path", "decoder", "from_student")
    replaces = {
        "path": ("decoder", "vision_encoder", "projector", "from_student"),
        "decoder": ("path", "from_student", "server"),
        "decoder.name": ("decoder.config",),
        "decoder.config": ("decoder.name",),
        "from_student": (*ModelSection.model_fields, "server", "placement", "quantize", "cache"),
        "server": ("dtype", "attn_implementation", "placement", "quantize", "cache", "from_student"),
        "cache": ("server",),
        "placement": ("server", "quantize"),
        "quantize": ("server", "placement"),
    }
    server: ServerSection | None = None
    from_student: bool = False
    placement: Literal["replicate", "shard", "offload"] = "replicate"
    quantize: Literal["int8", "nf4", "fp8"] | None = None
    cache: CacheSection | None = None

    @model_validator(mode="after")
    def _cached(self) -> TeacherSection:
        if self.cache is not None and self.path is None and not self.from_student:
            raise ValueError("cache: only a teacher with a path can be told from others; save it, and name its folder")
        return self

    @model_validator(mode="after")
    def _own_weights(self) -> TeacherSection:
        if self.from_teacher is not None:
            raise ValueError("from_teacher is for the student; a teacher has a path, or parts")
        more = sorted(self.model_fields_set - {"from_student"})
        if self.from_student and any(getattr(self, name) != type(self).model_fields[name].default for name in more):
            raise ValueError(f"from_student is the student's base as it is; leave {', '.join(more)} out")
        if self.quantize is not None and self.placement != "replicate":
            raise ValueError(
                f"quantize: ZeRO-3 does not {self.placement} weights of fewer bits; use placement: replicate"
            )
        if self.server is not None:
            if self.path is None:
                raise ValueError(
                    "server: give the teacher's path too, whose tokenizer and image processing are read here"
                )
            here = [key for key in ("dtype", "attn_implementation") if getattr(self, key) is not None]
            here += ["placement"] if self.placement != "replicate" else []
            here += [key for key in ("quantize", "cache") if getattr(self, key) is not None]
            if here:
                raise ValueError(f"server: the teacher's weights are there; leave {', '.join(here)} out")
        return self


class LossSection(Section):
    """One term of the loss; parameters beyond name and weight go to the loss itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    weight: Annotated[float, Field(ge=0)] = 1.0


class SourceSection(Section):
    """One source of samples. Where it is not ``labelled``, its answers are placeholders that no loss may read.

    ``columns`` says which keys of the records hold what: our name, then theirs, as ``{image: image_path}``.
    """

    path: str
    name: str | None = None
    images: str | None = None
    format: Literal["auto", "json", "jsonl", "csv", "tsv", "huggingface", "webdataset", "text"] = "auto"
    split: str | None = None
    config: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    labelled: bool = True
    limit: Positive | None = None
    columns: dict[str, str] = {}


class DataSection(Section):
    """``answers: last``, ``max_prompt`` and ``max_response`` are about conversations' last answers (``data.Turns``).

    With ``turns: split`` each answer of a conversation is a sample of its own. ``template_text`` says whether what a
    chat template writes before a plain answer, such as an empty thought, is learnt.
    A run that leaves out more than the share ``max_bad`` of its samples ends.
    """

    train: list[SourceSection] = Field(min_length=1)
    eval: list[SourceSection] = []
    roots: list[str] = []
    max_length: Positive = 2048
    max_prompt: Positive | None = None
    max_response: Positive | None = None
    answers: Literal["all", "last"] = "all"
    turns: Literal["together", "split"] = "together"
    template_text: Literal["prompt", "learn"] = "prompt"
    max_pixels: Positive = 89_478_485
    bad_samples: Literal["skip", "fail"] = "skip"
    max_bad: Fraction = 0.5
    length_window: NotNegative = 0
    packing: bool = False
    workers: NotNegative = 2
    prefetch: Positive = 2


class OptimizerSection(Section):
    """``part_lr`` has learning rates of single parts, in place of ``lr``."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    part_lr: dict[Part, Annotated[float, Field(gt=0)]] = {}
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    min_lr_ratio: Fraction = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0


class WandbSection(Section):
    """Where Weights & Biases shows a run. ``mode: offline`` keeps it on disk, to be sent by ``wandb sync``."""

    project: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = []
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None


class TrainingSection(Section):
    """``timeout`` is in minutes: so long a rank waits for the others. ``on_oom: halve`` starts again with half the
    micro-batch where memory ran out, under this suite's own commands. A run that was told to stop ends with
    ``stopped_exit_code``; left out, it is 130 after SIGINT and 143 after SIGTERM.
    """

    replaces = {"epochs": ("steps",), "steps": ("epochs",)}

    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    steps: Positive | None = None
    batch_size: Positive = 64
    micro_batch_size: Positive | None = None
    dtype: DType = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    activation_checkpointing: bool = False
    seed: NotNegative = 0
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    resume: bool = True
    timeout: Annotated[float, Field(gt=0)] = 30
    on_oom: Literal["fail", "halve"] = "fail"
    stopped_exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    wandb: bool | WandbSection = False

    @model_validator(mode="after")
    def _length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("say how long to train: epochs or steps, one of them")
        return self


class LanguageTrainingSection(TrainingSection):
    """``recompute_logits`` forms the logits in tiles, twice, to save memory.

    ``sequence_parallel`` ranks share the tokens of their samples, which are the same.
    """

    recompute_logits: bool = False
    sequence_parallel: Positive = 1


class DeepSpeedSection(Section):
    """``stage`` of ZeRO, and what else DeepSpeed's own configuration knows, which is passed on.

    What the run sets itself (``deepspeed_keys.set_by_run``) may be repeated here, with the run's value or as ``auto``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    replaces = {"stage": ("zero_optimization.stage",), "zero_optimization.stage": ("stage",)}

    stage: Literal[0, 1, 2, 3] = 2

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
                raise ValueError("zero_optimization.stage is another one than stage; leave one of them out")
            del zero["stage"]
            section = deepspeed_keys.without_auto(section)
        return section

    @model_validator(mode="after")
    def _known_keys(self) -> DeepSpeedSection:
        deepspeed_keys.check_keys(self.extra)
        return self

    @property
    def extra(self) -> dict[str, Any]:
        """What is passed through."""
        return self.model_extra or {}

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer steps in main memory."""
        return self._offloads("offload_optimizer")

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters that are not computed with lie in main memory."""
        return self._offloads("offload_param")

    def _offloads(self, what: str) -> bool:
        place = self.zero.get(what)
        return isinstance(place, dict) and place.get("device", "none") != "none"

    @property
    def zero(self) -> dict[str, Any]:
        """Of that, what is about ZeRO."""
        zero = self.extra.get("zero_optimization")
        return zero if isinstance(zero, dict) else {}


class OnPolicySection(Section):
    """Steps that learn from the student's own answers: a share of all, or with ``adaptive`` one that grows.

    At temperature 0 answers are the likeliest tokens, not drawn.
    """

    fraction: Fraction
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    batch_size: Positive = 64
    replay: Positive | None = None
    adaptive: Annotated[float, Field(gt=0, le=1)] | None = None


class EvaluationSection(Section):
    every: Positive | None = None
    limit: Positive | None = None
    batch_size: Positive = 64
    max_new_tokens: Positive | None = None
    measures: Annotated[list[Measure], Field(min_length=1)] = ["exact"]
    teacher: bool = True
    benchmarks: list[str] = []
    benchmark_data: str | None = None
    rules: Rules = "vlmevalkit"
    best: str | None = None

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationSection:
        if self.best is not None and self.every is None:
            raise ValueError("best chooses among evaluations while training; say how often they are (every)")
        return self


class RunConfig(Section):
    """A run. ``teacher`` may be absent: then only losses that need none are allowed (plain fine-tuning)."""

    student: StudentSection
    teacher: TeacherSection | None = None
    loss: list[LossSection] = Field(min_length=1)
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    training: LanguageTrainingSection
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    evaluation: EvaluationSection = EvaluationSection()
    on_policy: OnPolicySection | None = None
    output: str

    @model_validator(mode="before")
    @classmethod
    def _of_a_classifier(cls, plain: Any) -> Any:
        student = plain.get("student") if isinstance(plain, dict) else None
        if isinstance(student, dict) and "name" in student and not {"path", "decoder", "from_teacher"} & student.keys():
            raise ValueError(
                "this file configures an image classifier (student.name), which only vlm-distill classify takes"
            )
        return plain

    @model_validator(mode="after")
    def _does_something(self) -> RunConfig:
        check_weights(self.loss)
        if self.evaluation.every is not None and not (self.data.eval or self.evaluation.benchmarks):
            raise ValueError(
                "evaluation.every: there is nothing to evaluate; name data.eval or evaluation.benchmarks, or leave "
                "every out"
            )
        return self

    @model_validator(mode="after")
    def _one_voice(self) -> RunConfig:
        values = deepspeed_keys.set_by_run(self, autocast=self.deepspeed.stage == 0)
        deepspeed_keys.check_equal(self.deepspeed.extra, values)
        return self

    @model_validator(mode="after")
    def _on_policy(self) -> RunConfig:
        section = self.on_policy
        if section is not None:
            if self.teacher is None:
                raise ValueError("on_policy: the student's own answers are compared with a teacher; add a teacher")
            if section.adaptive is not None and self.evaluation.best is None:
                raise ValueError("on_policy.adaptive: goes by the score that evaluation.best names; name one")
            if self.teacher.cache is not None:
                raise ValueError("on_policy: no cache holds a teacher's outputs for answers yet to be drawn")
            if self.student.vision_cache is not None:
                raise ValueError("on_policy: the student sees images when it draws answers; leave vision_cache out")
            if self.training.sequence_parallel > 1:
                raise ValueError("on_policy: ranks that share sequences draw no answers; leave sequence_parallel out")
            if section.replay is not None and section.replay < self.training.batch_size:
                raise ValueError("on_policy.replay: fewer answers than a step has samples; keep training.batch_size")
        return self

    @model_validator(mode="after")
    def _student_needs_teacher(self) -> RunConfig:
        if self.teacher is not None and self.teacher.server is not None:
            if self.student.from_teacher is not None:
                raise ValueError("student.from_teacher: the teacher's weights are on its server; name a student")
            if any(source.format == "text" for source in self.data.train):
                raise ValueError("teacher.server scores conversations alone; leave plain text out of data.train")
            if "kl" in self.evaluation.measures:
                raise ValueError("evaluation.measures: kl needs the teacher here, not on a server; leave it out")
            if self.training.recompute_logits:
                raise ValueError("training.recompute_logits: a server tells no hidden states; leave it out")
            if self.data.packing:
                raise ValueError("data.packing: a server scores samples one by one; leave it out")
        if self.student.from_teacher is not None and self.teacher is None:
            raise ValueError("student.from_teacher needs a teacher section to cut from")
        if self.student.from_teacher is not None and self.teacher is not None and self.teacher.quantize is not None:
            raise ValueError("student.from_teacher: no student is cut from weights of fewer bits; leave quantize out")
        if self.student.from_teacher is not None and self.teacher is not None and self.teacher.placement != "replicate":
            raise ValueError(
                "student.from_teacher: no student can be cut from a sharded teacher; use placement: replicate"
            )
        if "kl" in self.evaluation.measures and self.teacher is None:
            raise ValueError("evaluation.measures: kl is that from a teacher, and there is none; leave it out")
        if self.student.tokenizer == TEACHERS and self.teacher is None:
            raise ValueError("student.tokenizer: teacher needs a teacher section to take it from")
        return self

    @model_validator(mode="after")
    def _without_its_body(self) -> RunConfig:
        if self.teacher is not None and self.teacher.cache is not None:
            if self.student.from_teacher is not None:
                raise ValueError("student.from_teacher cuts the teacher itself, which teacher.cache never loads")
            if "kl" in self.evaluation.measures:
                raise ValueError("evaluation.measures: kl asks the teacher itself, which teacher.cache never loads")
        return self

    @model_validator(mode="after")
    def _base_as_teacher(self) -> RunConfig:
        student, stage = self.student, self.deepspeed.stage
        if self.teacher is not None and self.teacher.from_student:
            if student.lora is None or student.trained_whole:
                raise ValueError("teacher.from_student needs a student trained by student.lora alone: its base stays")
            if student.from_teacher is not None:
                raise ValueError("teacher.from_student and student.from_teacher: one of the two must be on disk")
        if student.quantize is not None and stage == 3:
            raise ValueError("student.quantize: ZeRO-3 does not shard weights of 4 bits; choose stage 0, 1 or 2")
        return self


def check_weights(losses: Sequence[LossSection]) -> None:
    """Raise ``ValueError`` where all losses have weight 0, so that nothing would be learnt."""
    if all(section.weight == 0 for section in losses):
        raise ValueError("loss: every weight is 0, so that nothing would be learnt; give one of them a weight above 0")


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
    def max_bad(self) -> float: ...


class AnyOptimizer(Protocol):
    @property
    def max_grad_norm(self) -> float | None: ...


def split_batch(config: AnyRun, world: int) -> tuple[int, int]:
    """Return a rank's micro-batch and the micro-batches of a step; their product over ranks is the batch size.

    Ranks that share their samples count as one.

    Raises:
        UserError: the batch size is no multiple of them, or the ``deepspeed`` section says something else.
    """
    shared = getattr(config.training, "sequence_parallel", 1)
    if world % shared:
        raise UserError(f"training.sequence_parallel: {world} rank(s) are no multiple of {shared}; change one of them")
    world //= shared
    batch = config.training.batch_size
    micro = config.training.micro_batch_size or max(1, batch // world)
    if batch % (micro * world):
        per = micro * world
        near = sorted({max(per, batch // per * per), (batch // per + 1) * per})
        raise UserError(
            f"training.batch_size: {batch} is not divisible by micro_batch_size {micro} × {world} rank(s); "
            f"nearest that are: {', '.join(map(str, near))}"
        )
    accumulation = batch // (micro * world)
    source = f"training.batch_size and micro_batch_size on {world} rank(s)"
    values = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    try:
        deepspeed_keys.check_equal(
            config.deepspeed.extra, {key: deepspeed_keys.Set(value, source) for key, value in values.items()}
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return micro, accumulation


def halved(config: AnyRun, world: int) -> int | None:
    """The largest micro-batch up to half of the run's with which its batch still comes out even; ``None`` after 1."""
    micro, accumulation = split_batch(config, world)
    return next((m for m in range(micro // 2, 0, -1) if micro * accumulation % m == 0), None)
