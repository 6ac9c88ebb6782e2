"""What a classifier's run will cost: parameters, memory by ZeRO stage, operations. No weight is loaded.

The models are built without values, and a micro-batch goes through them, forward and backward. What ZeRO
holds beside that is computed as for the other path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data.classification import LabelledImages
from data.errors import UserError, first_line
from data.mixture import Mixture
from vlm_distill.config.batch_split import split_batch
from vlm_distill.losses import FeatureTerm, wanted_features
from vlm_distill.planning import CONTEXT, FRAGMENTATION, STAGES, UTILISATION, Plan, budget_of
from vlm_distill.planning.memory import BUCKET, PERSISTENT, Sizes, rank_memory, zero3_elements
from vlm_distill.planning.models import Part
from vlm_distill.planning.simulation import Meter, Micro, marked_gradients
from vlm_distill.training.optimizers import classifier_optimizer

from .build import build_terms, load_model, load_models, open_sources, prepare_losses
from .classifier import Classifier
from .config import ClassifierConfig, OptimizerSection
from .task import ClassificationTask
from .teacher import Teacher

#: Up to this micro-batch, the second simulated one has eight times its size; above, it has two images.
_FAR = 16


def plan(config: ClassifierConfig, *, gpus: int = 1, memory: float | None = None, device: str = "h100") -> Plan:
    """Compute what a run will cost, except its time, which nothing but running it tells.

    Args:
        config: of the run.
        gpus: number of ranks.
        memory: of a GPU, in GB; default: the device's.
        device: a name in ``devices.DEVICES``, or ``cpu``.

    Raises:
        UserError: the device is unknown, a model cannot be built, or the run itself would be refused.
    """
    budget = budget_of(device, memory)
    allowance = 0.0 if device == "cpu" else CONTEXT + FRAGMENTATION * budget
    micro, accumulation = split_batch(config, gpus)
    sources = _open_data(config)
    states = _state_bytes(config.optimizer)

    # Build the models without weights, and simulate micro-batches of two sizes.
    with Meter() as meter:
        planned = _Planned(config, _classes(config, sources), states, on_cpu=device == "cpu")
        points = {size: planned.measure(meter, size) for size in (micro, 8 * micro if micro <= _FAR else 2)}

    # Add what ZeRO holds.
    stages = [stage for stage in STAGES if stage == config.deepspeed.stage or planned.works_at(stage)]
    placement = "none" if planned.teacher is None else "replicate"
    limit = budget - allowance
    rows = [rank_memory(planned.sizes, points, micro, s, placement, gpus, accumulation, limit) for s in stages]
    typical = points[micro]
    return Plan(
        parts=planned.parts(),
        sequences=None,
        memory=tuple(rows),
        configured=stages.index(config.deepspeed.stage),
        gpus=gpus,
        device=device,
        budget=budget,
        allowance=allowance,
        utilisation=UTILISATION,
        steps=_steps(config, sources),
        batch_size=config.training.batch_size,
        flops=float(typical.student_flops + typical.teacher_flops) * accumulation * gpus,
        tokens=0.0,
        bytes_read=0.0,
        seconds=None,
        remarks=tuple(planned.remarks),
    )


# Data


def _open_data(config: ClassifierConfig) -> list[LabelledImages]:
    """Return the sources of training data; none if they are not there yet."""
    try:
        return open_sources(config.data.train, "data.train")
    except UserError:
        missing = [section.path for section in config.data.train if not Path(section.path).exists()]
        if not missing:
            raise
        if config.training.steps is None:
            raise UserError(
                f"cannot plan training.epochs: {missing[0]} (data.train) was not found; set training.steps, or point "
                "data.train at the data"
            ) from None
        return []


def _steps(config: ClassifierConfig, sources: Sequence[LabelledImages]) -> int:
    if config.training.steps is not None:
        return config.training.steps
    weights = [section.weight for section in config.data.train]
    mixture = Mixture(sources, weights, batch_size=config.training.batch_size)
    return math.ceil((config.training.epochs or 0) * mixture.steps_per_epoch)


def _classes(config: ClassifierConfig, sources: Sequence[LabelledImages]) -> Sequence[str]:
    """Return the data's classes, or without data as many as the models have."""
    if sources:
        return sources[0].classes
    sections = [section for section in (config.student, config.teacher) if section is not None]
    known = next((section.num_classes for section in sections if section.num_classes is not None), None)
    trained = config.teacher is not None and (config.teacher.pretrained or config.teacher.weights)
    if known is None and config.teacher is not None and trained:
        known = load_model(config.teacher, (), "teacher").num_classes
    if known is None:
        raise UserError("data.train, which gives the number of classes, was not found; set student.num_classes")
    return [str(number) for number in range(known)]


# Models


