"""LoRA by peft on any part of a model: add it, save it, merge it, and use the model with its adapters off."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from data.batch import Encoded, ModelInputs
from data.errors import UserError, first_line

from .adapters import ADAPTER, adapted_layers
from .answers import Answer, Sampling
from .composed import ComposedVLM
from .folder import ADAPTER_CONFIG, read_object
from .interface import Outputs, VisionLanguageModel
from .lm_head import LMHead
from .loading import Report
from .pretrained import PretrainedVLM
from .processor import Prompt
from .weightless import needs_weights

#: peft's own name for an adapter's weights.
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_lora(
    model: VisionLanguageModel,
    *,
    parts: Sequence[str] = ("decoder",),
    target: str | Sequence[str] = "all-linear",
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
) -> None:
    """Replace linear layers' W by W + s·B·A (Hu et al. 2021); in these parts only A and B are trained.

    A is random, from torch's global generator, and B is zero, so that the model's outputs do not change.

    Args:
        model: changed in place. Other parts stay trained if they were.
        parts: names of the parts, as in ``model.parts``; their own weights are frozen.
        target: ``all-linear`` (every linear layer but the output layer), or ends of layer paths, such as ``q_proj``.
        rank: r, the number of rows of A.
        alpha: α; s is α/r. ``None``: 2·r.
        dropout: probability, on the input of A.
        rslora: s is α/√r instead (Kalajdzievski 2023).

    Raises:
        UserError: peft is missing, there is no such part or layer, or a layer cannot have an adapter.
    """
    peft = _peft("student.lora")
    missing = [part for part in parts if part not in model.parts]
    if missing:
        raise UserError(f"student.lora.parts: this student has no {missing[0]}; it has {', '.join(model.parts)}")
    _, root, transformer = _modules(model)
    names = _targets(root, [model.parts[part] for part in parts], transformer, target)
    if dropout and any(root.get_submodule(name) is transformer.get_output_embeddings() for name in names):
        raise UserError("student.lora.dropout: the output layer is read without it; leave one of the two out")
    for part in parts:
        model.parts[part].requires_grad_(False)
    # peft freezes everything but its adapters.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=names,
        # So that peft's classes for whole language models can load the adapter.
        task_type="CAUSAL_LM" if root is transformer and isinstance(model, ComposedVLM) else None,
    )
    try:
        peft.inject_adapter_in_model(settings, root)
    except ValueError as error:  # Mamba's kernels read some layers' weights directly
        raise UserError(f"student.lora.target: peft refuses these layers ({first_line(error)}); name others") from error
    for parameter in trained:
        parameter.requires_grad_(True)
    model.head.rebind(transformer.get_output_embeddings())


def save_adapter(
    model: VisionLanguageModel,
    folder: str | Path,
    base: str,
    *,
    whole: Sequence[str] = (),
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the adapters of :func:`add_lora` in peft's format, with the processor; ``load_vlm`` reads the folder, too.

    Args:
        model: with adapters.
        folder: created if needed.
        base: name or folder of the model that was adapted.
        whole: parts other than the decoder that were trained in full, and are saved in full.
        state: the weights, if the model's own are sharded over ranks.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    prefix, root, _ = _modules(model)
    parts = {id(model.parts[part]) for part in whole}
    kept = [name for name, module in root.named_modules() if id(module) in parts]
    weights = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if any(f".lora_{side}.{ADAPTER}." in name for side in "AB"):
            name = name.replace(f".{ADAPTER}.", ".")
        elif not name.startswith(tuple(f"{part}." for part in kept)):
            continue
        weights[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = copy.copy(root.peft_config[ADAPTER])
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.modules_to_save = kept or None
    # peft keeps a set, whose order differs between processes.
    settings.target_modules = sorted(settings.target_modules)
    settings.save_pretrained(folder)
    model.processor.save_pretrained(folder)


@needs_weights
def merge_adapter(model: VisionLanguageModel, folder: str | Path) -> None:
    """Add a saved adapter to the weights of its base.

    Raises:
        UserError: peft is missing, or the adapter does not fit: not LoRA, layers that this base lacks, or weights that
            are missing, left over, of other shapes, NaN or infinite.
    """
    peft = _peft(str(folder))
    _, root, transformer = _modules(model)
    file = Path(folder) / ADAPTER_WEIGHTS
    try:
        weights = load_file(file)
    except Exception as error:  # no such file, or not safetensors
        raise UserError(f"model: {file} cannot be read: {first_line(error)}; is the copy complete?") from error
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"model: {file} has NaN or infinite numbers in {len(bad):,} weights, first {bad[0]}")
    settings = _lora_settings(Path(folder) / ADAPTER_CONFIG)
    try:
        adapted = peft.PeftModel(root, peft.LoraConfig(**settings, inference_mode=True))
        wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing, unexpected = frozenset(wanted) - frozenset(weights), frozenset(weights) - frozenset(wanted)
        shapes = ((key, weights[key].shape, wanted[key].shape) for key in sorted(weights.keys() & wanted.keys()))
        report = Report(missing, unexpected, tuple(item for item in shapes if item[1] != item[2]))
        _check_fit(folder, report)
        peft.set_peft_model_state_dict(adapted, weights)
        adapted.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # peft's own errors, for layers that are missing or cannot have an adapter
        raise UserError(f"model: the adapter in '{folder}' does not fit its base: {first_line(error)}") from error
    model.head.rebind(transformer.get_output_embeddings())


#: What an adapter's configuration can set: LoRA on linear layers, and parts that were trained in full.
_LORA_KEYS = (
    *("r", "lora_alpha", "lora_bias", "bias", "target_modules", "exclude_modules", "modules_to_save"),
    *("fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern"),
)
#: Keys that change what is loaded or how it computes; refused if they are set.
_OTHER_KINDS = (
    *(
        "megatron_config",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
    ),
    *("arrow_config", "use_qalora", "use_bdlora", "velora_config"),
)


def _lora_settings(path: Path) -> dict[str, Any]:
    """Return an adapter's LoRA settings. Raise ``UserError`` if it is not plain LoRA."""
    content = read_object(path)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UserError(f"model: {path}: peft_type is {kind!r}; only LORA is read, merge other adapters by peft first")
    other = next((key for key in _OTHER_KINDS if content.get(key)), None)
    if other is not None:
        raise UserError(f"model: {path}: {other} is not supported; merge this adapter by peft first")
    return {key: content[key] for key in _LORA_KEYS if content.get(key) is not None}


