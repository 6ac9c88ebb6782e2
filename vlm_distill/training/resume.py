"""What a resumed run may change: a rule for every key of a configuration, and the record ``run.json``.

``run.json`` is written into the run's folder and into each checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data import digest
from data.digest import SourceDigest
from data.saved_json import read_object
from vlm_distill.config.differences import completed
from vlm_distill.config.sections import AnyRun
from vlm_distill.models.fingerprint import fingerprint

NAME = "run.json"
_LONGEST = 60


class Rule(Enum):
    """What happens if a resumed run has changed a key.

    FIXED: refused: the key decides what the student learns.
    FILES: a model's name or path; refused if the files differ, or cannot be compared and have another name.
    ROWS: a location of data; the rows themselves are compared.
    STEERS: allowed and recorded: the student is trained partly with the old value, partly with the new one.
    FREE: allowed: the student is the same to rounding, or only observed differently.
    UNSAID: allowed, and not reported.
    """

    FIXED = auto()
    FILES = auto()
    ROWS = auto()
    STEERS = auto()
    FREE = auto()
    UNSAID = auto()


def _of_both_models(rule: Rule, *keys: str) -> dict[str, Rule]:
    return dict.fromkeys([*(f"student.{key}" for key in keys), *(f"teacher.{key}" for key in keys)], rule)


#: The rule of each key, without list numbers; a key without a rule has that of its section.
RULES: dict[str, Rule] = {
    # Models: what they compute is fixed; where they are placed and how fast they compute is free.
    **dict.fromkeys(("student", "teacher"), Rule.FIXED),
    **_of_both_models(
        Rule.FILES, "path", "name", "weights", "tokenizer", "chat_template", "decoder.name", "vision_encoder.name"
    ),
    **_of_both_models(Rule.FREE, "attn_implementation", "trust_remote_code"),
    "student.vision_cache": Rule.FREE,
    "student.lora.merge": Rule.FREE,
    "teacher.placement": Rule.FREE,
    "teacher.cache": Rule.FREE,
    "teacher.cache.form": Rule.FIXED,
    "teacher.cache.k": Rule.FIXED,
    **dict.fromkeys((f"teacher.server.{key}" for key in ("url", "workers", "timeout")), Rule.FREE),
    "loss": Rule.FIXED,
    # Data: which rows are read in which order, and what is learnt of each.
    **dict.fromkeys(("data.train", "data.views", "data.erasing", "data.mixing"), Rule.FIXED),
    **dict.fromkeys(("data.train.path", "data.train.images"), Rule.ROWS),
    **dict.fromkeys(
        (
            f"data.{key}"
            for key in (
                "max_length",
                "max_prompt",
                "max_response",
                "answers",
                "turns",
                "template_text",
                "max_pixels",
                "video",
                "length_window",
                "packing",
                "repeats",
                "fixed_views",
            )
        ),
        Rule.FIXED,
    ),
    **dict.fromkeys(
        (f"data.{key}" for key in ("eval", "roots", "bad_samples", "max_bad", "workers", "prefetch")), Rule.FREE
    ),
    "data.video.timeout": Rule.FREE,
    # The optimizer's state holds weight decay, betas and the parts' factors; the schedule spans the whole run.
    "optimizer": Rule.FIXED,
    **dict.fromkeys(("optimizer.lr", "optimizer.max_grad_norm"), Rule.STEERS),
    **dict.fromkeys(("training.steps", "training.epochs"), Rule.STEERS),
    **dict.fromkeys((f"training.{key}" for key in ("batch_size", "dtype", "seed", "ema", "gather")), Rule.FIXED),
    "training.smoke": Rule.FIXED,
    **dict.fromkeys(
        (
            f"training.{key}"
            for key in (
                "micro_batch_size",
                "device",
                "activation_checkpointing",
                "checkpoint_every",
                "keep_checkpoints",
                "timeout",
                "on_oom",
                "stopped_exit_code",
                "trackers",
                "recompute_logits",
                "sequence_parallel",
                "channels_last",
                "compile",
            )
        ),
        Rule.FREE,
    ),
    "training.resume": Rule.UNSAID,
    "deepspeed": Rule.FREE,
    "evaluation": Rule.FREE,
    "on_policy": Rule.FIXED,
    "on_policy.batch_size": Rule.FREE,
    **dict.fromkeys(
        (f"on_policy.server.{key}" for key in ("url", "model", "weights", "folder", "adapter", "workers", "timeout")),
        Rule.FREE,
    ),
    "output": Rule.UNSAID,
}


def rule_of(key: str) -> Rule | None:
    """Return the rule of a dotted key such as ``loss.0.weight``: its own, or that of the nearest section."""
    parts = [part for part in key.split(".") if not re.fullmatch(r"\d+", part)]
    if parts[0] == "teachers":  # each has a teacher's rules
        parts = ["teacher", *parts[2:]]
    for length in range(len(parts), 0, -1):
        rule = RULES.get(".".join(parts[:length]))
        if rule is not None:
            return rule
    return None


@dataclass(frozen=True)
class Record:
    """What a run records about itself.

    Attributes:
        configuration: resolved, as plain data.
        steps: optimizer steps of the whole run.
        models: digests of the files of each model that the configuration names, by key.
        data: a digest of each source of ``data.train``.
        changes: what resumed starts changed, ``{"after": step, "changed": {key: [old, new]}}``, oldest first.
    """

    configuration: dict[str, Any]
    steps: int = 0
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def of(config: AnyRun) -> Record:
        """Return the record of a configuration; data and steps are added later."""
        plain = config.model_dump(mode="json")
        return Record(plain, models=_identify(plain))

    def planned(self, steps: int, data: Sequence[SourceDigest]) -> Record:
        """Return this record with the length of the run and digests of its data."""
        return replace(self, steps=steps, data=[asdict(source) for source in data])

    def write(self, folder: Path) -> None:
        """Write ``run.json`` into a folder atomically."""
        aside = folder / f"{NAME}.part"
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        aside.replace(folder / NAME)

    @staticmethod
    def read(folder: Path) -> Record:
        """Return the record in a folder. Raise ``UserError`` if it cannot be read."""
        changes = list[dict[str, Any]]
        shape = {"configuration": dict[str, Any], "steps": int, "changes": changes, "data": list[dict[str, Any]]}
        found = read_object(folder / NAME, shape | {"models": dict[str, dict[str, str]]})
        return Record(**{key: found[key] for key in (*shape, "models")})

    def comments(self) -> list[str]:
        """Return a line for each change: ``after step 100: optimizer.lr 0.001 → 0.0005``."""
        return [f"after step {change['after']}: {in_words(change['changed'])}" for change in self.changes]


def compare(old: Record, config: AnyRun, new: Record) -> tuple[list[str], dict[str, Any]]:
    """Compare a run with the one that it is to resume.

    Returns:
        Differences that are refused, in words; and those that are allowed, ``{key: [old, new]}``.
    """
    assert isinstance(config, BaseModel)
    before, now = _leaves(completed(old.configuration, type(config))), _leaves(new.configuration)
    refused: list[str] = []
    allowed: dict[str, Any] = {}
    for key in [*now, *(key for key in before if key not in now)]:
        rule, values = rule_of(key), [before.get(key), now.get(key)]
        if key == "optimizer.lr" and _has_factors(now):
            rule = Rule.FIXED  # the optimizer's state has other learning rates as factors on it
        if rule is Rule.FILES and key in old.models and key in new.models:
            # Names do not matter if the files can be compared.
            kinds = [kind for kind, digest in new.models[key].items() if old.models[key].get(kind, digest) != digest]
            refused += [f"{key}: other {' and '.join(kinds)} in {values[1]}"] if kinds else []
        elif values[0] == values[1] or rule in (Rule.ROWS, Rule.UNSAID):
            continue
        elif rule in (Rule.STEERS, Rule.FREE):
            allowed[key] = values
        else:
            refused.append(f"{key}: {_shown(values[0])} → {_shown(values[1])}")
    return refused, allowed


def _has_factors(leaves: Mapping[str, Any]) -> bool:
    """Return whether some parameters have a learning rate that is a factor on ``optimizer.lr``."""
    return leaves.get("optimizer.name") == "muon" or any(name.startswith("optimizer.part_lr.") for name in leaves)


def compare_data(old: Record, new: Record) -> list[str]:
    """Return in words how the data of a run differ from those of the run that it is to resume."""
    return [f"data.train: {difference}" for difference in digest.differences(old.data, new.data)]


def steering(allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the allowed changes that affect the student's training."""
    return {key: values for key, values in allowed.items() if rule_of(key) is Rule.STEERS}


