"""Teacher: what the losses learn from, whether a model runs here, on a server, or was run before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Comparison, DistillationBatch, Encoded, Step
from data.errors import UserError
from vlm_distill.caching.cached_processor import CachedProcessor
from vlm_distill.caching.token_records import TokenCache
from vlm_distill.losses import HiddenTargets, MixedTargets, TokenTargets, TopKTargets

from .common import count_parameters
from .image_hidden import run_at_positions
from .interface import VisionLanguageModel
from .lm_head import LMHead
from .processor import Processor
from .vocabulary import align_heads, separate_heads


@dataclass
class TeacherOutputs:
    """A teacher's side of a micro-batch: targets for the losses on logits, and features by name.

    Attributes:
        targets: at the positions of ``batch.teacher``; ``None`` with several teachers.
        features: by name.
        taught: with several teachers, the targets of each by name, at the positions of its own micro-batch.
        sharded: with several teachers, the heads that all ranks must open together, once a micro-batch.
    """

    targets: HiddenTargets | TopKTargets | TokenTargets | None
    features: dict[str, Tensor] = field(default_factory=dict)
    taught: dict[str, HiddenTargets | TopKTargets | TokenTargets] = field(default_factory=dict)
    sharded: Sequence[LMHead] = ()

    def compared_in(self, comparison: Comparison) -> HiddenTargets | MixedTargets | TopKTargets | TokenTargets:
        """Return what a comparison's positions are compared with."""
        found = []
        for name, span in zip(comparison.teachers, comparison.spans, strict=True):
            found.append(self.taught[name][slice(*span)])
        if len(found) == 1:
            return found[0]
        assert comparison.combine != "losses"
        return MixedTargets(
            [part for part in found if isinstance(part, HiddenTargets)], comparison.weights, comparison.combine
        )


class Teacher(ABC):
    """Gives targets for a micro-batch. A teacher is never trained; a checkpoint holds one that changes, and no other.

    In a run, :meth:`align` is called once, before training; then, for every micro-batch, :meth:`request` as early as
    possible and either :meth:`outputs` or :meth:`forget`. :meth:`prefetch` calls :meth:`request` one step ahead.
    :meth:`follow` is called after every update of the student.

    Attributes:
        processor: turns conversations into the teacher's own inputs.
        model: the model that runs here; ``None`` if the outputs come from a cache or a server.
        head: turns the teacher's hidden states into logits; ``None`` if a server keeps it to itself.
        cache: the cache that the outputs are read from, if any.
        likeliest: how many of the likeliest tokens are known at each position; 0: only the probability of the answer's
            own token is; ``None``: the whole distribution is.
        parameters: number of parameters; ``None`` if unknown (on a server).
        needs_images: whether it reads conversations with images from ``batch.conversations`` instead of tokens.
        collective: whether all ranks must run it together, on as many micro-batches.
        asks_ahead: whether outputs are requested one step before they are needed.
        ema: decay with which its weights follow the student's; ``None``: they never change.
        bytes_beside: memory that it holds on each rank beside its model's weights.
    """

    processor: Processor | CachedProcessor
    model: VisionLanguageModel | None = None
    head: LMHead | None = None
    cache: TokenCache | None = None
    likeliest: int | None = None
    parameters: int | None = None
    needs_images: bool = False
    collective: bool = False
    asks_ahead: bool = False
    ema: float | None = None
    bytes_beside: int = 0

    @property
    def members(self) -> Mapping[str, Teacher]:
        """The teachers by name; a single one's name is empty."""
        return {"": self}

    @property
    def models(self) -> dict[str, VisionLanguageModel]:
        """The models that run here, by the names of the teachers."""
        found = {name: teacher.model for name, teacher in self.members.items()}
        return {name: model for name, model in found.items() if model is not None}

    @abstractmethod
    def align(self, student: VisionLanguageModel) -> int:
        """Cut the student's head and this teacher's to the tokens that both share, and return their number.

        Raises:
            UserError: the tokenizers differ, or an end token of the student is not shared.
        """

    def separate(self, student: VisionLanguageModel) -> None:
        """Cut each head to the tokens of its own tokenizer, for losses that compare groups of tokens."""
        raise UserError("this teacher has no head here, so only a student with its tokenizer can learn from it")

    def limit(self, vocabulary: int) -> None:
        """Compare the first ids alone, fewer than :meth:`align` returned: the student shares no more with others."""
        assert self.head is not None
        self.head.vocabulary = vocabulary

    def prefetch(self, steps: Iterator[Step]) -> Generator[Step]:
        """Yield the same steps; one that ``asks_ahead`` is asked about the next step while one is trained on."""
        if not self.asks_ahead:
            yield from steps
            return
        current: Step | None = None
        for step in steps:
            for batch in step.batches:
                self.request(batch)
            if current is not None:
                yield current
            current = step
        if current is not None:
            yield current

    def request(self, batch: DistillationBatch) -> None:
        """Start to fetch a micro-batch's outputs, if fetching takes time. :meth:`outputs` collects them in order."""

    def forget(self, batch: DistillationBatch) -> None:
        """Drop what was requested for a micro-batch that :meth:`outputs` will not be called for."""

    def follow(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Follow the student's trained weights after an update, given whole and by name; nothing without ``ema``."""

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint what changes; called on the first rank."""

    def load_state(self, folder: Path) -> None:
        """Read what :meth:`save_state` wrote; called on every rank."""

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        eos = self.processor.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    @abstractmethod
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        """Return the losses' targets at the positions of ``batch.teacher``.

        These are hidden states ``[N, H]`` with the head that turns them into logits, the likeliest tokens alone, or
        the log-probabilities of the answers' own tokens alone.

        Args:
            batch: on this rank's device.
            features: names of further features, as in :func:`~.image_hidden.run_at_positions`.
        """


class ModelTeacher(Teacher):
    """A model that runs here, whole on this rank or sharded.

    Args:
        model: is frozen and set to evaluation mode.
        run: calls the model; an engine's call if parameters are sharded (default: the model itself).
    """

    processor: Processor
    model: VisionLanguageModel

    def __init__(self, model: VisionLanguageModel, run: Callable[..., Any] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = model.processor
        self._run = run or model
        self.collective = run is not None

    @property
    def head(self) -> LMHead:  # type: ignore[override]
        return self.model.head

    @property
    def parameters(self) -> int:  # type: ignore[override]
        return sum(count_parameters(self.model.parts).values())

    def align(self, student: VisionLanguageModel) -> int:
        return align_heads(student, self.model)

    def separate(self, student: VisionLanguageModel) -> None:
        separate_heads(student, self.model)

    @property
    def end_tokens(self) -> set[int]:
        return self.model.end_tokens

    @torch.no_grad()
    def run_row(self, row: Encoded, device: torch.device) -> None:
        """Run the model on one encoded sample, for what is measured meanwhile. All ranks call this if it is sharded."""
        inputs = self.processor.collate([row]).to(device, self.model.dtype)
        self._run(inputs, torch.zeros(1, dtype=torch.long, device=device))

    # Not inference_mode: its tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        inputs = batch.teacher.inputs.to(batch.targets.device, self.model.dtype)
        outputs = run_at_positions(self.model, inputs, batch.teacher, features, self._run)
        return TeacherOutputs(HiddenTargets(outputs.hidden, self.model.head), outputs.features)