def _check_fit(folder: str | Path, report: Report) -> None:
    """Raise ``UserError`` if an adapter and its base differ in layers or shapes."""
    where, base = (
        f"model: the adapter in '{folder}' does not fit its base:",
        "is base_model_name_or_path the right one?",
    )
    if report.missing:
        raise UserError(f"{where} it lacks {len(report.missing):,} weights, first {min(report.missing)}; {base}")
    if report.unexpected:
        told = f"{len(report.unexpected):,} of its weights have no place there, first {min(report.unexpected)}"
        raise UserError(f"{where} {told}; {base}")
    if report.mismatched:
        name, there, wanted = report.mismatched[0]
        raise UserError(f"{where} {name} has shape {list(there)}, the base takes {list(wanted)}; {base}")


class WithoutAdapters(VisionLanguageModel):
    """A model with its adapters off, in evaluation mode: a second model without weights of its own.

    The model's own modules run, so sharded parameters are gathered as usual.

    Args:
        model: not registered here. Between calls its adapters are on and its mode is unchanged.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.processor = model.processor
        self._model = (model,)  # in a tuple, so that torch does not register it

    @property
    def model(self) -> VisionLanguageModel:
        return self._model[0]

    @property
    def head(self) -> LMHead:  # type: ignore[override]
        return self.model.head.without_adapters()

    @property
    def parts(self) -> dict[str, nn.Module]:
        return self.model.parts

    @property
    def body(self) -> nn.Module:
        return self.model.body

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def end_tokens(self) -> set[int]:
        return self.model.end_tokens

    def forward(
        self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = (), *, cache: Cache | None = None
    ) -> Outputs:
        with self._off():
            return self.model(inputs, positions, features, cache=cache)

    def feature_shape(self, name: str) -> tuple[int | None, int]:
        return self.model.feature_shape(name)

    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        return self.model.vision_positions(inputs)

    @property
    def image_parts(self) -> dict[str, nn.Module]:
        return self.model.image_parts

    @property
    def vision_settings(self) -> dict[str, Any]:
        return self.model.vision_settings

    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        with self._off():
            return self.model.encode_images(rows)

    def answer(
        self, rows: Sequence[Encoded], *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[Answer]:
        with self._off():
            return self.model.answer(rows, max_new_tokens=max_new_tokens, sampling=sampling)

    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        with self._off():
            return self.model.score_options(prompts, options)

    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        with self._off():
            return self.model._generate(inputs, **settings)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        raise NotImplementedError("the base is already on disk")

    def checkpoint_activations(self) -> None:
        raise NotImplementedError("it never runs with a gradient")

    @contextmanager
    def _off(self) -> Iterator[None]:
        training, layers = self.model.training, list(adapted_layers(self.model).values())
        self.model.eval()
        try:
            for layer in layers:
                # Not enable_adapters: it also sets requires_grad, which an engine's hooks depend on.
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
            self.model.train(training)


def _peft(where: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(f"{where}: the package peft is not installed; install vlm-distill[lora]") from None
    return peft


def _modules(model: VisionLanguageModel) -> tuple[str, Any, Any]:
    """Return the module that adapter names are relative to, with its state-dict prefix, and the Transformers model."""
    if isinstance(model, ComposedVLM):
        if model.vision_encoder is None:
            return "decoder.", model.decoder, model.decoder
        return "", model, model.decoder
    assert isinstance(model, PretrainedVLM)
    return "model.", model.model, model.model


def _targets(root: nn.Module, parts: Sequence[nn.Module], transformer: Any, target: str | Sequence[str]) -> list[str]:
    """Return the paths of the layers that get an adapter."""
    inside = {id(module) for part in parts for module in part.modules()}
    # MultiheadAttention reads its layers' weights without calling the layers.
    unseen: set[int] = set()
    for module in root.modules():
        if isinstance(module, nn.MultiheadAttention):
            unseen.update(id(layer) for layer in module.modules())
    linear = {
        name: module
        for name, module in root.named_modules()
        if id(module) in inside - unseen and isinstance(module, nn.Linear | Conv1D)
    }
    output = transformer.get_output_embeddings()
    if isinstance(target, str):
        found = [name for name, module in linear.items() if module is not output]
        if not found:
            raise UserError("student.lora.parts: no linear layers in them; choose other parts")
        return found
    found = []
    for wanted in target:
        ends = [name for name in linear if f".{name}".endswith(f".{wanted}")]
        if not ends:
            known = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(wanted, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"student.lora.target: no linear layer is called {wanted!r} in these parts; {hint}")
        found += ends
    tied = output is not None and output.weight is transformer.get_input_embeddings().weight
    if tied and any(linear[name] is output for name in found):
        raise UserError("student.lora.target: the output layer is tied to the embeddings; leave it out")
    return sorted(set(found))
