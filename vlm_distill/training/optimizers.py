"""Optimizers of both paths: how each is made, and under which ZeRO stages it works.

ZeRO 1 to 3 hands the optimizer flat slices of all parameters. An optimizer that reads whole layers would see layers
that do not exist, so it is refused there, unless DeepSpeed reassembles its layers (Muon at stages 1 and 2).
What an optimizer of the VLM path cannot do is refused by `config.checks`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from data.errors import UserError
from vlm_distill.config.sections import OptimizerSection

from .schedule import parameter_groups

# timm's optimizers whose update of a number reads that number's own gradient and state alone.
_ELEMENTWISE = {
    *("sgd", "momentum", "nesterov", "nesterovw", "sgdw", "adam", "adamw", "adamax", "adagrad", "adadelta", "nadam"),
    *("nadamw", "radam", "radamw", "rmsprop", "rmsproptf", "lion", "adan", "adanw", "adopt", "adoptw", "laprop"),
    "madgrad",
}

Groups = list[dict[str, Any]]


def build_optimizer(
    task: nn.Module,
    section: OptimizerSection,
    scales: Mapping[nn.Parameter, float],
    head: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return the optimizer of a VLM run.

    Args:
        task: what is trained.
        section: the run's.
        scales: factors on the learning rate of single parameters.
        head: parameters of the output layer, which Muon leaves to AdamW, as it does embeddings, norms and biases.

    Raises:
        UserError: the optimizer is not installed.
    """
    groups = parameter_groups(task, section.weight_decay, scales)
    adam: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if section.name == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    if section.name == "adamw8bit":
        if find_spec("bitsandbytes") is None:
            raise UserError(
                "optimizer.name: adamw8bit needs the package bitsandbytes; install vlm-distill[quantize], or use adamw"
            )
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **adam)
    return _muon(task, groups, section, head)


def state_bytes(student: nn.Module, section: OptimizerSection, head: Collection[nn.Parameter]) -> float:
    """Return the bytes of the optimizer's states per trained parameter, for plans.

    Args:
        student: with the parameters that train.
        section: the run's.
        head: parameters of the output layer.
    """
    if section.name == "sgd":
        return 4.0 if section.momentum else 0.0
    if section.name == "adamw8bit":
        return 2.0
    if section.name == "adamw":
        return 8.0
    left_out = {id(parameter) for parameter in [*head, *_embeddings(student)]}
    trained = [p for p in student.parameters() if p.requires_grad]
    matrices = sum(p.numel() for p in trained if p.ndim == 2 and id(p) not in left_out)
    return 8.0 - 4.0 * matrices / max(1, sum(p.numel() for p in trained))


def _muon(
    task: nn.Module, groups: Groups, section: OptimizerSection, head: Collection[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return Muon for the matrices of hidden layers, and AdamW for the rest."""
    from .engine import muon

    others = {id(parameter) for parameter in [*head, *_embeddings(task)]}
    adam = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    split: Groups = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim == 2 and id(p) not in others]
        chosen = {id(parameter) for parameter in matrices}
        rest = [p for p in group["params"] if id(p) not in chosen]
        scale = group.get("lr_scale", 1.0)
        shared = {"weight_decay": group["weight_decay"]}
        if matrices:
            own = {"lr_scale": scale * section.muon_lr / section.lr, "momentum": section.momentum}
            split.append({"params": matrices, "use_muon": True, "lr": section.muon_lr, **shared, **own})
        if rest:
            split.append({"params": rest, "use_muon": False, **adam, **shared, "lr_scale": scale})
    return muon(split)


def _embeddings(task: nn.Module) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for module in task.modules():
        if isinstance(module, nn.Embedding):
            found += module.parameters(recurse=False)
    return found


def classifier_optimizer(student: nn.Module, losses: nn.Module, section: Any, stage: int) -> torch.optim.Optimizer:
    """Return timm's optimizer of that name, over a classifier's parameters and those that its losses learn.

    Args:
        student: timm's or open_clip's module.
        losses: the losses; some have parameters of their own.
        section: ``vision.config.OptimizerSection``.
        stage: of ZeRO.

    Raises:
        UserError: timm has no such optimizer, it cannot work on what ZeRO gives it, or an option is unknown.
    """
    import timm.optim

    if section.name not in timm.optim.list_optimizers():
        raise UserError(f"optimizer.name: timm has no {section.name}; for example sgd, momentum, adamw, lamb")
    if stage and section.name not in _ELEMENTWISE:
        raise UserError(
            f"optimizer.name: {section.name} reads whole layers (or may), which ZeRO {stage} cuts up; set "
            f"deepspeed.stage to 0, or choose one of {', '.join(sorted(_ELEMENTWISE))}"
        )
    groups = [*_classifier_groups(student, section), *_learned_groups(losses, section)]
    try:
        return timm.optim.create_optimizer_v2(
            [group for group in groups if group["params"]],
            section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            **section.options,
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise UserError(f"optimizer: {section.name}: {' '.join(str(error).split())}") from None


def _classifier_groups(student: Any, section: Any) -> Groups:
    """Return a classifier's parameters in groups, as timm makes them."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Sequence[str] = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()
    if section.layer_decay is not None:
        try:
            return param_groups_layer_decay(
                student, section.weight_decay, no_weight_decay_list=exempt, layer_decay=section.layer_decay
            )
        except (AttributeError, AssertionError):
            raise UserError(
                f"optimizer.layer_decay: timm knows no layers of {type(student).__name__}; leave it out"
            ) from None
    if section.decay == "all":
        trained = [p for p in student.parameters() if p.requires_grad]
        return [{"params": trained, "weight_decay": section.weight_decay}]
    return param_groups_weight_decay(student, section.weight_decay, no_weight_decay_list=exempt)


def _learned_groups(losses: nn.Module, section: Any) -> Groups:
    """Return what a classifier's losses learn, in groups."""
    groups = parameter_groups(losses, section.weight_decay)
    if section.layer_decay is None and section.decay == "all":
        return [{**group, "weight_decay": section.weight_decay} for group in groups]
    return groups
