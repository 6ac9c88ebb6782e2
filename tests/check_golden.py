"""Compares the suite with golden values: ``python tests/check_golden.py losses|scoring [FOLDER ...]``.

Prints the cases and failures of each loss or scorer, for losses with the worst error; exits with 1 if anything failed.
What the suite does not have is listed as not built. The formats are described in ``golden/losses/README.md`` and
``golden/scoring/README.md``; the scorers are compared in ``check_golden_scoring.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":  # Python puts this file's folder first, where tests/data would hide the package `data`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import vision.losses
from vision.losses import mlkd
from vlm_distill import losses
from vlm_distill.losses import Progress
from vlm_distill.losses.softmax import upcast

GOLDEN = Path(__file__).resolve().parent / "golden"
# Relative to max(1, T²)(1 + |reference|) for values, to the largest reference entry for gradients, plus a floor.
TOLERANCES = {torch.float64: (1e-12, 1e-12, 1e-14), torch.float32: (5e-6, 1e-5, 5e-7)}


@dataclass
class Comparison:
    """One number or array against its expectation; ``error`` is in units of the tolerance, so it must not exceed 1."""

    case: str
    what: str
    error: float

    @property
    def ok(self) -> bool:
        return self.error <= 1.0  # false for NaN


class Golden:
    """A folder of the format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = json.loads((folder / "index.json").read_text())
        self.cases = {case["id"]: case for case in self.index["cases"]}
        self._files: dict[str, Any] = {}

    def changed(self) -> list[str]:
        """Files that are not those the index was written for."""
        digests = self.index["files"].items()
        return [n for n, d in digests if hashlib.sha256((self.folder / n).read_bytes()).hexdigest() != d]

    def array(self, file: str, name: str) -> np.ndarray:
        if file not in self._files:
            self._files[file] = np.load(self.folder / file, allow_pickle=False)
        return self._files[file][name.replace("/", ".")]

    def inputs(self, case: dict) -> dict[str, torch.Tensor]:
        """``student``, ``teacher``, ``target``, ``mask``; the mask is all ones where the case does not use it."""
        name = case["input"]
        arrays = {
            k: torch.from_numpy(self.array("inputs.npz", f"{name}.{k}")) for k in ("student", "teacher", "target")
        }
        mask = self.array("inputs.npz", f"{name}.mask") if case["use_mask"] else np.ones(len(arrays["target"]))
        return {**arrays, "mask": torch.from_numpy(mask.astype(bool))}

    def expected(self, case: dict, key: str, what: str) -> Any:
        """An expectation's number or array; ``None`` where the case has none."""
        entry = next((e for e in case["expect"] if e["key"] == key), None)
        if entry is None:
            return None
        if what == "loss":
            return float(entry["loss"])
        owner = entry.get("same_as", {}).get(what) or (key if what in entry.get("arrays", ()) else None)
        return None if owner is None else self.array(case["file"], f"{case['id']}.{owner}.{what}")


# Cases of weighted sums, of standardised logits, and of schedules.
COMPOSED = ("kd_total", "logit_std_kd", "logit_std_dkd", "taid_schedule", "ctkd_decay")
# Cases of losses that compare the rows of a batch, and MLKD's terms by themselves.
BATCHES = ("dist", "mlkd", "mlkd_instance", "mlkd_batch", "mlkd_class")


def build(case: dict, dtype: torch.dtype = torch.float64) -> list[losses.Term]:
    """The terms of a case: TAID's cases give a value of t where the suite has a schedule."""
    params = dict(case["params"])
    if case["loss"].startswith("logit_std_"):
        assert (params.pop("ddof", 1), params.pop("eps", 1e-7)) == (1, 1e-7)
        return [losses.Term("loss", losses.build(case["loss"].removeprefix("logit_std_"), standardise=True, **params))]
    if case["loss"] == "kd_total":
        weights = params.pop("ce_weight"), params.pop("kd_weight")
        pair = losses.build("cross_entropy"), losses.build("kd", **params)
        return [losses.Term(f"term {i}", loss, w) for i, (loss, w) in enumerate(zip(pair, weights, strict=True))]
    if case["loss"] != "taid":
        loss = losses.build(case["loss"], **params).to(dtype)
        if case["loss"] == "ctkd":
            loss.source.g.data.fill_(params["g"])  # which float32 had rounded
        return [losses.Term("loss", loss)]
    loss = losses.build("taid")
    loss.t = params["t"]
    return [losses.Term("loss", loss)]