def in_words(changed: Mapping[str, Any]) -> str:
    """Return changes as ``training.steps 100 → 200, data.workers 2 → 4``."""
    return ", ".join(f"{key} {_shown(old)} → {_shown(new)}" for key, (old, new) in changed.items())


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _leaves(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value by its dotted key, without empty ones."""
    found = dict(_walk(plain, ""))
    # Only the likeliest tokens are an approximation of the teacher's own outputs.
    form = re.compile(r"(teacher|teachers\.\w+)\.cache\.(form|k)")
    exact = {
        match[1] for key, value in found.items() if (match := form.fullmatch(key)) and value in ("hidden", "token")
    }
    return {key: value for key, value in found.items() if not (match := form.fullmatch(key)) or match[1] not in exact}


def _walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list) and tree:
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _walk(value, f"{prefix}.{key}" if prefix else str(key))
    elif tree is not None and tree != {} and tree != []:
        yield prefix, tree


def _identify(plain: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return digests of the files of every model named, if they are on this machine."""
    found = {}
    for key, value in _leaves(plain).items():
        if rule_of(key) is Rule.FILES and isinstance(value, str):
            try:
                found[key] = fingerprint(value)
            except (OSError, ValueError, AttributeError, RecursionError):
                continue  # loading it will say what is wrong
    return {key: digests for key, digests in found.items() if digests}
