"""A run's models without weights, built as the run builds them, and what they and a micro-batch of theirs cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from data.batch import DistillationBatch
from data.encoding import Pair
from data.errors import UserError, first_line
from vlm_distill.caching.check_features import frozen_vision
from vlm_distill.caching.check_tokens import check_top_k
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import Term
from vlm_distill.models.common import DTYPES
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.quantize import BITS, quantised_weights
from vlm_distill.run import Run
from vlm_distill.training.optimizers import state_bytes
from vlm_distill.training.schedule import lr_scales, parameter_groups
from vlm_distill.training.student_cut import describe_kept

from .memory import BUCKET, PERSISTENT, Sizes, zero3_elements
from .simulation import HeadCost, Meter, Micro, losses_cost, simulate


@dataclass(frozen=True)
class Part:
    """One part of a model and its numbers of parameters."""

    model: str
    name: str
    parameters: int
    trained: int


class PlannedRun(Run):
    """A run without weights; in place of cached features of images it reads zeros of the same shapes."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._shapes: dict[tuple[tuple[int, int], ...], torch.Size] = {}

    @cached_property
    def image_features(self) -> Callable[[Sequence[Image.Image]], Tensor] | None:
        if self.config.student.vision_cache is None:
            return None
        frozen_vision(self.student)  # raises what the run would raise
        return self.blank_features

    def blank_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return zeros, as many as a cache of features holds for these images."""
        sizes = tuple(image.size for image in images)
        if sizes not in self._shapes:
            with torch.no_grad():
                (seen,) = self.student.encode_images([self.student.processor.image_row(images)])
            self._shapes[sizes] = seen.shape
        return torch.zeros(self._shapes[sizes], dtype=DTYPES[self.config.training.dtype])

    def feature_bytes(self, images: Sequence[Image.Image]) -> int:
        """Return how many bytes the run reads from its cache of features for a sample's images."""
        if self.image_features is None:
            return 0
        return sum(self.blank_features(group).nbytes for group in self.student.processor.image_groups(images))


