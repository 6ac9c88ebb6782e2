"""open_clip's image towers as classifiers: zero-shot, by the text features of class names, or under a linear layer."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from data.errors import UserError, first_line
from vlm_distill.models.weightless import weightless

from .classes import words
from .config import ClassifierSection
from .inputs import InputSettings

TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}


class Parts(NamedTuple):
    """Arguments of :class:`~vision.classifier.Classifier`, in order."""

    model: nn.Module
    inputs: InputSettings
    classes: Sequence[str] | None
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()


class ImageTower(nn.Module):
    """An open_clip image tower and a linear layer, with the methods that timm's models have.

    With ``normalise`` it is a zero-shot classifier: the layer's weight holds the classes' text features of length one,
    times the logit scale, and its bias the logit bias (SigLIP's; CLIP has none).
    """

    def __init__(self, visual: nn.Module, head: nn.Linear, normalise: bool) -> None:
        super().__init__()
        tower: Any = visual
        self.visual = tower
        self.head = head
        self.normalise = normalise
        self.num_features = head.in_features
        if hasattr(visual, "output_tokens"):
            tower.output_tokens = False  # CoCa's tower returns them with the image's features
        if hasattr(visual, "trunk"):
            self.feature_info = list(tower.trunk.feature_info)
        elif isinstance(visual, ModifiedResNet):
            self.feature_info = [{"module": m} for m in ("stem", "layer1", "layer2", "layer3", "layer4")]
        else:
            self.feature_info = [{"module": f"blocks.{i}"} for i in range(len(tower.transformer.resblocks))]

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.visual(images))

    def forward_intermediates(self, images: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        # Always ask for the last level: open_clip's ResNets stop at the highest one.
        levels = sorted({*indices, len(self.feature_info) - 1})
        found = self.visual.forward_intermediates(images, indices=levels)
        maps = dict(zip(levels, found["image_intermediates"], strict=True))
        return found["image_features"], [maps[i] for i in indices]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if self.normalise:
            features = F.normalize(features, dim=-1)
        return features if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.num_features, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)


def load(name: str, section: ClassifierSection, classes: Sequence[str] | None) -> Parts:
    """Load a zero-shot classifier, or with ``num_classes`` an image tower under a new linear layer.

    Args:
        name: a model of open_clip, or ``local-dir:…`` or ``hf-hub:…``, which include weights; with ``section.config``
            only a name for messages.
        section: weights, size and prompts.
        classes: classes of the zero-shot classifier, as words or ImageNet synsets; ``None``: ImageNet's 1,000
            with open_clip's names. With ``num_classes``: names of the outputs.

    Raises:
        UserError: model, weights or prompts are missing or do not fit.
    """
    pretrained, weights, num_classes = section.pretrained, section.weights, section.num_classes
    prompts = _prompts(section.templates)
    with _named(name, section.config) as source:
        try:
            model, tokenizer = _whole(source, pretrained, weights, section.image_size)
            settings = _settings(source, model)
        except UserError:
            raise
        except Exception as error:  # whatever open_clip, torch and the hub raise
            raise UserError(
                f"classifier: open_clip cannot build '{name}': {' '.join(str(error).split())[:300]}; "
                "without a network give 'weights', a local file"
            ) from error
    trained = bool(pretrained or weights or name.startswith(("local-dir:", "hf-hub:")))
    notes = [] if trained else [f"{name}: weights are random; give 'pretrained' or 'weights'"]
    if num_classes is not None:
        head = nn.Linear(_width(model, settings), num_classes)
        notes.append(f"{name}: the layer for these {num_classes} classes starts untrained")
    else:
        spoken, classes = _words(classes)
        if weightless():
            head = nn.Linear(_width(model, settings), len(spoken), bias=getattr(model, "logit_bias", None) is not None)
        else:
            head = _text_head(model, tokenizer, spoken, prompts)
    normalise = num_classes is None
    settings |= {"normalise": normalise, "bias": head.bias is not None}
    known = open_clip.get_model_preprocess_cfg(model)
    mean, std = known.get("mean", open_clip.OPENAI_DATASET_MEAN), known.get("std", open_clip.OPENAI_DATASET_STD)
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = InputSettings((height, width), tuple(mean), tuple(std), known.get("interpolation", "bicubic"))
    return Parts(ImageTower(model.visual, head, normalise), inputs, classes, settings, notes)


def rebuild(folder: Path, saved: Mapping[str, Any], num_classes: int | None = None) -> Parts:
    """Load the classifier that ``save_pretrained`` wrote; another ``num_classes`` gives it a new linear layer."""
    try:
        config = saved["config"]
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config["quick_gelu"])
        state = load_file(folder / "model.safetensors")
        outputs, width = state["head.weight"].shape
        tower = ImageTower(visual, nn.Linear(width, outputs, bias=saved["bias"]), saved["normalise"])
        tower.load_state_dict(state)
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["inputs"].items()}
        inputs = InputSettings(**known)
    except Exception as error:  # a folder that something else has changed
        raise UserError(f"{folder}: not an open_clip classifier as saved: {first_line(error)}") from error
    settings = {k: v for k, v in saved.items() if k not in ("inputs", "classes")}
    if num_classes is None or num_classes == outputs:
        return Parts(tower, inputs, saved["classes"], settings)
    tower.reset_classifier(num_classes)
    note = f"{folder}: its weights know {outputs} classes; the layer for these {num_classes} starts untrained"
    return Parts(tower, inputs, None, {**settings, "bias": True}, [note])


def _prompts(templates: str | Sequence[str]) -> Sequence[Any]:
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise UserError(f"templates: '{templates}' is neither one of {', '.join(TEMPLATES)} nor a list of prompts")
        return TEMPLATES[templates]
    for template in templates:
        if "{}" not in template:
            raise UserError(f"templates: '{template}' has no {{}} for the class name")
    if not templates:
        raise UserError("templates: an empty list; leave it out for open_clip's own")
    return list(templates)


@contextmanager
def _named(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Context manager: yield a name that open_clip knows; a custom configuration becomes a temporary folder."""
    if not config:
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"model_cfg": config})
        (Path(folder) / "open_clip_config.json").write_text(text, encoding="utf-8")
        yield f"local-dir:{folder}"