def built(name: str) -> bool:
    """Whether the suite has the loss of a case."""
    return name in COMPOSED or name in BATCHES or name in losses.available()


def compare(golden: Golden, case: dict) -> Iterator[Comparison]:
    """Every comparison of a case of a loss that the suite has."""
    if case["loss"] == "taid_schedule":
        yield from _compare_schedule(golden, case)
        return
    if case["loss"] == "ctkd_decay":
        yield _compare_decay(case)
        return
    if case["loss"] in BATCHES:
        yield from _compare_batch(golden, case)
        return
    inputs = golden.inputs(case)
    mask, count = inputs["mask"], max(int(inputs["mask"].sum()), 1)
    # CTKD's cases tell their temperature with the expected values.
    temperatures = [e.get("temperature", 1.0) for e in (case["params"], *case["expect"])]
    softness = max(1.0, max(temperatures) ** 2)
    for dtype, (value_tolerance, grad_tolerance, floor) in TOLERANCES.items():

        def value(what: str, got: torch.Tensor, want: Any, scale: float = value_tolerance * softness) -> Comparison:
            return Comparison(case["id"], what, _error(got, want, lambda ref: scale * (1.0 + np.abs(ref))))

        def gradient(
            what: str, got: torch.Tensor, want: Any, relative: float = grad_tolerance, least: float = floor
        ) -> Comparison:
            return Comparison(case["id"], what, _error(got, want, lambda ref: relative * np.abs(ref).max() + least))

        terms = build(case, dtype)
        student, teacher = inputs["student"].to(dtype), inputs["teacher"].to(dtype)
        leaf = student.clone().requires_grad_()
        defined = sum(term.weight * term.loss(leaf, teacher, inputs["target"]) for term in terms)
        reduced = defined[mask].sum() / count
        results = [t.loss.loss_and_grad(student.clone(), teacher.clone(), inputs["target"], grad=True) for t in terms]
        closed = sum(term.weight * result.loss for term, result in zip(terms, results, strict=True))
        closed_grad = sum(term.weight * result.grad for term, result in zip(terms, results, strict=True))
        name = str(dtype).removeprefix("torch.")
        for route, per_row in (("forward", defined.detach()), ("rows", closed)):
            yield value(f"{name} {route} loss", per_row[mask].sum() / count, golden.expected(case, "paper", "loss"))
            if (want := golden.expected(case, "paper", "per_row")) is not None:
                yield value(f"{name} {route} per_row", per_row, want)
        if (want := golden.expected(case, "paper", "grad")) is not None:
            yield gradient(f"{name} forward grad", torch.autograd.grad(reduced, leaf)[0], want)
            yield gradient(f"{name} rows grad", closed_grad * mask.unsqueeze(1) / count, want)
        if case["loss"] == "ctkd":
            (term,) = terms
            g, want = term.loss.source.g, next(e["grad_g"] for e in case["expect"] if e["key"] == "paper")
            (by_definition,) = torch.autograd.grad((term.loss(leaf, teacher)[mask]).sum() / count, g)
            made, (slope,) = (
                term.loss.learned_tensors(),
                term.loss.loss_and_grad(student[mask], teacher[mask], grad=True).learned,
            )
            by_rows = torch.autograd.grad(made, g, slope)[0] / count
            for route, got in (("forward", by_definition), ("rows", by_rows)):
                # A sum that nearly cancels: relative to the loss that it is the slope of.
                scale = value_tolerance * (1 + abs(golden.expected(case, "paper", "loss")))
                yield Comparison(case["id"], f"{name} {route} grad_g", abs(float(got) - want) / scale)
        if case["loss"] == "adaptive_kl":  # the TAID repository's baseline
            other = losses.build("adaptive_kl", convention="taid", **case["params"])
            result = other.loss_and_grad(student.clone(), teacher.clone(), grad=True)
            for what, got in (("per_row", result.loss), ("grad", result.grad * mask.unsqueeze(1) / count)):
                if (want := golden.expected(case, "taid-repo-form", what)) is not None:
                    yield (value if what == "per_row" else gradient)(f"{name} convention taid {what}", got, want)
        signals = results[0].signals
        if (want := golden.expected(case, "cross-entropy", "per_row")) is not None and signals:
            yield value(f"{name} signal cross_entropy", signals["cross_entropy"], want)