class Models:
    """The models of a run without weights, and what they cost. Made inside a ``Meter``.

    Args:
        run: whose parts these are.
        device: ``cpu``, or a GPU.

    Attributes:
        student, teacher: the models; the teacher's also if its outputs are cached, but not if it is on a server.
        head: the teacher's lm head, if its hidden states are known.
        head_alone: whether no other part of the teacher is loaded.
        learns: whether a loss learns from the teacher.
        likeliest: how many of the teacher's likeliest tokens are known, 0: only the answers' own are; ``None``: all.
        shared: whether the teacher is the student's own base.
        remarks: what the plan assumes.
    """

    def __init__(self, run: PlannedRun, device: str) -> None:
        config, section = run.config, run.config.teacher
        self.config, self.run, self.on_cpu = config, run, device == "cpu"
        self.cache = None if section is None else section.cache
        if self.cache is not None and self.cache.form == "topk":
            _ = run.grouped  # cuts the heads
            check_top_k(self.cache, run.student.head.vocabulary or 0)
        run.prepare()

        teacher = run.teacher
        self.student, self.teacher = run.student, None if teacher is None else teacher.model
        self.learns, self.same_encoder = run.loss_teacher is not None, run.same_encoder
        self.shared = config.taught_by_base
        self.beside = 0 if teacher is None else teacher.bytes_beside
        self.likeliest = None if teacher is None else teacher.likeliest
        if self.cache is not None:
            self.likeliest = self.cache.likeliest
        self.head = None if teacher is None or self.likeliest is not None else teacher.head
        self.head_alone = self.head is not None and (self.teacher is None or self.cache is not None)
        self.bf16 = config.training.dtype == "bf16"
        self.autocast = self.bf16 and config.deepspeed.stage == 0
        self.sizes = self._sizes()
        self.remarks = self._assumptions()

        # From stage 1 on, DeepSpeed's working copy is in bf16.
        if self.bf16 and not self.autocast:
            for parameter in self.student.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    def _assumptions(self) -> tuple[str, ...]:
        """Return what is taken for granted, or left out of the plan."""
        config, run = self.config, self.run
        found = list(run.packing.remarks)
        if run.kept is not None:
            assert self.teacher is not None
            found.append(f"the student keeps of its teacher: {describe_kept(run.kept, self.teacher, which=False)}")
        if any(run.packing.packed):
            found.append("assumed: the models keep packed samples apart (the run tries it)")
        if any(section.server is not None for section in config.all_teachers.values()):
            found.append("not planned: the teacher's server, and the time that it takes to answer")
        if run.members:
            found.append("assumed: the longest sample's teachers teach all samples of a micro-batch")
        if config.on_policy is not None:
            found.append("not planned: the time that the student takes to draw its answers")
        if run.same_encoder:
            runs = "runs once, for both" if run.shared_vision else "does not run"
            found.append(f"assumed: the frozen vision encoder is the teacher's, and {runs}")
        if run.sequence is not None:
            found.append("assumed: the decoders can be divided over ranks (the run tries it)")
        return tuple(found)

    def _sizes(self) -> Sizes:
        optimizer, deepspeed = self.config.optimizer, self.config.deepspeed
        scales = lr_scales(self.student.parts, optimizer.part_lr, optimizer.lr)
        groups = parameter_groups(self.student, optimizer.weight_decay, scales)
        bucket = deepspeed.zero.get("reduce_bucket_size")
        persistent = zero3_elements(deepspeed, "param_persistence_threshold", PERSISTENT)
        counts = [(p.numel(), p.requires_grad) for p in self.student.parameters()]
        return Sizes(
            total=sum(count for count, _ in counts),
            trained=sum(count for count, trains in counts if trains),
            learned=sum(_count(list(term.loss.parameters())) for term in self.run.terms),
            largest=max(count for count, trains in counts if trains),
            group=max(_count(group["params"]) for group in groups),
            small=sum(count for count, _ in counts if count < persistent),
            bucket=bucket if isinstance(bucket, int) else BUCKET,
            bf16=self.bf16,
            on_cpu=self.on_cpu,
            deepspeed=deepspeed,
            weights=self.parameter_bytes,
            teacher=self.teacher_bytes,
            states=state_bytes(self.student, optimizer, self.student.head.parameters),
            several=[self._member_bytes(name) for name in self.run.members],
        )

    def _member_bytes(self, name: str) -> tuple[str, float]:
        """Return where one of several teachers is, and the bytes of its weights, unsharded."""
        section, model = self.config.teachers[name], _model_of(self.run.members[name])
        if model is None or section.cache is not None:
            return "replicate", sum(p.nbytes for p in self._lone_head(name))
        placement = section.quantize or section.placement
        return placement, _weight_bytes(model, placement)

    def _lone_head(self, name: str) -> list[nn.Parameter]:
        """Return the lm head of one of several teachers, if that is all that is loaded of it."""
        cache, teacher = self.config.teachers[name].cache, self.run.members[name].teacher
        if teacher is None or teacher.head is None:
            return []
        alone = teacher.model is None if cache is None else cache.form == "hidden"
        return list(teacher.head.parameters) if alone else []

    def placements(self) -> tuple[str, list[str]]:
        """Return the teacher's placement as configured, and all that are worth comparing."""
        section = self.config.teacher
        if self.run.members:
            return "several", ["several"]
        if self.cache is not None:
            return "cached", ["cached"]
        if section is not None and section.server is not None:
            return "served", ["served"]
        if section is None or self.shared:
            return "none", ["none"]
        if section.from_student:
            return "replicate", ["replicate"]
        if section.quantize is not None:
            return section.quantize, ["replicate", section.quantize]
        return section.placement, list(dict.fromkeys(["replicate", "shard", section.placement]))

    def parts(self) -> tuple[Part, ...]:
        """Return the parts of both models that a rank holds."""
        found = _parts_of("student", self.student)
        for name, model in self.run.running_members.items():
            found += _parts_of(name, model)
        for name in self.run.members:
            if head := self._lone_head(name):
                found.append(Part(name, "lm_head", _count(head), 0))
        if self.head_alone:
            assert self.head is not None
            found.append(Part("teacher", "lm_head", _count(self.head.parameters), 0))
        elif self.teacher is not None and self.cache is None and not self.shared:
            found += _parts_of("teacher", self.teacher)
        return tuple(found)

    def parameter_bytes(self, stage: int) -> float:
        """Return the bytes of the student's working copy, unsharded."""
        size = 2 if self.bf16 and stage > 0 else 4
        kind = self.config.student.quantize
        if kind is None:
            return self.sizes.total * size
        packed = _count(quantised_weights(self.student))
        return (self.sizes.total - packed) * size + packed * BITS[kind] / 8

    def teacher_bytes(self, placement: str, stage: int) -> float:
        """Return the bytes of the teacher's weights, unsharded, without those that it shares with the student."""
        if self.head_alone:
            assert self.head is not None
            return sum(p.nbytes for p in self.head.parameters)
        if self.teacher is None or placement in ("none", "cached"):
            return 0.0
        whole = sum(p.nbytes for p in self.teacher.parameters()) + self.beside
        if placement == "replicate" and self.same_encoder and stage < 3:
            size = 2 if self.bf16 and stage > 0 else 4
            sight = nn.ModuleDict(self.teacher.image_parts).parameters()
            whole -= sum(p.nbytes for p in sight if p.itemsize == size) if not self.shared else 0
        return whole - sum(p.nbytes for p in self.teacher.parameters()) + _weight_bytes(self.teacher, placement)

    def measure(self, meter: Meter, pairs: Sequence[Pair]) -> Micro:
        """Simulate a micro-batch of these pairs.

        Raises:
            UserError: a model's own code depends on values, which do not exist without weights.
        """
        batch = self.run.collator.batch(list(pairs))
        teacher, cached = self.teacher if self.learns else None, 0
        head, at_images = self._losses(meter, batch), self._losses_at_images(meter, batch)
        if self.learns and self.likeliest is not None:
            cached = len(batch.teacher_targets) * (12 * self.likeliest + 4)
            teacher, batch = None, replace(batch, teacher=None)
        elif self.learns and self.head_alone:
            assert self.head is not None
            weight = self.head.parameters[0]
            cached = len(batch.teacher_targets) * weight.shape[1] * weight.itemsize
            teacher, batch = None, replace(batch, teacher=None)
        try:
            with nullcontext() if self.run.sequence is None else self.run.sequence.shared():
                return simulate(
                    meter,
                    self.student,
                    self.run.running_members or teacher,
                    batch,
                    head,
                    autocast=self.autocast,
                    cached=cached,
                    shared_vision=self.run.shared_vision,
                    at_images=at_images,
                )
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"plan: these models cannot run without weights: {first_line(error)}") from error

    def _losses(self, meter: Meter, batch: DistillationBatch) -> HeadCost:
        """Return what the losses at the answers of a micro-batch cost this rank."""
        terms = [term for term in self.run.terms if isinstance(term, Term) and term.on == "text"]
        ranks = 1 if self.run.sequence is None else self.run.sequence.size
        heads = [(self.student.head, -(-len(batch.targets) // ranks))]
        if self.head is not None and any("teacher" in term.loss.needs for term in terms):
            heads.append((self.head, -(-len(batch.teacher_targets) // ranks)))
        for name, own in batch.taught.items():
            head = self.run.members[name].teacher
            if head is not None and head.head is not None:
                heads.append((head.head, len(own.student.positions)))
        return losses_cost(
            meter,
            terms,
            heads,
            likeliest=self.likeliest if self.learns else None,
            grouped=self.run.grouped,
            recompute=self.config.training.recompute_logits,
            on_cpu=self.on_cpu,
        )

    def _losses_at_images(self, meter: Meter, batch: DistillationBatch) -> HeadCost | None:
        """Return what the losses on logits at image tokens cost this rank; ``None`` without such losses."""
        terms = [term for term in self.run.terms if isinstance(term, Term) and term.on == "images"]
        if not terms:
            return None
        assert self.head is not None
        ranks = 1 if self.run.sequence is None else self.run.sequence.size
        unmatched = any(term.match == "none" for term in terms)
        rows = len(batch.student.image_positions) if unmatched else int(batch.image_pairs.sum())
        rows = -(-rows // ranks)
        return losses_cost(
            meter,
            terms,
            [(self.student.head, rows), (self.head, rows)],
            likeliest=None,
            grouped=False,
            recompute=self.config.training.recompute_logits,
            on_cpu=self.on_cpu,
        )


def _parts_of(role: str, model: VisionLanguageModel) -> list[Part]:
    """Return a model's parts, each parameter in the first part that has it, and an untied head as a part of its own."""
    found: list[Part] = []
    seen: set[int] = set()
    head = {id(p) for p in model.head.parameters}
    for name, part in model.parts.items():
        own = {id(p): p for p in part.parameters() if id(p) not in seen}
        seen |= set(own)
        embeddings = [module for module in part.modules() if isinstance(module, nn.Embedding)]
        tied = {id(p) for module in embeddings for p in module.parameters()}
        untied_head = [p for i, p in own.items() if i in head - tied]
        others = [p for i, p in own.items() if i not in head - tied]
        for title, parameters in ((name, others), ("lm_head", untied_head)):
            if parameters:
                trained = [p for p in parameters if p.requires_grad]
                found.append(Part(role, title, _count(parameters), _count(trained)))
    return found


def _weight_bytes(model: VisionLanguageModel, placement: str) -> float:
    """Return the bytes of a model's weights, linear layers in fewer bits where the placement is a quantization."""
    whole = sum(p.nbytes for p in model.parameters())
    packed = quantised_weights(model) if placement in BITS else []
    return whole - sum(w.nbytes for w in packed) + _count(packed) * BITS.get(placement, 0) / 8


def _model_of(run: Run) -> VisionLanguageModel | None:
    return None if run.teacher is None else run.teacher.model


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
