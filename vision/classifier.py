"""Classifiers: a timm model (or one with the same methods) with its input settings, class names and named features."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from data.errors import UserError
from vlm_distill.config.file import explain
from vlm_distill.models.folder import check_open_clip_config, check_open_clip_folder, check_timm_folder, read_object
from vlm_distill.models.loading import check_finite
from vlm_distill.models.weightless import weightless

from . import cifar
from . import weights as files
from .config import ClassifierSection
from .inputs import InputSettings

assert cifar  # importing it registers its architectures with timm

#: Modules that timm lists as the first feature level although they precede all stages.
_STEM = re.compile(r"(features\.)?(stem|conv_stem|conv1|act1|bn1|norm0|conv1_1)\b")


class Outputs(NamedTuple):
    """A classifier's outputs for ``N`` images.

    Attributes:
        logits: ``[N, C]``; in evaluation mode, the mean of both heads for a distilled transformer.
        features: by name, as :meth:`Classifier.forward` describes.
        distilled: ``[N, C]`` of a distillation head (DeiT, arXiv:2012.12877), in training mode, else ``None``.
    """

    logits: Tensor
    features: dict[str, Tensor]
    distilled: Tensor | None


class Classifier(nn.Module):
    """A module from normalised images ``[N, 3, H, W]`` to class logits.

    Attributes:
        model: a timm model, or one with the same methods.
        inputs: its image size and normalisation; the caller normalises.
        classes: names of its outputs in order; ``None`` if unknown.
        notes: remarks for the user on how it was loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: InputSettings,
        classes: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Args: settings: for ``config.json``, if timm cannot rebuild the model; ``None`` for timm's own."""
        super().__init__()
        self.model: Any = model
        self.inputs = inputs
        self.classes = None if classes is None else tuple(classes)
        self.notes = tuple(notes)
        self._settings = settings
        self._head_only = False
        self._shapes: dict[str, tuple[int, ...]] | None = None
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise UserError(
                f"classes: {len(self.classes)} names for a classifier of {self.num_classes} outputs; "
                "give one per output, or set num_classes"
            )
        both_heads: Any = getattr(model, "set_distilled_training", None)
        if both_heads is not None:
            both_heads(True)  # timm applies it in training mode only

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> Outputs:
        """Compute logits, and the requested features.

        Args:
            images: ``[N, 3, H, W]``, normalised by ``inputs``.
            features: ``stage1`` … ``stageK``, ``[N, channels, h, w]``, the levels that timm lists for the model (each
                block of a transformer, its tokens laid out as a grid without prefix tokens), ``stage-1`` being the
                last; ``stem``, if timm lists one before them; ``pooled``, ``[N, width]``, the classification layer's
                input.

        Raises:
            UserError: this classifier has no such feature.
        """
        if not features:
            return self._outputs(self.model(images), {})
        levels = {name: level for name in features if (level := self._level(name)) is not None}
        wanted = sorted(set(levels.values())) or [0]  # timm takes an empty list for all of them
        final, maps = self.model.forward_intermediates(images, indices=wanted)
        found = {name: maps[wanted.index(level)] for name, level in levels.items()}
        head = self.model.get_classifier()
        if "pooled" not in features:
            logits = self.model.forward_head(final)
        elif isinstance(head, nn.Linear):
            found["pooled"] = self.model.forward_head(final, pre_logits=True)
            logits = head(found["pooled"])
        else:  # several heads, or a convolution: what precedes the layer runs twice
            found["pooled"] = self.model.forward_head(final, pre_logits=True).flatten(1)
            logits = self.model.forward_head(final)
        return self._outputs(logits, found)

    @staticmethod
    def _outputs(logits: Tensor | tuple[Tensor, Tensor], features: dict[str, Tensor]) -> Outputs:
        if isinstance(logits, tuple):
            return Outputs(logits[0], features, logits[1])
        return Outputs(logits, features, None)

    def feature_names(self) -> list[str]:
        """Return the names of all features of :meth:`forward`, from the images upwards."""
        if not hasattr(self.model, "forward_intermediates"):
            return []
        return [*self._levels(), "pooled"]

    def _levels(self) -> list[str]:
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"features: {type(self.model).__name__} of timm gives none; choose another model")
        info = list(self.model.feature_info)
        stem = bool(info) and _STEM.match(info[0]["module"]) is not None
        return (["stem"] if stem else []) + [f"stage{k}" for k in range(1, len(info) + 1 - stem)]

    def _level(self, name: str) -> int | None:
        """Return the index of timm's level that a feature name means; ``None`` for ``pooled``."""
        names = self._levels()
        if name == "pooled":
            return None
        found = name
        if re.fullmatch(r"stage-[1-9]\d*", name):
            stages = [n for n in names if n.startswith("stage")]
            found = stages[-int(name[6:])] if int(name[6:]) <= len(stages) else name
        if found not in names:
            raise UserError(f"features: no '{name}' in this classifier; it has {', '.join(self.feature_names())}")
        return names.index(found)

    def feature_shape(self, name: str) -> tuple[int, ...]:
        """Return a feature's shape without ``N``, measured on a blank image."""
        level = self._level(name)
        if self._shapes is None:
            modes = {module: module.training for module in self.modules()}
            first = next(self.parameters())
            blank = torch.zeros(1, 3, *self.inputs.size, device=first.device, dtype=first.dtype)
            with torch.no_grad():
                measured = self.eval()(blank, self.feature_names()).features
            for module, mode in modes.items():
                module.training = mode
            self._shapes = {k: tuple(v.shape[1:]) for k, v in measured.items()}
        return self._shapes["pooled" if level is None else self._levels()[level]]

    def head(self) -> list[nn.Module]:
        """Return the classification layer; two of them for a distilled transformer."""
        found = self.model.get_classifier()
        return list(found) if isinstance(found, tuple) else [found]

    def freeze_all_but_head(self) -> Classifier:
        """Make it a linear probe: only the classification layer learns; the rest stays in evaluation mode."""
        self.requires_grad_(False)
        for layer in self.head():
            layer.requires_grad_(True)
        self._head_only = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self._head_only:
            self.model.eval()
            for layer in self.head():
                layer.train(mode)
        return self

    def checkpoint_activations(self) -> None:
        """Recompute the model's blocks in the backward.

        Raises:
            UserError: timm's class does not support it.
        """
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UserError(
                f"activation checkpointing: {type(self.model).__name__} of timm cannot do it; leave it off"
            ) from error

    def save_pretrained(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write ``model.safetensors`` and ``config.json``, the layout of timm's models on the hub.

        Args:
            folder: created if missing.
            state: this module's ``state_dict``, gathered by an engine; default: its parameters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state is None else state
        tensors = {k.removeprefix("model."): v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if self._settings is None:
            own = {"input_size": (3, *self.inputs.size)} | asdict(self.inputs)
            own.pop("size")
            names = {"label_names": list(self.classes)} if self.classes else {}
            save_config_for_hf(self.model, str(folder / "config.json"), model_config=names, data_config=own)
        else:
            known = {"inputs": asdict(self.inputs), "classes": self.classes}
            text = json.dumps({**self._settings, **known}, indent=2, ensure_ascii=False)
            (folder / "config.json").write_text(text, encoding="utf-8")


def load_classifier(name_or_folder: str, **settings: Any) -> Classifier:
    """Load a classifier, in float32 and training mode.

    Args:
        name_or_folder: a model of timm (``resnet18``, ``resnet34.tv_in1k``, ``cifar_resnet20``), or a folder that
            :meth:`Classifier.save_pretrained` or timm wrote, or a model of open_clip.
        settings: the other keys of :class:`~vision.config.ClassifierSection`.

    Raises:
        UserError: a name is unknown, weights do not fit or cannot be loaded, or settings contradict each other.
    """
    try:
        section = ClassifierSection(name=name_or_folder, **settings)
    except ValidationError as error:
        raise UserError(f"classifier: {explain(error, ClassifierSection)}") from None
    return load_section(section)


def load_section(section: ClassifierSection) -> Classifier:
    """Load the classifier of a configuration's section, as :func:`load_classifier` does."""
    if section.weights and section.pretrained:
        raise UserError("classifier: give 'pretrained' or 'weights', not both")

    # A folder's own settings override ``source``.
    name, source = section.name, section.source
    folder = Path(name.removeprefix("local-dir:"))
    check_open_clip_folder(folder)
    if (folder / "open_clip_config.json").is_file():
        source, name = "open_clip", f"local-dir:{folder}"
    saved = _saved_settings(folder, a_name=source == "open_clip" or timm.is_model(name))

    if saved.get("source") == "open_clip" or source == "open_clip":
        classifier = _load_open_clip(name, folder, saved, section)
    else:
        classifier = _load_timm(f"local-dir:{folder}" if saved else name, section)
    classifier.inputs = replace(
        classifier.inputs, mean=section.mean or classifier.inputs.mean, std=section.std or classifier.inputs.std
    )
    check_finite(section.name, classifier)
    return classifier


def _load_open_clip(name: str, folder: Path, saved: Mapping[str, Any], section: ClassifierSection) -> Classifier:
    from . import zero_shot  # late: open_clip takes seconds to import

    if saved.get("source") == "open_clip":
        return Classifier(*zero_shot.rebuild(folder, saved, section.num_classes))
    return Classifier(*zero_shot.load(name, section, class_names(section.classes)))


def _load_timm(name: str, section: ClassifierSection) -> Classifier:
    model, notes, trained, hints = _timm_model(name, section)
    classes = class_names(section.classes)
    if classes is None and trained:
        classes = _own_classes(model, trained)
    known = resolve_model_data_config(model)
    inputs = InputSettings(
        _size(model, known, section.image_size),
        tuple(hints.get("mean", known["mean"])),
        tuple(hints.get("std", known["std"])),
        known["interpolation"],
        known["crop_pct"],
    )
    return Classifier(model, inputs, classes, notes=notes)


def class_names(classes: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return class names from a list, the name of one of timm's ImageNet sets, or a text file of one name a line."""
    if classes is None or not isinstance(classes, str):
        return None if classes is None else tuple(str(c) for c in classes)
    subset = {"imagenet": "imagenet-1k"}.get(classes, classes)
    try:
        return tuple(ImageNetInfo(subset).label_names())
    except AssertionError:
        pass
    path = Path(classes)
    if not path.is_file():
        raise UserError(f"classes: '{classes}' is neither a file of names nor a set such as imagenet, imagenet-21k")
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _saved_settings(folder: Path, a_name: bool) -> dict[str, Any]:
    """Read ``config.json`` of a classifier's folder; empty if ``folder`` is a library's name of a model instead."""
    path = folder / "config.json"
    if path.is_file():
        saved = read_object(path)
        if saved.get("source") == "open_clip":
            check_open_clip_config(saved.get("config"), f"{path}: config")
        else:
            check_timm_folder(saved, str(path))
        return saved
    if folder.is_dir() and not a_name:
        raise UserError(f"{folder}: not a classifier's folder (it has no config.json)")
    return {}


def _size(model: Any, known: Mapping[str, Any], given: int | None) -> tuple[int, int]:
    """Return height and width of the images: as given, or as the model was built for."""
    if given is not None:
        return given, given
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built or known["input_size"][1:]
    return int(height), int(width)


def _own_classes(model: Any, trained: int) -> tuple[str, ...] | None:
    """Return the names of trained outputs: those saved with the weights, or ImageNet's by their number."""
    if model.num_classes != trained:
        return None
    named = model.pretrained_cfg.get("label_names")
    if named:
        return tuple(named.values()) if isinstance(named, Mapping) else tuple(named)
    subset = infer_imagenet_subset({"num_classes": trained})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def _near(name: str) -> list[str]:
    """Return similar names of models, the papers' own (``resnet8x4``, ``WRN-40-2``) first."""
    plain = {re.sub("[^a-z0-9]", "", known): known for known in timm.list_models()}
    wanted = re.sub("[^a-z0-9]", "", name.lower())
    exact = [plain[other] for other in (wanted, f"cifar{wanted}") if other in plain]
    return exact or difflib.get_close_matches(name, timm.list_models(), n=3)


def _timm_model(name: str, section: ClassifierSection) -> tuple[nn.Module, list[str], int, dict[str, Any]]:
    """Return model, notes, number of trained classes (0: none), and the weights' input settings."""
    pretrained, weights, num_classes = section.pretrained, section.weights, section.num_classes
    image_size, options = section.image_size, dict(section.config)
    if weightless() and num_classes is not None:
        weights = None  # they may not have been downloaded yet
    folder = name.startswith("local-dir:")
    if isinstance(pretrained, str):
        name, pretrained = f"{name.split('.')[0]}.{pretrained}", True
    if not folder and not timm.is_model(name):
        near = _near(name)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"classifier: '{name}' is neither a folder nor a model of timm; {hint}")
    if not weights and not folder and not pretrained:
        model = _create(name, image_size, {**options, "num_classes": num_classes})
        return model, [], 0, {}

    hints: dict[str, Any] = {}
    if weights:
        read = files.read(weights)
        hints = read.inputs
        own = read.num_classes
        overlay = {"state_dict": read.state, "num_classes": own, "custom_load": False, "label_offset": 0}
        where = f"weights {weights}"
        model = _create(name, image_size, {**options, "num_classes": own, "pretrained_cfg_overlay": overlay}, where)
        model.pretrained_cfg.pop("state_dict", None)
    else:
        model = _create(name, image_size, options, f"'{name}'")
    trained = model.num_classes
    notes = []
    if num_classes is not None and num_classes != trained:
        model.reset_classifier(num_classes)
        notes.append(f"{name}: its weights know {trained} classes; the layer for these {num_classes} starts untrained")
    return model, notes, trained, hints


def _create(name: str, image_size: int | None, options: dict[str, Any], trained: str | None = None) -> Any:
    """Call ``timm.create_model`` with one-line errors; ``trained`` says where weights come from, if any."""

    def create(**more: Any) -> Any:
        return timm.create_model(name, pretrained=trained is not None and not weightless(), **options, **more)

    try:
        if image_size is None or "img_size" in options:
            return create()
        try:  # transformers need the size for their position embeddings; convolutional nets have no such option
            return create(img_size=image_size)
        except TypeError:
            return create()
    except Exception as error:  # timm, torch and the hub raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        told = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", told)
        told = told if len(told) <= 300 else f"{told[:300]} …"
        if trained is None:
            raise UserError(f"classifier: timm cannot build '{name}': {told}") from error
        if trained.startswith("weights"):
            raise UserError(f"classifier: {trained} do not fit '{name}': {told}") from error
        remedy = "" if name.startswith("local-dir:") else "; without a network give 'weights', a local file"
        raise UserError(f"classifier: no weights of {trained} could be loaded: {told}{remedy}") from error
