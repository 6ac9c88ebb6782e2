"""A run's student and teacher without weights, built as the run would, and its micro-batches run through them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from data.batch import DistillationBatch
from data.collate import Collator
from data.encoding import Pair
from data.errors import UserError
from vlm_distill.caching.reading import check_top_k, frozen_vision
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import Term
from vlm_distill.models.common import DTYPES, first_line
from vlm_distill.models.interface import Processor
from vlm_distill.models.lora import WithoutAdapters
from vlm_distill.models.quantize import BITS, quantised_weights
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.served import ServedTeacher
from vlm_distill.models.shared_vision import sees_as
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.build import (
    build_terms,
    check_evaluations,
    check_packing,
    divide_sequences,
    load_models,
    pair_vocabularies,
    prepare_losses,
    turns,
)
from vlm_distill.training.on_policy import check_on_policy
from vlm_distill.training.packing_plan import plan_packing
from vlm_distill.training.schedule import lr_scales, parameter_groups

from .memory import BUCKET, PERSISTENT, Sizes
from .simulation import HeadCost, Meter, Micro, losses_cost, simulate


@dataclass(frozen=True)
class Part:
    """One part of a model: numbers of parameters."""

    model: str
    name: str
    parameters: int
    trained: int


class Models:
    """Student and teacher without weights, as the run would build them. To be made inside a ``Meter``."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config, self.on_cpu = config, device == "cpu"
        self.terms = build_terms(config)
        check_on_policy(config, self.terms)
        section = config.teacher
        whole = section and section.model_copy(update={"placement": "replicate", "cache": None})
        here: Any = SimpleNamespace(device=torch.device("cpu"))
        self.student, teacher = load_models(config.model_copy(update={"teacher": whole}), here)
        self.teacher = teacher.model if isinstance(teacher, ModelTeacher) else None
        self.guides = teacher is not None and any("teacher" in term.loss.needs for term in self.terms)
        #: How many of its likeliest tokens are all that is known of the teacher, if they are.
        self.likeliest: int | None = None
        self.cache = None if section is None else section.cache
        self.grouped = self.teacher is not None and pair_vocabularies(config, self.student, self.teacher, self.terms)
        if isinstance(teacher, ServedTeacher):
            teacher.align(self.student)
            self.likeliest = teacher.top
        elif self.cache is not None and self.cache.form == "topk":
            check_top_k(self.cache, self.student.head.vocabulary or 0)
            self.likeliest = self.cache.k
        prepare_losses(self.terms, self.student, teacher if self.guides else None)
        #: The teacher is the student's own base.
        self.shared = isinstance(self.teacher, WithoutAdapters)
        guide = self.teacher if self.guides and self.cache is None else None
        check_packing(config.data.train, self.student, guide, self.grouped)
        check_evaluations(config, self.student, self.teacher)
        self.bf16 = config.training.dtype == "bf16"
        self.autocast = self.bf16 and config.deepspeed.stage == 0
        self.sizes = self._sizes()
        packing = plan_packing(config.data, self.student, guide)
        self.packed, self.told = packing.packed, packing.told
        if any(self.packed):
            self.told += ("rows are packed as if the models kept samples in one row apart, which the run tries",)
        if isinstance(teacher, ServedTeacher):
            self.told += ("the teacher's server and the time in which it answers are not planned",)
        if config.on_policy is not None:
            self.told += ("the time in which the student draws its answers is not planned",)
        #: The teacher sees as the student does, with frozen parts.
        self.same_encoder = (
            guide is not None
            and (section is None or section.placement == "replicate")
            and guide.dtype == DTYPES[config.training.dtype]
            and sees_as(self.student, guide)
        )
        features = config.student.vision_cache is not None
        self.shared_vision = self.same_encoder and not features
        if self.shared_vision or (self.same_encoder and features):
            runs = "does not run" if features else "runs once, for both"
            self.told += (f"the vision encoder is frozen and taken to be the teacher's: it {runs}",)
        self.cached_sight = features
        self._shapes: dict[tuple[tuple[int, int], ...], torch.Size] = {}
        #: What encodes samples, as in the run.
        own: Any = self.student.processor
        other: Any = teacher.processor if teacher is not None and self.guides else None
        if features:
            frozen_vision(self.student)  # refuses as the run would
            own = own.with_features(self._features)
            other = other.with_features(self._features) if self.same_encoder else other
        self.processors: tuple[Processor, Processor | None] = own, other
        ranks = config.training.sequence_parallel
        self.sequence = None if ranks == 1 else SequenceParallel(None, 0, ranks)
        if self.sequence is not None:
            divide_sequences(config, self.sequence, self.student, guide, self.terms, self.grouped)
            self.told += ("the decoders are taken to be ones that can be divided, which the run tries",)
        if config.training.activation_checkpointing:
            self.student.checkpoint_activations()
        if self.bf16 and not self.autocast:
            for parameter in self.student.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)

    def _sizes(self) -> Sizes:
        optimizer, deepspeed = self.config.optimizer, self.config.deepspeed
        scales = lr_scales(self.student.parts, optimizer.part_lr, optimizer.lr)
        groups = parameter_groups(self.student, optimizer.weight_decay, scales)
        bucket = deepspeed.zero.get("reduce_bucket_size")
        counts = [(p.numel(), p.requires_grad) for p in self.student.parameters()]
        return Sizes(
            total=sum(count for count, _ in counts),
            trained=sum(count for count, trains in counts if trains),
            learned=sum(_count(list(term.loss.parameters())) for term in self.terms),
            largest=max(count for count, trains in counts if trains),
            group=max(_count(group["params"]) for group in groups),
            small=sum(count for count, _ in counts if count < PERSISTENT),
            bucket=bucket if isinstance(bucket, int) else BUCKET,
            bf16=self.bf16,
            on_cpu=self.on_cpu,
            deepspeed=deepspeed,
            weights=self.parameter_bytes,
            teacher=self.teacher_bytes,
        )

    def placements(self) -> tuple[str, list[str]]:
        """Where the teacher is, as configured and as it might be."""
        section = self.config.teacher
        if self.cache is not None:
            return "cached", ["cached"]
        if section is not None and section.server is not None:
            return "served", ["served"]
        if section is None or self.shared:
            return "none", ["none"]
        if section.quantize is not None:
            return section.quantize, ["replicate", section.quantize]
        return section.placement, list(dict.fromkeys(["replicate", "shard", section.placement]))

    def parts(self) -> tuple[Part, ...]:
        found = []
        for role, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None and role == "teacher" and self.cache is not None:
                found += [] if self.likeliest is not None else [Part(role, "lm_head", _count(model.head.parameters), 0)]
                continue
            if model is None or (role == "teacher" and self.shared):
                continue
            seen: set[int] = set()
            head = {id(p) for p in model.head.parameters}
            for name, part in model.parts.items():
                own = {id(p): p for p in part.parameters() if id(p) not in seen}
                seen |= set(own)
                tied = {id(p) for m in part.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
                split = {"lm_head": [p for i, p in own.items() if i in head - tied]}
                split = {name: [p for i, p in own.items() if i not in head - tied]} | split
                found += [
                    Part(role, what, _count(ps), _count([p for p in ps if p.requires_grad]))
                    for what, ps in split.items()
                    if ps
                ]
        return tuple(found)

    def parameter_bytes(self, stage: int) -> float:
        """The student's working copy, whole."""
        size = 2 if self.bf16 and stage > 0 else 4
        kind = self.config.student.quantize
        if kind is None:
            return self.sizes.total * size
        packed = _count(quantised_weights(self.student))
        return (self.sizes.total - packed) * size + packed * BITS[kind] / 8

    def teacher_bytes(self, placement: str, stage: int) -> float:
        """Its weights, whole, but for those that lie where the student's do, which sees as it does."""
        if self.teacher is None or placement == "none":
            return 0.0
        if placement == "cached":
            return 0.0 if self.likeliest is not None else sum(p.nbytes for p in self.teacher.head.parameters)
        whole = sum(p.nbytes for p in self.teacher.parameters())
        if placement == "replicate" and self.same_encoder and stage < 3:
            size = 2 if self.bf16 and stage > 0 else 4
            sight = nn.ModuleDict(self.teacher.sight).parameters()
            whole -= sum(p.nbytes for p in sight if p.itemsize == size) if not self.shared else 0
        packed = quantised_weights(self.teacher) if placement in BITS else []
        return whole - sum(w.nbytes for w in packed) + _count(packed) * BITS.get(placement, 0) / 8

    def collator(self) -> Collator:
        data = self.config.data
        return Collator(*self.processors, data.max_length, turns(data), self.grouped, self.packed)

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        """What stands in a cache of features for images: as many numbers."""
        sizes = tuple(image.size for image in images)
        if sizes not in self._shapes:
            with torch.no_grad():
                (seen,) = self.student.encode_images([self.student.processor.pictured(images)])
            self._shapes[sizes] = seen.shape
        return torch.zeros(self._shapes[sizes], dtype=DTYPES[self.config.training.dtype])

    def feature_bytes(self, images: Sequence[Image.Image]) -> int:
        """What a run reads of a sample's images from such a cache."""
        if not self.cached_sight:
            return 0
        return sum(self._features(group).nbytes for group in self.student.processor.seen_together(images))

    def run(self, meter: Meter, pairs: Sequence[Pair]) -> Micro:
        """A micro-batch of these, measured.

        Raises:
            UserError: a model's own code decides by numbers, which are not there.
        """
        batch = self.collator().batch(list(pairs))
        teacher, cached = self.teacher if self.guides else None, 0
        head = self._losses(meter, batch)
        if self.guides and self.likeliest is not None:
            cached = len(batch.teacher_targets) * (12 * self.likeliest + 4)
            teacher, batch = None, replace(batch, teacher=None)
        elif teacher is not None and self.cache is not None:
            weight = teacher.head.parameters[0]
            cached = len(batch.teacher_targets) * weight.shape[1] * weight.itemsize
            teacher, batch = None, replace(batch, teacher=None)
        try:
            with nullcontext() if self.sequence is None else self.sequence.shared():
                return simulate(
                    meter,
                    self.student,
                    teacher,
                    batch,
                    head,
                    autocast=self.autocast,
                    cached=cached,
                    shared_vision=self.shared_vision,
                )
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"plan: these models cannot run without weights: {first_line(error)}") from error

    def _losses(self, meter: Meter, batch: DistillationBatch) -> HeadCost:
        terms = [term for term in self.terms if isinstance(term, Term)]
        ranks = 1 if self.sequence is None else self.sequence.size
        heads = [(self.student.head, -(-len(batch.targets) // ranks))]
        if self.likeliest is None and any("teacher" in term.loss.needs for term in terms):
            assert self.teacher is not None
            heads.append((self.teacher.head, -(-len(batch.teacher_targets) // ranks)))
        return losses_cost(
            meter,
            terms,
            heads,
            likeliest=self.likeliest if self.guides else None,
            grouped=self.grouped,
            recompute=self.config.training.recompute_logits,
            on_cpu=self.on_cpu,
        )


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