def _whole(source: str, pretrained: bool | str, weights: str | None, image_size: int | None) -> tuple[Any, Any]:
    """Return the whole model with its text tower, and its tokenizer, unless it is planned without weights."""
    known = open_clip.get_model_config(source)
    if known is None:
        raise UserError(f"classifier: open_clip knows no model called '{source}'; open_clip.list_models() lists them")
    tag = pretrained or None
    if pretrained is True and not source.startswith(("local-dir:", "hf-hub:")):
        tags = open_clip.list_pretrained_tags_by_model(source)
        if not tags:
            raise UserError(f"classifier: open_clip has no weights for '{source}'; choose another model")
        tag = tags[0]
    # Some tags' weights were trained with quick GELU although the model's name does not say so.
    quick = isinstance(tag, str) and bool(open_clip.get_pretrained_cfg(source, tag).get("quick_gelu"))
    logging.disable(logging.WARNING)  # missing weights are reported in the classifier's notes
    try:
        model: Any = open_clip.create_model(
            source,
            pretrained=tag if isinstance(tag, str) and not weightless() else None,
            load_weights=weights is None and not weightless(),
            force_image_size=None if image_size is None else (image_size, image_size),
            force_quick_gelu=quick,
            pretrained_text=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    if weightless():
        return model.eval(), None
    if weights:
        if not Path(weights).is_file():
            raise UserError(f"weights: no file {weights}")
        try:
            open_clip.load_checkpoint(model, weights)
        except Exception as error:  # not a state dict, or another model's
            told = " ".join(str(error).split())[:300]
            raise UserError(f"classifier: weights {weights} do not fit '{source}': {told}") from error
    return model.eval(), open_clip.get_tokenizer(source)


def _settings(source: str, model: Any) -> dict[str, Any]:
    """Return the settings that rebuild the image tower without a network."""
    known: Any = open_clip.get_model_config(source)
    size = model.visual.image_size
    vision = {**known["vision_cfg"], "image_size": size if isinstance(size, int) else list(size)}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    quick = any(isinstance(m, QuickGELU) for m in model.visual.modules())
    config = {"embed_dim": known["embed_dim"], "vision_cfg": vision, "quick_gelu": quick}
    return {"source": "open_clip", "config": config}


def _width(model: Any, settings: Mapping[str, Any]) -> int:
    """Return the width of the image's features."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        found = model.encode_image(torch.zeros(1, 3, height, width))
    return int(found.shape[-1])


def _words(classes: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the words for the prompts, and the names of the outputs; synsets become words."""
    named = ImageNetInfo("imagenet-1k").label_names() if classes is None else list(classes)
    return [words().get(name, name.replace("_", " ")) for name in named], named


@torch.no_grad()
def _text_head(model: Any, tokenizer: Any, spoken: Sequence[str], prompts: Sequence[Any]) -> nn.Linear:
    """Return a linear layer of the classes' text features, averaged over prompts and normalised to length one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # 80,000 prompts for ImageNet
    model.to(device)
    features = open_clip.build_zero_shot_classifier(model, tokenizer, spoken, prompts, device=device).cpu()
    model.to("cpu")
    bias = getattr(model, "logit_bias", None)
    head = nn.Linear(features.shape[0], features.shape[1], bias=bias is not None)
    head.weight.copy_(model.logit_scale.exp() * features.T)
    if bias is not None:
        head.bias.copy_(bias.expand(len(spoken)))
    return head
