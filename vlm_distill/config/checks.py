"""Rules that hold between sections of a VLM run, as a table: when a run is wrong, and what to say then."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from data.errors import UserError
from vlm_distill.losses import REGISTRY, LossError, Registry

# A run is `sections.RunConfig`, whose validation reads this table; imported here, that would be a circle.
Run = Any


class Rule(NamedTuple):
    """A rule between sections.

    Attributes:
        broken: whether a run breaks it.
        message: the key, why its value cannot work, and what to do.
    """

    broken: Callable[[Run], bool]
    message: str


class Named(Protocol):
    """A term of the loss."""

    @property
    def name(self) -> str: ...
    @property
    def model_extra(self) -> dict[str, Any] | None: ...
    @property
    def weight(self) -> float: ...


def check_run(run: Run) -> None:
    """Raise ``ValueError`` with the message of the first rule that a run breaks."""
    check_lessons(run)
    for rule in RULES:
        if rule.broken(run):
            raise ValueError(rule.message)
    check_terms(run)


def check_lessons(run: Run) -> None:
    """Raise ``ValueError`` unless every source names its teachers where there are several, and none does otherwise."""
    if run.teacher is not None and run.teachers:
        raise ValueError("teacher and teachers: a run has one teacher or several; leave one of the two out")
    for name in run.teachers:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"teachers.{name}: name teachers by letters, digits and _")
    known = ", ".join(run.teachers)
    for source in [*run.data.train, *run.data.eval]:
        for name in source.lesson:
            if name not in run.teachers:
                raise ValueError(f"data: the teacher {name} of {source.path} is not among teachers ({known or 'none'})")
    if not run.teachers:
        return
    teaching: set[str] = set()
    for source in run.data.train:
        if not source.lesson:
            raise ValueError(f"data.train: {source.path} has no teacher; name one of teachers ({known})")
        teaching.update(source.lesson)
    idle = [name for name in run.teachers if name not in teaching]
    if idle:
        raise ValueError(f"teachers.{idle[0]}: teaches no source of data.train; name it there, or leave it out")


def check_terms(run: Run) -> None:
    """Raise ``LossError`` for terms that cannot be built, or would never learn.

    Imports neither torch nor a plug-in. A plug-in's terms are checked once its class has been imported: call it again.
    """
    check_losses(run.loss, REGISTRY, has_teacher=bool(run.all_teachers))
    _check_answers(run)
    for term in run.loss:
        if term.match != "none" and term.on != "images" and not REGISTRY.entry(term.name).matches:
            raise LossError(
                f"loss {term.name} compares no image tokens; leave match: {term.match} out, or add on: images"
            )


def check_losses(losses: Sequence[Named], known: Registry[Any], *, has_teacher: bool) -> None:
    """Raise ``LossError`` for losses that cannot be built, without importing torch; their values are checked then.

    Args:
        losses: terms of the loss.
        known: the losses of this path.
        has_teacher: whether the run has a teacher.
    """
    for term in losses:
        entry = known.check(term.name, term.model_extra or {})
        if "teacher" in entry.needs and not has_teacher:
            raise LossError(f"loss {term.name} needs a teacher; add a teacher section or use cross_entropy alone")
    if all(term.weight == 0 for term in losses):
        raise LossError("loss: every weight is 0, so nothing would be learnt; give one of them a weight above 0")


def _check_answers(run: Run) -> None:
    """Raise ``LossError`` if a term, or a kind of step, would never learn anything because of ``answers``."""
    policy = run.on_policy
    always_own = policy is not None and policy.fraction == 1 and not policy.pairs
    for term in run.loss:
        if term.answers == "own" and policy is None:
            raise LossError(
                f"loss {term.name}: answers: own are the student's, which on_policy draws; add that section, or leave "
                "answers out"
            )
        if term.answers == "own" and "targets" in REGISTRY.entry(term.name).needs:
            raise LossError(
                f"loss {term.name} learns from right answers, and the student's own may be wrong; "
                "leave answers: own out"
            )
        if term.answers == "data" and always_own:
            raise LossError(
                f"loss {term.name}: with on_policy.fraction 1 no step has the data's answers; set on_policy.pairs, or "
                "leave answers: data out"
            )
    if policy is not None and not always_own and all(term.answers == "own" for term in run.loss):
        raise LossError(
            "loss: every term has answers: own, so nothing would be learnt from the data's answers; set "
            "on_policy.fraction to 1 and pairs to false, or give a term answers: data or both"
        )


def check_caches(run: Run) -> None:
    """Raise ``UserError`` if a run that shall fill its caches names none."""
    if not _cached(run) and run.student.vision_cache is None:
        raise UserError(
            "teacher.cache: no cache to fill; set teacher.cache.folder for the teacher's outputs, or "
            "student.vision_cache for the features of a frozen vision encoder"
        )


def _served(run: Run) -> bool:
    return any(teacher.server is not None for teacher in run.all_teachers.values())


def _scored(run: Run) -> bool:
    """Return whether a server returns log-probabilities of tokens instead of hidden states."""
    servers = [teacher.server for teacher in run.all_teachers.values()]
    return any(server is not None and server.form != "hidden" for server in servers)


def _cached(run: Run) -> bool:
    return any(teacher.cache is not None for teacher in run.all_teachers.values())


def _cut(run: Run) -> bool:
    """Return whether the student is cut from a teacher that is given."""
    return run.student.from_teacher is not None and run.teacher is not None


def _takes_projector(run: Run) -> bool:
    """Return whether the student takes its teacher's projector."""
    return (run.student.projector or {}).get("type") == "teacher"


