"""Teacher: what a loss learns from, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.batch import DistillationBatch, Step
from data.errors import UserError
from vlm_distill.caching.cached_processor import CachedProcessor
from vlm_distill.caching.token_records import Fields, TokenCache
from vlm_distill.losses import HiddenTargets, TopKTargets

from .composed import load_tokenizer
from .initialise import count_parameters
from .interface import LMHead, Outputs, Processor, VisionLanguageModel
from .vocabulary import align_heads, separate_heads

_HEAD, _TOKENIZER = "head.safetensors", "tokenizer"
# Rows of logits at a time when the likeliest tokens are chosen.
_ROWS = 512


@dataclass
class TeacherOutputs:
    """A teacher's side of a micro-batch: what the losses on logits learn from, and its features by name."""

    targets: HiddenTargets | TopKTargets
    features: dict[str, Tensor] = field(default_factory=dict)


class Teacher(ABC):
    """Gives targets for a micro-batch. It is never trained, and never part of a checkpoint.

    In a run, :meth:`align` is called once, before training; then, for every micro-batch, :meth:`request` as early as
    possible and either :meth:`outputs` or :meth:`forget`. :meth:`prefetch` calls :meth:`request` one step ahead.

    Attributes:
        processor: turns conversations into the teacher's own inputs.
        model: the model that runs here; ``None`` if the outputs come from a cache or a server.
        head: turns the teacher's hidden states into logits; ``None`` if a server keeps it to itself.
        cache: the cache that the outputs are read from, if any.
        likeliest: how many of the likeliest tokens are known at each position; ``None``: the whole distribution is.
        parameters: number of parameters; ``None`` if nobody here knows.
        needs_images: whether it reads conversations with images from ``batch.conversations``, not from tokens.
    """

    processor: Processor | CachedProcessor
    model: VisionLanguageModel | None = None
    head: LMHead | None = None
    cache: TokenCache | None = None
    likeliest: int | None = None
    parameters: int | None = None
    needs_images: bool = False

    @abstractmethod
    def align(self, student: VisionLanguageModel) -> int:
        """Cut the student's head and this teacher's to the tokens that both share, and return their number.

        Raises:
            UserError: the tokenizers differ, or an end token of the student is not shared.
        """

    def separate(self, student: VisionLanguageModel) -> None:
        """Cut each head to the tokens of its own tokenizer, for losses that compare groups of tokens."""
        raise UserError("this teacher has no head here, so that only a student with its tokenizer can learn from it")

    def prefetch(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Return the same steps; a teacher on a server is asked about the next step while one is trained on."""
        return steps

    def request(self, batch: DistillationBatch) -> None:
        """Start to fetch a micro-batch's outputs, if fetching takes time. :meth:`outputs` collects them in order."""

    def forget(self, batch: DistillationBatch) -> None:
        """Drop what was requested for a micro-batch that :meth:`outputs` will not be called for."""

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        eos = self.processor.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    @abstractmethod
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        """What the losses learn from at the positions of ``batch.teacher``.

        Hidden states ``[N, H]`` with the head that makes logits of them, or the likeliest tokens alone.

        Args:
            batch: on this rank's device.
            features: names of further activations, as in ``VisionLanguageModel.forward``.
        """


class ModelTeacher(Teacher):
    """A model that runs here, whole on this rank or in shards.

    Args:
        model: frozen and in evaluation mode from here on.
        run: calls the model; an engine's call where the parameters are sharded (default: the model itself).
    """

    processor: Processor
    model: VisionLanguageModel

    def __init__(self, model: VisionLanguageModel, run: Callable[..., Any] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = model.processor
        self._run = run or model

    @property
    def head(self) -> LMHead:  # type: ignore[override]
        return self.model.head

    @property
    def parameters(self) -> int:  # type: ignore[override]
        return sum(count_parameters(self.model).values())

    def align(self, student: VisionLanguageModel) -> int:
        return align_heads(student, self.model)

    def separate(self, student: VisionLanguageModel) -> None:
        separate_heads(student, self.model)

    @property
    def end_tokens(self) -> set[int]:
        return self.model.end_tokens

    # Not inference_mode: its tensors cannot be saved for the student's backward.
    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        inputs = batch.teacher.inputs.to(batch.targets.device, self.model.dtype)
        outputs: Outputs = self._run(inputs, batch.teacher.positions, features)
        return TeacherOutputs(HiddenTargets(outputs.hidden, self.model.head), outputs.features)


class CachedTeacher(Teacher):
    """A teacher whose outputs lie on disk; nothing of it is loaded but its tokenizer and, for hidden states, its head.

    Args:
        folder: of a cache that ``vlm-distill cache`` made.
        device: where the head lies.
        trust_remote_code: run code that comes with the tokenizer.

    Attributes:
        head: in a cache of likeliest tokens it has no width and tells only the size of the vocabulary.
    """

    processor: CachedProcessor
    cache: TokenCache
    head: LMHead

    def __init__(self, folder: Path, device: torch.device | str, *, trust_remote_code: bool = False) -> None:
        self.cache = TokenCache(folder)
        self.processor = CachedProcessor(self.cache, load_tokenizer(str(folder / _TOKENIZER), trust_remote_code))
        about = self.cache.about["teacher"]
        self.parameters = about["parameters"]
        self._ends = set(about["end_tokens"])
        hidden = "hidden" in self.cache.fields
        self.likeliest = None if hidden else self.cache.fields["ids"][1]
        state = load_file(folder / _HEAD, str(device)) if hidden else {"weight": torch.empty(about["vocabulary"], 0)}
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(state["weight"], requires_grad=False)
        if "bias" in state:
            linear.bias = nn.Parameter(state["bias"], requires_grad=False)
        self.head = LMHead(linear, about["scale"], about["softcap"])

    def align(self, student: VisionLanguageModel) -> int:
        return align_heads(student, self)

    def separate(self, student: VisionLanguageModel) -> None:
        separate_heads(student, self)

    @property
    def end_tokens(self) -> set[int]:
        return self._ends

    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert batch.teacher is not None
        assert not features, "a cached teacher has no features"
        device = batch.targets.device
        stored = self.cache.values(batch.origins, pinned=device.type == "cuda")
        rows = (batch.teacher.inputs["predicts"].flatten().cumsum(0) - 1)[batch.teacher.positions]
        values = {name: value.to(device, non_blocking=True)[rows] for name, value in stored.items()}
        if "hidden" in values:
            return TeacherOutputs(HiddenTargets(values["hidden"], self.head))
        ids = values["ids"].long()
        if values["ids"].dtype == torch.int16:
            ids &= 0xFFFF
        # Rounding has moved their sum from 1 a little.
        known = torch.cat([values["logprobs"].float(), values["tail"].float()], -1).log_softmax(-1)
        return TeacherOutputs(TopKTargets(ids, known[:, :-1], known[:, -1]))


def cached_fields(head: dict[str, Tensor] | None, k: int, vocabulary: int) -> Fields:
    """What a cache keeps of a position: the hidden state that a head reads, or without a head the k likeliest tokens.

    Log-probabilities are kept in 16 bits (docs/teachers.md has the measured error), ids in 16 where the vocabulary
    allows.
    """
    if head is not None:
        return {"hidden": (head["weight"].dtype, head["weight"].shape[1])}
    ids = torch.int16 if vocabulary <= 2**16 else torch.int32
    return {"ids": (ids, k), "logprobs": (torch.float16, k), "tail": (torch.float32, 1)}


def cached_values(targets: HiddenTargets, fields: Fields) -> dict[str, Tensor]:
    """The same of a teacher's outputs, ``[N, width]`` by name; collective where the teacher is sharded."""
    if "hidden" in fields:
        return {"hidden": targets.hidden}
    head, k = targets.head, fields["ids"][1]
    assert isinstance(head, LMHead)
    with head.weight() as weight:
        whole = weight.float()
        parts = [TopKTargets.of(head.logits_with(part, whole), k) for part in targets.hidden.split(_ROWS)]
    return {
        "ids": torch.cat([part.ids for part in parts]),
        "logprobs": torch.cat([part.logprobs for part in parts]),
        "tail": torch.cat([part.tail for part in parts]).unsqueeze(-1),
    }


def describe_teacher(teacher: Teacher, vocabulary: int) -> dict[str, Any]:
    """The part of ``cache.json`` that :class:`CachedTeacher` reads."""
    assert teacher.head is not None
    return {
        "parameters": teacher.parameters,
        "end_tokens": sorted(teacher.end_tokens),
        "vocabulary": vocabulary,
        "scale": teacher.head.scale,
        "softcap": teacher.head.softcap,
    }


def save_head(folder: Path, model: VisionLanguageModel, head: dict[str, Tensor] | None) -> None:
    """Writes what :class:`CachedTeacher` loads."""
    model.processor.tokenizer.save_pretrained(folder / _TOKENIZER)
    if head is not None:
        save_file(head, folder / _HEAD)


def whole_head(head: LMHead) -> dict[str, Tensor]:
    """A head's weight and bias on the CPU; collective where the teacher is sharded."""
    with head.weight() as weight:
        found = {"weight": weight, "bias": head.bias}
        return {name: t.detach().cpu().clone().contiguous() for name, t in found.items() if t is not None}