class _Planned:
    """The task of a run without weights. Made inside a ``Meter``.

    Args:
        config: the run.
        classes: the data's.
        states: bytes of the optimizer's states per trained parameter.
        on_cpu: whether the ranks are on a CPU.

    Attributes:
        student, teacher: the models; the teacher's also if no loss learns from it.
        sizes: what decides how much ZeRO holds.
        remarks: what the plan assumes and leaves out.
    """

    def __init__(self, config: ClassifierConfig, classes: Sequence[str], states: float, *, on_cpu: bool) -> None:
        self.config, self.autocast = config, config.training.dtype == "bf16"
        terms = build_terms(config)
        self.teacher, self.student = load_models(config, classes)
        self.learns = any("teacher" in term.loss.needs for term in terms)
        self.student.train()
        prepare_losses(terms, self.student, self.teacher if self.learns else None)
        if config.training.activation_checkpointing:
            self.student.checkpoint_activations()
        self.taught = wanted_features([term for term in terms if isinstance(term, FeatureTerm)])[1]
        self.task = ClassificationTask(self.student, terms, views=len(config.data.views))
        self.remarks = self._left_out()
        self.sizes = self._sizes(states, on_cpu)

    def _left_out(self) -> list[str]:
        found = ["not planned: time, which depends on how well the device runs these layers; run twenty steps"]
        if self.config.training.compile:
            found.append("not planned: what torch.compile saves")
        if self.config.teacher is not None and self.config.teacher.cache is not None:
            found.append("assumed: the teacher runs, as it does until its cache is filled")
        return found

    def works_at(self, stage: int) -> bool:
        """Return whether the run could use a ZeRO stage."""
        if stage == 3 and self.config.training.ema is not None:
            return False
        try:
            self._optimizer(stage)
        except UserError:
            return False
        return True

    def _optimizer(self, stage: int) -> torch.optim.Optimizer:
        return classifier_optimizer(self.student.model, self.task.losses, self.config.optimizer, stage)

    def _sizes(self, states: float, on_cpu: bool) -> Sizes:
        deepspeed = self.config.deepspeed
        groups = [group["params"] for group in self._optimizer(deepspeed.stage).param_groups]
        trained = [p for p in self.student.parameters() if p.requires_grad]
        persistent = zero3_elements(deepspeed, "param_persistence_threshold", PERSISTENT)
        bucket = deepspeed.zero.get("reduce_bucket_size")
        whole = _bytes(self.student)
        if self.config.training.ema is not None:
            whole *= 2  # the average
        teacher = 0 if self.teacher is None else _bytes(self.teacher)
        return Sizes(
            total=_count(list(self.student.parameters())),
            trained=_count(trained),
            learned=_count(list(self.task.losses.parameters())),
            largest=max(p.numel() for p in trained),
            group=max(_count(group) for group in groups),
            small=sum(p.numel() for p in self.student.parameters() if p.numel() < persistent),
            bucket=bucket if isinstance(bucket, int) else BUCKET,
            bf16=False,  # autocast at every stage
            on_cpu=on_cpu,
            deepspeed=deepspeed,
            weights=lambda stage: float(whole),
            teacher=lambda placement, stage: float(teacher),
            states=states,
        )

    def parts(self) -> tuple[Part, ...]:
        """Return the parts of both models."""
        found: list[Part] = []
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            if model is None:
                continue
            head = {id(p): p for layer in model.head() for p in layer.parameters()}
            body = [p for p in model.parameters() if id(p) not in head]
            for name, parameters in (("body", body), ("head", list(head.values()))):
                trained = [p for p in parameters if p.requires_grad] if role == "student" else []
                found.append(Part(role, name, _count(parameters), _count(trained)))
        return tuple(found)

    def measure(self, meter: Meter, size: int) -> Micro:
        """Simulate a micro-batch of ``size`` images.

        Raises:
            UserError: a model's own code depends on values, which do not exist without weights.
        """
        try:
            return self._simulate(meter, size)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"plan: these models cannot run without weights: {first_line(error)}") from error

    def _simulate(self, meter: Meter, size: int) -> Micro:
        images, shown, held = self._images(meter, size)
        kept, teacher_peak, teacher_flops, outputs = 0, 0, 0, None
        if shown is not None:
            assert self.teacher is not None
            dtype = torch.bfloat16 if self.autocast else None
            with meter.counting():
                outputs = Teacher(self.teacher, None, self.taught, dtype=dtype).outputs(shown)
            teacher_peak, teacher_flops = meter.peak, meter.flops
            kept = outputs.logits.nbytes + sum(feature.nbytes for feature in outputs.features.values())
        with meter.counting(), marked_gradients(meter, self.student):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                found = self.student(images, self.task.features)
            # In place of the losses, whose code reads values: their own memory is a few numbers an image and class.
            given = [found.logits, *found.features.values()]
            given += [] if found.distilled is None else [found.distilled]
            loss = torch.stack([tensor.float().sum() for tensor in given]).sum()
            del found, given
            loss.backward()
            del loss
        self.student.zero_grad(set_to_none=True)
        return Micro(
            teacher=teacher_peak + held,
            student=meter.passing + kept + held,
            keeping=meter.peak + kept + held,
            student_flops=meter.flops,
            teacher_flops=teacher_flops,
        )

    def _images(self, meter: Meter, size: int) -> tuple[Tensor, Tensor | None, int]:
        """Return a micro-batch without values: the student's images, the teacher's if it teaches, and all its bytes."""
        data, own = self.config.data, self.student.inputs
        count = len(data.views) * size
        with meter.fake:
            images, shown = torch.empty(count, 3, *own.size), None
            if self.teacher is not None and self.learns:
                other = self.teacher.inputs
                same = (other.size, other.mean, other.std) == (own.size, own.mean, own.std)
                shown = images if same else torch.empty(count, 3, *other.size)
        # Bytes of the pixels as workers make them, and the labels' shares of mixed images.
        held = images.nbytes + images.numel()
        if shown is not None and shown is not images:
            held += shown.nbytes
        if data.mixing.mixup or data.mixing.cutmix:
            held += 4 * size * self.student.num_classes
        return images, shown, held


def _bytes(model: Classifier) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _state_bytes(section: OptimizerSection) -> float:
    """Return the bytes that an optimizer keeps for each trained parameter, seen in a step of a small layer."""
    layer = nn.Linear(64, 64, bias=False)
    alone = section.model_copy(update={"layer_decay": None})
    optimizer = classifier_optimizer(layer, nn.ModuleDict(), alone, 0)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in states if value.ndim) / layer.weight.numel()