def _batch_value(case: dict, key: str, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> Any:
    """The value of a case of a batch, of two views one after the other where the case has them."""
    params = dict(case["params"])
    if case["loss"] == "dist":
        assert params.pop("eps") == 1e-8
        return vision.losses.build("dist", **params)(student, teacher)
    if case["loss"] == "mlkd":
        temperatures = [params["temperature"], *params["other_temperatures"]]
        settings = {"variant": "paper" if key == "paper" else "published", "standardise": key == "published-logit-std"}
        loss = vision.losses.build("mlkd", temperatures=temperatures, **settings)
        entropy = vision.losses.build("cross_entropy")(student, None, target.repeat(2))
        return 2 * params["ce_weight"] * entropy.mean() + params["kd_weight"] * loss(student, teacher)
    temperatures = params["temperatures"]
    scale = torch.tensor(temperatures, dtype=student.dtype).view(-1, 1, 1)
    student, teacher = upcast(student) / scale, upcast(teacher) / scale
    if case["loss"] == "mlkd_instance":
        return mlkd.instance_terms(student, teacher, temperatures).sum()
    of_images, of_classes = mlkd.relation_terms(student.softmax(-1), teacher.softmax(-1))
    return (of_images if case["loss"] == "mlkd_batch" else of_classes).sum()


def _compare_batch(golden: Golden, case: dict) -> Iterator[Comparison]:
    """Losses of a whole batch, whose ignored rows are taken out first."""
    views = ["weak", "strong"] if case["loss"] == "mlkd" else [None]
    if case["loss"] == "mlkd":
        arrays = {
            name: torch.from_numpy(golden.array("inputs.npz", f"{case['input']}.{name}"))
            for name in ("student_weak", "student_strong", "teacher_weak", "teacher_strong", "target")
        }
        student, teacher = (torch.cat([arrays[f"{role}_{v}"] for v in views]) for role in ("student", "teacher"))
        target, kept = arrays["target"], torch.ones(len(student), dtype=torch.bool)
    else:
        inputs = golden.inputs(case)
        student, teacher, target, kept = (inputs[name] for name in ("student", "teacher", "target", "mask"))
    params = case["params"]
    single = [params.get(name, 1.0) for name in ("tau", "temperature")]
    softness = max(1.0, *single, *params.get("other_temperatures", ()), *params.get("temperatures", ())) ** 2
    for key in ("paper", "published", "published-logit-std"):
        if (want := golden.expected(case, key, "loss")) is None:
            continue
        for dtype, (value_tolerance, grad_tolerance, floor) in TOLERANCES.items():
            relative = value_tolerance * softness
            name = f"{str(dtype).removeprefix('torch.')} {key}"
            leaf = student.to(dtype).requires_grad_()
            value = _batch_value(case, key, leaf[kept], teacher.to(dtype)[kept], target)
            yield Comparison(
                case["id"], f"{name} loss", _error(value, want, lambda ref, r=relative: r * (1 + abs(ref)))
            )
            (gradient,) = torch.autograd.grad(value, leaf)
            for view, part in zip(views, gradient.chunk(len(views)), strict=True):
                expected = golden.expected(case, key, "grad" if view is None else f"grad_{view}")
                error = _error(part, expected, lambda ref, r=grad_tolerance, f=floor: r * np.abs(ref).max() + f)
                yield Comparison(case["id"], f"{name} grad {view or ''}", error)


def _compare_decay(case: dict) -> Comparison:
    params = case["params"]
    assert (params["max"], params["min"]) == (0.0, -1.0)
    loss, got = losses.build("ctkd", loops=params["loops"]), []
    for epoch in case["epochs"]:
        loss.update({}, Progress(0, 1, epoch=epoch))
        got.append(loss.coefficient)
    want = next(e["values"] for e in case["expect"] if e["key"] == "paper")
    return Comparison(
        case["id"], "coefficient", _error(torch.tensor(got, dtype=torch.float64), want, lambda ref: 1e-12)
    )


def _compare_schedule(golden: Golden, case: dict) -> Iterator[Comparison]:
    params = dict(case["params"])
    every, steps = params.pop("calls_per_step"), params.pop("num_train_steps")
    loss = losses.build("taid", schedule="linear" if params.pop("disable_adaptive") else "paper", **params)
    sequence = golden.array(case["file"], case["sequence"]).astype(np.float64)
    sequence[case.get("nan_at", [])] = np.nan
    t = []
    for call, signal in enumerate(sequence):
        # The released code updates at every micro-batch.
        loss.update({"cross_entropy": float(signal)}, Progress(step=call // every, steps=steps))
        t.append(loss.t)
    got = torch.tensor(t, dtype=torch.float64)[golden.array(case["file"], f"{case['id']}.calls")]
    # What the released code does after a non-finite loss is a fault; there we skip it.
    skips = golden.expected(case, "skip-nonfinite", "t") is not None
    for key, tolerance in (("skip-nonfinite", 1e-12),) if skips else (("as-coded", 1e-12), ("taid-repo", 5e-6)):
        if (want := golden.expected(case, key, "t")) is not None:
            yield Comparison(case["id"], f"{key} t", _error(got, want, lambda ref, tol=tolerance: tol))
    yield Comparison(case["id"], "t never falls", 0.0 if bool((got.diff() >= 0).all()) else math.inf)


def _error(got: torch.Tensor, want: Any, tolerance: Any) -> float:
    """The largest error in units of the tolerance; equal infinities agree."""
    found, want = got.detach().double().numpy(), np.asarray(want, dtype=np.float64)
    if found.shape != want.shape:
        return math.inf
    with np.errstate(invalid="ignore"):
        errors = np.where(found == want, 0.0, np.abs(found - want) / tolerance(np.where(np.isinf(want), 0.0, want)))
    return float(errors.max(initial=0.0))  # NaN stays NaN


def check(folder: Path) -> bool:
    """Compares all cases of a folder and prints a table. True if none failed."""
    golden = Golden(folder)
    passed = True
    for name in golden.changed():
        passed = False
        print(f"FAIL {name} is not the file that index.json was written for")
    by_loss: dict[str, list[dict]] = {}
    for case in golden.index["cases"]:
        by_loss.setdefault(case["loss"], []).append(case)
    print(f"{'loss':20} {'cases':>6} {'comparisons':>12} {'failed':>7} {'worst error / tolerance':>24}")
    for loss, cases in by_loss.items():
        if not built(loss):
            print(f"{loss:20} {len(cases):6}   not built")
            continue
        comparisons = [c for case in cases for c in compare(golden, case)]
        failed = [c for c in comparisons if not c.ok]
        worst = max((c.error for c in comparisons), key=lambda e: math.inf if math.isnan(e) else e)
        print(f"{loss:20} {len(cases):6} {len(comparisons):12} {len(failed):7} {worst:24.3g}")
        for c in failed:
            passed = False
            print(f"  FAIL {c.case}: {c.what}: {c.error:.3g} tolerances")
    return passed


def _scoring() -> ModuleType:
    """The module beside this one, which is no package's: loaded by its path."""
    spec = importlib.util.spec_from_file_location(
        "check_golden_scoring", Path(__file__).with_name("check_golden_scoring.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["losses", "scoring"])
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    check_folder = check if options.what == "losses" else _scoring().check
    folders = options.folders or [GOLDEN / options.what]
    results = [check_folder(folder) for folder in folders]  # all of them, also after a failure
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
