"""Two models with different vocabularies and rows, and groups of their tokens, for tests of losses on groups."""

import torch
from torch import nn

from vlm_distill.losses import HiddenTargets, TokenGroups, fused_linear
from vlm_distill.models.lm_head import LMHead

# Lengths of groups on both sides, and the number of the student's rows before each that are in no group.
SIZES = [(1, 1, 0), (2, 1, 1), (1, 3, 0), (4, 2, 0), (3, 4, 2), (1, 1, 0), (2, 2, 0)]
ROWS, TEACHER_ROWS = sum(a + hole for a, _, hole in SIZES) + 1, sum(b for _, b, _ in SIZES)


def make_groups(sizes, teacher_targets):
    ours, theirs, row, other = [], [], 0, 0
    for a, b, hole in sizes:
        row += hole
        ours.append((row, row + a))
        theirs.append((other, other + b))
        row, other = row + a, other + b
    return TokenGroups(torch.tensor(ours), torch.tensor(theirs), teacher_targets)


class GroupedModels:
    """Student and teacher of other widths, vocabularies and numbers of rows."""

    def __init__(self, sizes=SIZES, v=23, v_teacher=31, *, dtype=torch.float64, bias=False, seed=0, **head):
        generator = torch.Generator().manual_seed(seed)
        n, m = sum(a + hole for a, _, hole in sizes) + 1, sum(b for _, b, _ in sizes)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.linear, teacher = nn.Linear(8, v, bias=bias, dtype=dtype), nn.Linear(11, v_teacher, dtype=dtype)
        with torch.no_grad():
            for parameter in (*self.linear.parameters(), *teacher.parameters()):
                parameter.copy_(random(*parameter.shape))
        self.hidden = random(n, 8).requires_grad_()
        self.head = LMHead(self.linear, **head)
        self.teacher = HiddenTargets(random(m, 11), LMHead(teacher))
        self.targets = torch.randint(v, (n,), generator=generator)
        self.groups = make_groups(sizes, torch.randint(v_teacher, (m,), generator=generator))

    def inputs(self):
        return [self.hidden, *self.linear.parameters()]

    def fused(self, terms, **options):
        return fused_linear(terms, self.hidden, self.head, self.teacher, self.targets, distilled=self.groups, **options)

    def logits(self):
        student = self.linear(self.hidden) * self.head.scale
        if self.head.softcap:
            student = self.head.softcap * (student / self.head.softcap).tanh()
        return student, self.teacher.head._linear(self.teacher.hidden).detach()


def only_groups(setting):
    """Return whole logits of the rows in groups, with the groups within them, as ``grouped_loss_and_grad`` wants."""
    student, teacher = setting.logits()
    rows = torch.cat([torch.arange(a, b) for a, b in setting.groups.student.tolist()])
    closed = make_groups([(a, b, 0) for a, b, _ in SIZES], setting.groups.teacher_targets)
    return student[rows].detach(), teacher, setting.targets[rows], closed
