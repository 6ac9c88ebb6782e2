"""Distillation in Transformers' own trainer: our losses on batches of text, or images and text, without full logits.

    from vlm_distill.integrations.transformers import DistillationTrainer

    trainer = DistillationTrainer(model, args, teacher=teacher, loss="taid", train_dataset=..., data_collator=...)

With another subclass of ``transformers.Trainer``, such as TRL's, the mix-in comes first::

    class DistillationSFT(DistillationMixin, SFTTrainer): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import ModelOutput

from vlm_distill import losses
from vlm_distill.losses import (
    DistillationLoss,
    HiddenTargets,
    LossSums,
    Progress,
    Term,
    TermSums,
    fused_linear,
    term_name,
)

from .output_layer import OutputLayer, Shaping, intercepted, output_linear

#: The label of tokens that are not supervised.
IGNORED = -100
#: Begins the names of inputs that only the teacher receives.
TEACHER = "teacher_"
#: In a checkpoint's folder: the losses' own state and parameters.
STATE = "distillation.pt"


class DistillationMixin:
    """Turns a subclass of ``transformers.Trainer`` into one that distils.

    The loss is the weighted sum of losses between student and teacher at the tokens whose label is not -100, each a
    mean over all such tokens of an optimizer step, on all processes and in all accumulated batches. The logits are
    formed a few tokens at a time inside the student's forward, where its lm head would form all of them.

    A batch has the student's inputs and ``labels``. The teacher receives the same, or those whose names begin with
    ``teacher_`` if there are any (``teacher_input_ids``, ``teacher_labels``, …): its k-th supervised token is then
    compared with the student's k-th. Both models need the same tokenizer.

    Checkpoints hold the student as usual, and the losses' own state, such as TAID's t, in ``distillation.pt``. The
    teacher is frozen, in evaluation mode, whole on every device, and in no checkpoint.

    Args:
        teacher: a causal LM or vision-language model of Transformers, loaded.
        loss: a name, a term with parameters as ``{"name": "taid", "weight": 1.0, "t_start": 0.4}``, a loss, or a list
            of these.
        vocabulary: how many tokens are compared, the first ones; by default those of the trainer's
            ``processing_class``, or without one all that both models score, padding of the embeddings included.
        args, options: of the trainer.

    Raises:
        ValueError: models, losses or the trainer's settings do not fit each other; the message says what to change.
    """

    model: Any
    args: Any
    accelerator: Any
    state: Any
    optimizer: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        loss: str | Mapping[str, Any] | DistillationLoss | Sequence[Any] = "taid",
        vocabulary: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("compute_metrics") is not None:
            raise ValueError("compute_metrics needs full logits, which are never formed; leave it out")
        if not isinstance(teacher, nn.Module):
            raise ValueError(f"teacher: give a loaded model of Transformers; found a {type(teacher).__name__}")
        terms = build_terms(loss)
        super().__init__(*args, **options)
        _check_arguments(self.args)
        if teacher is self.model:
            raise ValueError("teacher: is the student itself; give a copy")
        self.teacher = _frozen(teacher, self.args.device)

        # Count the tokens of the whole step, without each row's first, which nothing predicts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

        # Compare the tokens that both lm heads score: embeddings may be padded to different sizes.
        student = output_linear(self.accelerator.unwrap_model(self.model), "student")
        heads = student.out_features, output_linear(self.teacher, "teacher").out_features
        self._vocabulary = min(*heads, vocabulary or _tokens_of(getattr(self, "processing_class", None)) or heads[0])
        self._cut = self._vocabulary < student.out_features
        for term in terms:
            term.loss.prepare(self._vocabulary)
        self.terms = terms
        self.distillation_losses = nn.ModuleDict({term.name: term.loss for term in terms}).to(self.args.device)
        if self._own_parameters() and (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # type: ignore[attr-defined]
            raise ValueError(
                "loss: one has parameters of its own, which DeepSpeed and FSDP do not train here; choose others"
            )

        self._shapings: dict[str, Shaping] = {}
        self._step_sums: list[dict[str, TermSums]] = []
        self._logged: list[dict[str, float]] = []
        self.add_callback(_StepEnd(self))  # type: ignore[attr-defined]

    # Forward

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return a batch's share of the step's loss, a mean over its ``num_items_in_batch`` supervised tokens."""
        own, others = _divided(inputs)
        labels = own.pop("labels")
        teacher = self._teacher_targets(others or own, others.pop("labels", labels) if others else labels)
        if "student" not in self._shapings:
            self._learn_shaping(model, own)
        sums = self._student_sums(model, own, labels, teacher)

        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / torch.as_tensor(count, device=sums.loss.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self.model.training:
            self._step_sums.append(sums.terms)
        return (loss, ModelOutput(loss=loss)) if return_outputs else loss

    @torch.no_grad()
    def _teacher_targets(self, inputs: Mapping[str, Any], labels: Tensor) -> HiddenTargets:
        """Return the teacher's hidden states ``[N, H]`` at the tokens that predict supervised ones, and its head."""
        dtype = next(p.dtype for p in self.teacher.parameters() if p.is_floating_point())
        cast = {name: x.to(dtype) if _is_floating(x) else x for name, x in inputs.items() if name != "labels"}
        linear, found = output_linear(self.teacher, "teacher"), list[Tensor]()
        with intercepted(linear, lambda hidden: found.append(_predicting(hidden, labels))):
            logits = self.teacher(**cast, use_cache=False).logits
        if "teacher" not in self._shapings:
            self._shapings["teacher"] = Shaping.of(logits)
        return HiddenTargets(found[0], OutputLayer(linear, self._shapings["teacher"], self._vocabulary))

    @torch.no_grad()
    def _learn_shaping(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Learn what the student does to its logits, from a forward that draws no random number."""
        linear = output_linear(self.accelerator.unwrap_model(model), "student")
        training = model.training
        model.eval()
        try:
            with intercepted(linear, lambda hidden: None):
                self._shapings["student"] = Shaping.of(model(**inputs, use_cache=False).logits)
        finally:
            model.train(training)

    def _student_sums(self, model: Any, inputs: Mapping[str, Any], labels: Tensor, teacher: HiddenTargets) -> LossSums:
        """Run the student, with the losses in place of its output layer."""
        linear = output_linear(self.accelerator.unwrap_model(model), "student")
        head = OutputLayer(linear, self._shapings["student"], self._vocabulary)
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        if self._cut and len(targets) and int(targets.max()) >= self._vocabulary:
            raise ValueError(
                f"labels: token {int(targets.max())} is not among the {self._vocabulary} that are compared; give both "
                "models the same tokenizer, or set vocabulary"
            )
        found: list[LossSums] = []

        def compute(hidden: Tensor) -> Tensor:
            found.append(fused_linear(self.terms, _predicting(hidden, labels), head, teacher, targets))
            return found[0].loss

        with intercepted(linear, compute):
            logits = model(**inputs, use_cache=False).logits
        # DDP and FSDP act when a gradient reaches the outputs of the model that they wrap: let a zero reach them.
        return LossSums(found[0].loss + 0.0 * logits[..., 0].sum().to(found[0].loss.dtype), found[0].terms)

    # Steps

    def share_gradients(self) -> None:
        """Average the gradients of the losses' own parameters over processes."""
        for parameter in self._own_parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def end_step(self, state: Any) -> None:
        """Update the losses' own state after an optimizer step, from its means over all processes."""
        means = _means(self.terms, self._step_sums, self.accelerator)
        self._step_sums = []
        share = state.epoch / state.global_step  # of an epoch in a step
        done = state.global_step - 1
        progress = Progress(done, state.max_steps, done * share, state.max_steps * share)
        entry: dict[str, float] = {}
        for term in self.terms:
            known = means[term.name]
            term.loss.update({name: value for name, value in known.items() if name != "loss"}, progress)
            if known:
                both = {**known, **term.loss.metrics()}
                entry |= {f"{term.name}/{name}": value for name, value in both.items()}
        self._logged.append(entry)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add each term's loss, signals and state to the training's metrics, as means since they were last logged."""
        if "loss" in logs and self._logged:
            names = dict.fromkeys(name for entry in self._logged for name in entry)
            for name in names:
                values = [entry[name] for entry in self._logged if name in entry]
                logs[name] = sum(values) / len(values)
            self._logged = []
        super().log(logs, *args, **options)  # type: ignore[misc]

    # Optimizer, checkpoints, columns

    def _own_parameters(self) -> list[nn.Parameter]:
        """Return the losses' own parameters, such as CTKD's temperature."""
        return list(self.distillation_losses.parameters())

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Create the optimizer, with the losses' own parameters in a group without decay."""
        optimizer = super().create_optimizer(*args, **options)  # type: ignore[misc]
        own = self._own_parameters()
        grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if own and id(own[0]) not in grouped:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(self.distillation_losses.state_dict(), Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise ValueError(f"{checkpoint}: has no {STATE}, so no DistillationTrainer wrote it; resume another")
        self.distillation_losses.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        student = self.model if model is None else model
        if not isinstance(student, PreTrainedModel):
            return
        # Transformers 5.23 writes some families, LLaVA among them, under the names of older files, by which its trainer
        # then finds no weight. It only warns.
        names: set[str] = set()
        for path in Path(resume_from_checkpoint).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names.update(file.keys())
        if not names <= student.state_dict().keys():
            saved = type(student).from_pretrained(resume_from_checkpoint, dtype=student.dtype, trust_remote_code=False)
            student.load_state_dict(saved.state_dict())

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if first and self._signature_columns is not None:
            self._signature_columns += [f"{TEACHER}{name}" for name in self._signature_columns]


class DistillationTrainer(DistillationMixin, Trainer):
    """``transformers.Trainer`` that distils; see :class:`DistillationMixin`."""


class _StepEnd(TrainerCallback):
    """Calls the trainer around each optimizer step."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.num_processes > 1:
            self.trainer.share_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step(state)


def build_terms(loss: str | Mapping[str, Any] | DistillationLoss | Sequence[Any]) -> list[Term]:
    """Return the terms of a loss, named by their losses, and numbered where a loss occurs twice.

    Raises:
        ValueError: a loss cannot be built, or needs more than logits at the supervised tokens.
    """
    terms: list[Term] = []
    for given in loss if isinstance(loss, Sequence) and not isinstance(loss, str) else [loss]:
        parameters = {"name": given} if isinstance(given, str) else given
        weight, name = 1.0, type(given).__name__
        built: Any = given
        if isinstance(parameters, Mapping):
            settings = dict(parameters)
            name, weight = settings.pop("name"), settings.pop("weight", 1.0)
            built = losses.build(name, **settings)
        if not isinstance(built, DistillationLoss) or built.adapts or built.needs_shared_tokens:
            raise ValueError(
                f"loss {name}: needs more than both models' logits at the supervised tokens; vlm_distill.distill "
                "trains with it"
            )
        terms.append(Term(term_name(name, [term.name for term in terms]), built, weight))
    return terms


def _check_arguments(args: Any) -> None:
    """Raise ``ValueError`` for settings of the trainer under which the loss would be another one."""
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor: acts on a loss that is not computed here; set it to 0")
    if args.n_gpu > 1:
        raise ValueError(
            f"this process has {args.n_gpu} GPUs, over which torch's DataParallel would copy the model; start it with "
            "torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )


def _frozen(teacher: Any, device: torch.device) -> Any:
    """Return the teacher, frozen and in evaluation mode, on a device."""
    teacher = teacher.eval().requires_grad_(False)
    placed = getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None)
    return teacher if placed else teacher.to(device)


def _tokens_of(processing: Any) -> int | None:
    """Return the number of ids of a tokenizer, or of a processor's; ``None`` for anything else."""
    tokenizer = getattr(processing, "tokenizer", processing)
    return max(tokenizer.get_vocab().values()) + 1 if hasattr(tokenizer, "get_vocab") else None


def _divided(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the student's inputs, and the teacher's own without their prefix."""
    own = {name: x for name, x in inputs.items() if not name.startswith(TEACHER)}
    others = {name.removeprefix(TEACHER): x for name, x in inputs.items() if name.startswith(TEACHER)}
    return own, others


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _predicting(hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the hidden states ``[N, H]`` of ``[B, L, H]`` at the tokens before supervised ones."""
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: have shape {list(labels.shape)}, but the model has {list(hidden.shape[:2])} tokens; use a "
            "processor that puts an image's tokens into input_ids"
        )
    return hidden[:, :-1][labels[:, 1:] != IGNORED]


def _means(
    terms: Sequence[Term], sums: Sequence[Mapping[str, TermSums]], accelerator: Any
) -> dict[str, dict[str, float]]:
    """Return the means of every term's loss and signals over a step's tokens on all processes; none without tokens."""
    flat: list[Tensor] = []
    for term in terms:
        for values in ("count", "loss", *term.loss.signals):
            flat.append(_added([_value_of(micro[term.name], values) for micro in sums], accelerator.device))
    totals = iter(accelerator.reduce(torch.stack(flat), "sum").tolist())
    means: dict[str, dict[str, float]] = {}
    for term in terms:
        count = next(totals)
        added = {name: next(totals) for name in ("loss", *term.loss.signals)}
        means[term.name] = {name: value / count for name, value in added.items()} if count else {}
    return means


def _value_of(sums: TermSums, name: str) -> float | Tensor:
    if name in ("count", "loss"):
        return getattr(sums, name)
    return sums.signals[name]


def _added(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    precise = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([torch.as_tensor(value, dtype=precise, device=device) for value in values]).sum()
