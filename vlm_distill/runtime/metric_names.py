"""Every metric that a run writes to ``metrics.jsonl``: name, unit and meaning. A test refuses metrics that are missing.

In names, ``TERM`` stands for a term's name (``taid``, ``jsd_2``) and ``TEACHER`` for a teacher's, or for a mixture's
(``A+B``).
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: its key, with ``TERM`` and ``TEACHER`` as placeholders.
        unit: of its values; empty for plain numbers.
        meaning: one sentence.
    """

    name: str
    unit: str
    meaning: str


#: Metrics by the kind of line that has them, and the headings under which they are shown.
METRICS: dict[str, dict[str, list[Metric]]] = {
    "train": {
        "Every step": [
            Metric("loss", "nats", "Weighted sum of the terms' means over the step; missing if it has no rows."),
            Metric("grad_norm", "", "Norm of the gradient before it is clipped; missing if nothing computed it."),
            Metric("lr", "", "Learning rate of the step; parts with a rate of their own scale with it."),
            Metric("epoch", "epochs", "Share of the training data seen so far, 1 after the first epoch."),
            Metric("samples", "samples", "Samples of the step over all ranks; classifiers count images."),
            Metric("left_out", "0 to 1", "Share of the run's samples so far that could not be used."),
            Metric("empty_steps", "steps", "Steps of the run so far in which no rank had anything to learn."),
            Metric(
                "peak_bytes", "bytes", "Peak memory of the first rank: since the last step on a GPU, ever on a CPU."
            ),
            Metric("waiting", "0 to 1", "Share of the step's time that ranks waited for data, on average."),
            Metric("seconds", "s", "Time since the run was started or resumed."),
        ],
        "Vision-language and language models": [
            Metric("supervised_tokens", "tokens", "Supervised tokens of the step over all ranks."),
            Metric("padding", "0 to 1", "Share of padding in the rows of student and teacher."),
            Metric("tokens_per_second", "tokens/s", "The student's tokens over all ranks, without padding."),
            Metric("flops", "operations", "Operations of the step over all ranks, recomputation left out."),
            Metric("flops_per_second", "operations/s", "The same for each second of the step."),
            Metric("mfu", "0 to 1", "`flops_per_second` as a share of the GPUs' peak, on a known GPU."),
        ],
        "Classifiers": [
            Metric("images_per_second", "images/s", "Images over all ranks; several views of an image count once."),
        ],
        "Terms of the loss": [
            Metric("TERM/loss", "nats", "Mean of the term over its rows, without its weight."),
            Metric("TERM/t", "0 to 1", "TAID's t: how far its target has moved from the student to the teacher."),
            Metric("TERM/kl", "nats", "Mean KL of the student from its target (TAID) or its teacher (`diagnostics`)."),
            Metric("TERM/cross_entropy", "nats", "TAID's mean cross-entropy of target and student, which moves t."),
            Metric("TERM/slope", "nats", "Derivative of TAID's KL by log t, for the schedule `adaptive`."),
            Metric("TERM/target_entropy", "nats", "Mean entropy of TAID's target, with `target_entropy: true`."),
            Metric(
                "TERM/temperature",
                "",
                "CTKD's mean temperature; with `diagnostics`, that at which the teacher has the student's entropy.",
            ),
            Metric("TERM/coefficient", "", "CTKD's factor on the gradient of its temperature."),
            Metric("TERM/gap", "", "How far apart a skew KL with `adaptive: true` finds both models."),
            Metric("TERM/alpha", "0 to 1", "Mean α of a skew KL with `adaptive: true`."),
            Metric("TERM/compared", "0 to 1", "Share of groups of tokens that `overlap_kl` compared."),
            Metric("TERM/k2", "nats", "Estimate k2 of the reverse KL at own tokens (`policy_gradient`)."),
            Metric("TERM/k3", "nats", "Estimate k3 of it, which is never negative (`policy_gradient`)."),
            Metric("TERM/teacher_entropy", "nats", "Mean entropy of the teacher's distribution (`diagnostics`)."),
            Metric("TERM/student_entropy", "nats", "Mean entropy of the student's distribution (`diagnostics`)."),
            Metric(
                "TERM/head_mass", "0 to 1", "The student's mass on the teacher's ten likeliest tokens (`diagnostics`)."
            ),
            Metric(
                "TERM/tail_mass", "0 to 1", "Its mass on the fifth that the teacher finds least likely (`diagnostics`)."
            ),
            Metric("TERM/agreement", "0 to 1", "How often both models find the same token likeliest (`diagnostics`)."),
        ],
        "Steps on the student's own answers": [
            Metric("on_policy/step", "0 to 1", "1 if the step learns from the student's own answers, else 0."),
            Metric("on_policy/fraction", "0 to 1", "Share of steps that do so, which `adaptive` raises."),
            Metric("on_policy/tokens", "tokens", "Tokens of the step's own answers over all ranks."),
            Metric("on_policy/length", "tokens", "Mean length of the step's own answers."),
            Metric("on_policy/time", "0 to 1", "Share of the step's time that was spent on answering."),
            Metric("on_policy/visual_advantage", "nats", "Mean visual advantage of the answers, with that section."),
            Metric("on_policy/staleness", "steps", "Steps since the server that drew the answers read the weights."),
            Metric("on_policy/importance", "", "Mean importance weight of the answers' tokens, with that section."),
            Metric("on_policy/clipped", "0 to 1", "Share of tokens whose weight was truncated to `clip`."),
            Metric("on_policy/replayed", "0 to 1", "1 if the answers were drawn earlier, else 0, with `replay`."),
        ],
        "Several teachers": [
            Metric("teacher/TEACHER/share", "0 to 1", "Share of the compared positions that it taught, by weight."),
            Metric("teacher/TEACHER/TERM", "nats", "Mean of the term there."),
        ],
    },
    "eval": {
        "Every evaluation": [
            Metric("data", "", "Name of the source or benchmark."),
            Metric("n", "", "Questions, samples or images that were scored."),
            Metric("seconds", "s", "Time since the run was started or resumed."),
        ],
        "Sources of `data.eval`": [
            Metric("exact", "0 to 1", "Share of answers that match exactly; for classifiers, top-1 accuracy."),
            Metric("soft", "0 to 1", "Mean VQA accuracy."),
            Metric("rouge_l", "0 to 1", "Mean ROUGE-L, with that measure."),
            Metric("perplexity", "", "exp of the mean cross-entropy of supervised tokens, with that measure."),
            Metric("kl", "nats", "Mean KL of the student from its teacher, for each token or classified image."),
            Metric("tokens", "tokens", "Supervised tokens behind perplexity and KL."),
            Metric("cut", "answers", "Answers that reached the greatest length without an end."),
            Metric("limited_from", "questions", "Size of the source, if a limit left some out."),
            Metric("answers_per_second", "answers/s", "Speed of answering over all ranks."),
        ],
        "Benchmarks": [
            Metric("score", "", "The benchmark's main score, on the scale of its rules."),
        ],
        "Classifiers": [
            Metric("top5", "0 to 1", "Share of images whose class is among the five likeliest."),
            Metric("nll", "nats", "Mean negative log-likelihood of the right class."),
            Metric("ece", "0 to 1", "Expected calibration error over 15 bins (Guo et al. 2017)."),
            Metric("agreement", "0 to 1", "Share of images for which student and teacher answer the same."),
        ],
    },
}


def describe_metric(kind: str, name: str) -> Metric | None:
    """Return the entry of a metric; ``None`` if the table has none.

    Args:
        kind: of the line: ``train`` or ``eval``.
        name: the key in it.
    """
    for metrics in METRICS[kind].values():
        for metric in metrics:
            pattern = re.sub("TERM|TEACHER", r"[^/]+", re.escape(metric.name))
            if re.fullmatch(pattern, name):
                return metric
    return None
