"""A frozen classifier that teaches, and the cache of its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlm_distill.caching.class_logits import LogitCache
from vlm_distill.caching.store import fingerprint

from .classifier import Classifier, Outputs
from .config import ClassifierConfig
from .loader import ImageBatch


class Teacher:
    """A frozen classifier with its classes in the student's order, and optionally a cache of its logits.

    Args:
        classifier: on its device.
        order: int64 ``[C]``, the teacher's output for each of the student's; ``None`` where they are the same.
        features: names of the features that losses read.
        dtype: autocast's dtype; ``None`` computes in float32.
        cache: its logits of fixed views.
    """

    def __init__(
        self,
        classifier: Classifier,
        order: Tensor | None,
        features: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        cache: LogitCache | None = None,
    ) -> None:
        self.classifier = classifier.requires_grad_(False).eval()
        self.order, self.features, self.dtype, self.cache = order, features, dtype, cache

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Outputs:
        """Compute the outputs for normalised images ``[n, 3, H, W]`` of the teacher's own size."""
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            logits, features, _ = self.classifier(images, self.features)
        return Outputs(logits if self.order is None else logits[:, self.order], features, None)

    def remembered(self, batch: ImageBatch, images: Tensor, first: int) -> Outputs:
        """Return the outputs from the cache, computing missing ones; ``first`` is the batch's first view."""
        assert self.cache is not None
        count = len(batch.images) // batch.samples
        checks = batch.checks.chunk(count)
        found = [self.cache.read(batch.rows, first + view, checks[view]) for view in range(count)]
        kept = [logits for logits in found if logits is not None]
        if len(kept) == count:
            return Outputs(torch.cat(kept).to(images.device, non_blocking=True), {}, None)
        outputs = self.outputs(images)
        for view, logits in enumerate(outputs.logits.chunk(count)):
            self.cache.write(batch.rows, first + view, checks[view], logits)
        return outputs


def open_cache(
    config: ClassifierConfig,
    sources: Mapping[str, int],
    student: Classifier,
    teacher: Classifier,
    order: Tensor | None,
) -> LogitCache:
    """Open the cache of a run's teacher, or create it.

    Args:
        config: the run, which names the folder.
        sources: the data's sources and their numbers of images.
        student: its classes and input size determine the logits.
        teacher: the classifier whose logits are cached.
        order: the teacher's output for each of the student's; ``None`` where they are the same.

    Raises:
        UserError: the folder's logits are of another teacher, of other data or of other views.
    """
    section, data = config.teacher, config.data
    assert section is not None
    assert section.cache is not None
    identity = {
        "teacher's weights": fingerprint(teacher.state_dict()),
        "teacher's input": str(teacher.inputs),
        "student's input": str(student.inputs),
        "classes": "as the student's" if order is None else fingerprint({"order": order}),
        "data.views": str([view.model_dump() for view in data.views]),
        "training.seed": str(config.training.seed),
        "training.dtype": config.training.dtype,
    }
    views = data.fixed_views * len(data.views)
    return LogitCache(Path(section.cache), sources, views, student.num_classes, identity)
