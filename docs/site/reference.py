"""The reference pages: all are made from the code when the site is built."""

from __future__ import annotations

from pathlib import Path

from commands import commands_page
from keys import Configurations, Example, page_of
from markdown_parts import definition
from python_api import Api

from vision.config import ClassifierConfig
from vision.losses import REGISTRY as CLASSIFIER_LOSSES
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_entry import Benchmark
from vlm_distill.evaluation.benchmarks import BENCHMARKS
from vlm_distill.losses import REGISTRY as LOSSES
from vlm_distill.runtime.metric_names import METRICS
from vlm_distill.sweeping.sections import SweepSection

_RUN = """All keys of the file that `vlm-distill train`, `cache`, `generate`, `inspect` and `plan` read.
[Training](../training.md) introduces them section by section, and says how files are layered. Unknown keys are refused,
with the nearest known one named. In a path, `N` is the number of an entry of a list, counted from 0, and `NAME` a name
of your own: `data.train.0.path=…` on the command line."""
_CLASSIFIER = """All keys of the file that `vlm-distill classify` reads. [Training classifiers](../vision_training.md)
introduces them. Unknown keys are refused, with the nearest known one named. In a path, `N` is the number of an entry of
a list, counted from 0."""
_SWEEP = """All keys of the file that `vlm-distill sweep` reads. [Sweeps](../sweeps.md) has examples."""
_BENCHMARK = """All keys of a benchmark's own file, for `--benchmarks FILE` and `evaluation.benchmarks`.
[Evaluation](../evaluation.md) has an example, and lists the benchmarks that need no file."""

_METRICS = """# Metrics

A run writes one line of JSON to `metrics.jsonl` for each optimizer step (`"kind": "train"`) and for each evaluation of
the student (`"kind": "eval"`). `step` is the number of optimizer steps taken. The same numbers go to TensorBoard and
to Weights & Biases, as `train/NAME` and `eval/DATA/NAME`. In names, `TERM` is a term of the loss (`taid`; the second
of its kind is `taid_2`), and `TEACHER` the name of one of several teachers. A loss of your own may add more.
"""
_KINDS = {"train": "Lines of steps", "eval": "Lines of evaluations"}


def metrics_page() -> str:
    """Return the page about ``metrics.jsonl``."""
    parts = [_METRICS]
    for kind, title in _KINDS.items():
        parts.append(f"## {title}\n")
        for group, metrics in METRICS[kind].items():
            parts.append(f"### {group}\n")
            for metric in metrics:
                unit = f"*{metric.unit}*. " if metric.unit else ""
                parts.append(definition(f"`{metric.name}`", f"{unit}{metric.meaning}", f"{kind}.{metric.name}"))
    return "\n".join(parts)


def reference_pages(root: Path) -> dict[str, str]:
    """Return the text of every reference page by its name. Links are relative to ``docs/reference``."""
    api, found = Api(root), Configurations(root)
    built_in = [Example(one.model_dump(exclude_unset=True), None) for one in BENCHMARKS]
    return {
        "configuration.md": page_of("Configuration of a run", _RUN, RunConfig, found.runs),
        "classifier.md": page_of("Configuration of a classifier", _CLASSIFIER, ClassifierConfig, found.classifiers),
        "sweep.md": page_of("A sweep's file", _SWEEP, SweepSection, found.sweeps),
        "benchmark.md": page_of("A benchmark's file", _BENCHMARK, Benchmark, [*found.benchmarks, *built_in]),
        "losses.md": api.losses_page({"Of vision-language models": LOSSES, "Of classifiers alone": CLASSIFIER_LOSSES}),
        "commands.md": commands_page(),
        "metrics.md": metrics_page(),
        "python.md": api.python_page(),
    }