def _from_student(run: Run) -> bool:
    """Return whether the student, or its base, is the teacher."""
    return run.teacher is not None and run.teacher.from_student


def _viewed(run: Run) -> bool:
    """Return whether a teacher sees something else than the student."""
    return any(teacher.view is not None for teacher in run.all_teachers.values())


def _sends_adapter(run: Run) -> bool:
    return run.on_policy is not None and run.on_policy.server is not None and run.on_policy.server.adapter


def _draws_elsewhere(run: Run) -> bool:
    return run.on_policy is not None and run.on_policy.server is not None


def _corrects(run: Run) -> bool:
    return run.on_policy is not None and run.on_policy.importance is not None


def _weighs(run: Run) -> bool:
    return run.on_policy is not None and run.on_policy.visual_advantage is not None


def _sees_full_images(run: Run) -> bool:
    views = [teacher.view for teacher in run.all_teachers.values() if teacher.view is not None]
    return any(view.images == "full" for view in views)


def _sees_no_images(run: Run) -> bool:
    return any(teacher.view is not None and teacher.view.images == "none" for teacher in run.all_teachers.values())


def _mixes(run: Run, combine: str) -> bool:
    return any(source.combine == combine for source in run.data.train)


def _measures_kl(run: Run) -> bool:
    return "kl" in run.evaluation.measures


