"""Modules and packages of a user's own, from which plug-ins come."""

import textwrap

LOSSES = '''
    import torch
    from vlm_distill.losses import BatchLoss, DistillationLoss, Divergence, FeatureLoss
    from vlm_distill.losses.kernels import Kind
    from vlm_distill.losses.softmax import relative_entropy_

    class Reverse(Divergence):
        """Reverse KL, as the suite computes it."""
        scratch = 2
        def value(self, log_p, log_q):
            return (log_q.exp() * (log_q - log_p)).sum(-1)
        def value_and_grad(self, p, q, *, grad):
            loss, summands = relative_entropy_(q, p)
            return loss, summands.addcmul_(q.probs, loss.unsqueeze(-1), value=-1.0) if grad else None

    class Defined(Divergence):
        def value(self, log_p, log_q):
            return (log_q.exp() * (log_q - log_p)).sum(-1)

    class Scaled(Defined):
        def __init__(self, scale, **others):
            super().__init__(**others)
            self.scale = scale
        def value(self, log_p, log_q):
            return self.scale * super().value(log_p, log_q)

    class Counting(DistillationLoss):
        needs = frozenset({"targets"})
        def __init__(self):
            super().__init__()
            self.updates = 0
        def forward(self, student, teacher, targets=None):
            return torch.nn.functional.cross_entropy(student, targets, reduction="none")
        def update(self, signals, progress):
            self.updates += 1
        def metrics(self):
            return {"updates": self.updates}
        def get_extra_state(self):
            return self.updates
        def set_extra_state(self, state):
            self.updates = state

    class Mean(DistillationLoss):
        def forward(self, student, teacher, targets=None):
            return (student - teacher).square().mean()

    class Batch(BatchLoss):
        def forward(self, student, teacher, targets=None):
            return (student - teacher).square().mean()

    class Labels(DistillationLoss):
        needs = frozenset({"labels"})

    class Images(FeatureLoss):
        unit = "image"
        matches = True

    class NotALoss:
        pass

    def function():
        pass
'''


def module(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def install(folder, monkeypatch, package, **groups):
    """Install a package: its folder is on the path, with metadata that name its entry points."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[vlm_distill.{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