RULES = (
    Rule(
        lambda run: run.evaluation.every is not None and not (run.data.eval or run.evaluation.benchmarks),
        "evaluation.every: there is nothing to evaluate; name data.eval or evaluation.benchmarks, or leave every out",
    ),
    # On-policy answers: drawn by the student while it trains, so that nothing about them can be known before.
    Rule(
        lambda run: run.on_policy is not None and not run.all_teachers,
        "on_policy needs a teacher section to compare the student's answers with",
    ),
    Rule(
        lambda run: run.on_policy is not None and run.on_policy.adaptive is not None and run.evaluation.best is None,
        "on_policy.adaptive follows the score that evaluation.best names; name one",
    ),
    Rule(
        lambda run: run.on_policy is not None and _cached(run),
        "on_policy: a cache cannot hold a teacher's outputs for answers yet to be drawn; leave teacher.cache out",
    ),
    Rule(
        lambda run: run.on_policy is not None and run.student.vision_cache is not None,
        "on_policy: the student needs the images themselves to draw answers; leave student.vision_cache out",
    ),
    Rule(
        lambda run: run.on_policy is not None and run.training.sequence_parallel > 1,
        "on_policy: ranks that share sequences cannot draw answers; leave training.sequence_parallel out",
    ),
    Rule(
        lambda run: (
            run.on_policy is not None
            and run.on_policy.replay is not None
            and run.on_policy.replay < run.training.batch_size
        ),
        "on_policy.replay: holds fewer answers than a step has samples; make it at least training.batch_size",
    ),
    Rule(
        lambda run: run.on_policy is not None and run.on_policy.pairs and run.on_policy.replay is not None,
        "on_policy.replay: kept answers are to other questions than a step's own, which pairs compares; leave one out",
    ),
    Rule(
        lambda run: (
            run.on_policy is not None
            and run.on_policy.balance != "even"
            and {term.answers for term in run.loss} == {"both"}
        ),
        "on_policy.balance: weighs terms with answers: data against those with answers: own; give the terms answers",
    ),
    Rule(
        lambda run: _weighs(run) and _served(run),
        "on_policy.visual_advantage: a server is asked about the images alone; load the teacher here, or leave it out",
    ),
    Rule(
        lambda run: _weighs(run) and _sees_no_images(run),
        "on_policy.visual_advantage: the teacher sees no images (teacher.view); leave one of the two out",
    ),
    Rule(
        lambda run: _corrects(run) and run.on_policy is not None and run.on_policy.temperature != 1,
        "on_policy.importance: probabilities of drawn tokens are known at temperature 1 alone; set "
        "on_policy.temperature to 1, or leave it out",
    ),
    Rule(
        lambda run: (
            _corrects(run) and run.on_policy is not None and run.on_policy.replay is None and not _draws_elsewhere(run)
        ),
        "on_policy.importance: the student draws every answer in the step that learns from it; add replay or a server, "
        "or leave it out",
    ),
    Rule(
        lambda run: _draws_elsewhere(run) and run.student.path is None,
        "on_policy.server: vLLM starts from the student's own files; name student.path",
    ),
    Rule(
        lambda run: _draws_elsewhere(run) and run.student.quantize is not None and not _sends_adapter(run),
        "on_policy.server: adapters cannot be merged into 4-bit weights for the server; set on_policy.server.adapter, "
        "or leave student.quantize out",
    ),
    Rule(
        lambda run: _sends_adapter(run) and run.student.lora is None,
        "on_policy.server.adapter: the student has no adapter; give it student.lora, or leave adapter out",
    ),
    Rule(
        lambda run: (
            _sends_adapter(run)
            and run.student.lora is not None
            and [*run.student.lora.parts, *run.student.trained_whole] != ["decoder"]
        ),
        "on_policy.server.adapter: a server takes adapters on the decoder alone; let nothing else train "
        "(student.train, student.lora.parts), or leave adapter out",
    ),
    # A teacher behind a server: it scores conversations token by token, and its weights are elsewhere.
    Rule(
        lambda run: _served(run) and run.student.from_teacher is not None,
        "student.from_teacher: the teacher's weights are on its server; name a student",
    ),
    Rule(
        lambda run: _served(run) and any(source.format == "text" for source in run.data.train),
        "teacher.server scores conversations, not plain text; leave plain text out of data.train",
    ),
    Rule(
        lambda run: _served(run) and _measures_kl(run),
        "evaluation.measures: 'kl' needs the teacher's weights, which are on its server; leave 'kl' out",
    ),
    Rule(
        lambda run: _scored(run) and run.training.recompute_logits,
        "training.recompute_logits: needs the teacher's hidden states; set teacher.server.form to hidden, or leave it "
        "out",
    ),
    Rule(
        lambda run: _viewed(run) and any(source.format == "text" for source in run.data.train),
        "teacher.view changes questions, and plain text has none; leave it out, or plain text out of data.train",
    ),
    # A student pruned from its teacher: the teacher's weights must be here, in full precision.
    Rule(
        lambda run: run.student.from_teacher is not None and not run.all_teachers,
        "student.from_teacher needs a teacher section to cut from",
    ),
    Rule(
        lambda run: _cut(run) and run.teacher.quantize is not None,
        "student.from_teacher: a student cannot be cut from quantized weights; leave teacher.quantize out",
    ),
    # A student that takes its teacher's projector: the teacher must have whole weights here.
    Rule(
        lambda run: _takes_projector(run) and (run.teacher is None or _from_student(run)),
        "student.projector: 'teacher' needs a teacher section with a model of its own",
    ),
    Rule(
        lambda run: _takes_projector(run) and (_served(run) or _cached(run)),
        "student.projector: 'teacher' copies weights that a served or cached teacher does not load; name a type",
    ),
    Rule(
        lambda run: (
            _takes_projector(run) and (run.teacher.placement != "replicate" or run.teacher.quantize is not None)
        ),
        "student.projector: 'teacher' copies whole weights; use teacher.placement: replicate without teacher.quantize",
    ),
    Rule(
        lambda run: _takes_projector(run) and run.student.vision_encoder is None,
        "student.projector: 'teacher' needs a student assembled from parts; name student.vision_encoder",
    ),
    Rule(
        lambda run: _measures_kl(run) and not run.all_teachers,
        "evaluation.measures: 'kl' needs a teacher section",
    ),
    Rule(
        lambda run: run.student.tokenizer == "teacher" and not run.all_teachers,
        "student.tokenizer: 'teacher' needs a teacher section",
    ),
    # A cached teacher is never loaded.
    Rule(
        lambda run: _cached(run) and run.student.from_teacher is not None,
        "student.from_teacher cuts the teacher's own weights, which teacher.cache never loads; leave one of them out",
    ),
    Rule(
        lambda run: _cached(run) and _measures_kl(run),
        "evaluation.measures: 'kl' runs the teacher, which teacher.cache never loads; leave one of them out",
    ),
    # The student itself as the teacher.
    Rule(
        lambda run: _from_student(run) and run.student.from_teacher is not None,
        "teacher.from_student and student.from_teacher: one of the two models must be on disk",
    ),
    Rule(
        lambda run: _from_student(run) and run.student.quantize is not None and run.teacher.ema is not None,
        "teacher.ema: 4-bit weights are not copied; leave student.quantize or ema out",
    ),
    Rule(
        lambda run: _sees_full_images(run) and not (_from_student(run) and run.student.image),
        "teacher.view.images: 'full' is for teacher.from_student where student.image makes images smaller; other "
        "teachers have a teacher.image of their own; leave it out",
    ),
    # Several teachers: nothing that is one teacher's alone.
    Rule(
        lambda run: run.teachers and run.student.from_teacher is not None,
        "student.from_teacher: cuts the student from a single teacher; name a student, or leave teachers out",
    ),
    Rule(
        lambda run: run.teachers and run.student.tokenizer == "teacher",
        "student.tokenizer: 'teacher' means a single teacher; name the tokenizer",
    ),
    Rule(
        lambda run: any(teacher.from_student for teacher in run.teachers.values()),
        "teachers: the student itself cannot be one of several teachers; leave from_student out",
    ),
    Rule(
        lambda run: run.teachers and _measures_kl(run),
        "evaluation.measures: 'kl' is measured against a single teacher; leave 'kl' out",
    ),
    Rule(
        lambda run: run.teachers and _weighs(run),
        "on_policy.visual_advantage: answers are weighed by a single teacher's probabilities; leave it or teachers out",
    ),
    Rule(
        lambda run: run.teachers and run.training.sequence_parallel > 1,
        "training.sequence_parallel: works with a single teacher; leave it or teachers out",
    ),
    Rule(
        lambda run: _mixes(run, "probabilities") and run.training.recompute_logits,
        "data.train.combine: a mean of probabilities needs whole rows of logits, which training.recompute_logits never "
        "forms; leave it out, or combine losses or logits",
    ),
    # Optimizers: ZeRO hands them flat slices of all parameters, and may keep their states in main memory.
    Rule(
        lambda run: run.optimizer.name == "muon" and run.deepspeed.stage == 3,
        "optimizer.name: 'muon' reads whole matrices, which ZeRO 3 cuts up; choose deepspeed.stage 0, 1 or 2",
    ),
    Rule(
        lambda run: run.optimizer.name == "muon" and run.optimizer.max_grad_norm is not None,
        "optimizer.max_grad_norm: ZeRO would clip the updates of 'muon', not its gradients; set it to null",
    ),
    Rule(
        lambda run: run.optimizer.name == "adamw8bit" and run.deepspeed.stage == 3,
        "optimizer.name: 'adamw8bit' does not work under ZeRO 3; choose deepspeed.stage 0, 1 or 2",
    ),
    Rule(
        lambda run: run.optimizer.name in ("adamw8bit", "muon") and run.deepspeed.offloads_optimizer,
        "optimizer.name: 'adamw8bit' and 'muon' cannot step in main memory; leave offload_optimizer out, or choose "
        "'adamw' or 'sgd'",
    ),
    Rule(
        lambda run: run.student.quantize is not None and run.deepspeed.stage == 3,
        "student.quantize: ZeRO-3 cannot shard 4-bit weights; choose deepspeed.stage 0, 1 or 2",
    ),
)
