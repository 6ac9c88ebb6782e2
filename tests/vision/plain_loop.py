"""Five steps of our training of a CIFAR network, and the same five written down in plain PyTorch.

python tests/vision/plain_loop.py FOLDER '[{"name": "kd", …}]'
"""

import json
import sys
from functools import partial
from pathlib import Path

import pictures
import torch
from torch.nn import functional as F

from vision import build
from vision import trainer as trainer_module
from vision.classifier import load_classifier, load_section
from vision.config import ClassifierConfig
from vision.device_views import DeviceViews
from vision.trainer import Trainer
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes

STEPS, LR, DECAY = 5, 0.05, 5e-4


def in_float64(section):
    return load_section(section).double()


# In float32 a rounding is enough for a ReLU to change sides, and for a gradient by two per cent.
build.load_section = in_float64
trainer_module.DeviceViews = partial(DeviceViews, dtype=torch.float64)


def main(folder: Path, terms: list) -> None:
    pictures.make_images(folder / "images", per_class=8)
    torch.manual_seed(3)
    names = [f"class{i}" for i in range(pictures.CLASSES)]
    teacher = load_classifier("cifar_resnet32", num_classes=10, classes=names)
    with torch.no_grad():
        for _ in range(50):  # batch norm's statistics: without them its logits would be in the hundreds
            teacher(torch.randn(16, 3, 32, 32))
    teacher.save_pretrained(folder / "teacher")
    plain = pictures.config(
        folder / "run",
        folder / "images",
        folder / "teacher",
        student={"name": "cifar_resnet20"},
        loss=terms,
        data__views=[{"crop": "pad", "color_jitter": 0}],
        optimizer={
            **{"name": "momentum", "lr": LR, "weight_decay": DECAY, "decay": "all"},
            **{"schedule": "multistep", "milestones": [0.6], "decay_rate": 0.1},
        },
        training__steps=STEPS,
        training__micro_batch_size=16,
    )
    trainer = Trainer(ClassifierConfig.model_validate(plain), Processes("cpu"))
    theirs = load_classifier(str(folder / "teacher")).double().eval()
    mine = load_classifier("cifar_resnet20", num_classes=10).double()
    mine.load_state_dict(trainer.student.state_dict())
    before = mine.model.conv1.weight.detach().clone()
    batches = [trainer.dataset[step].batches[0] for step in range(STEPS)]
    trainer.run()
    views = [trainer.on_device(batch, seed=0, step=step).student for step, batch in enumerate(batches)]
    by_hand(mine.train(), theirs, batches, views, terms)
    for (name, a), b in zip(trainer.student.state_dict().items(), mine.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), (name, (a - b).abs().max())
    moved = (mine.model.conv1.weight - before).abs().max()
    assert moved > 2e-3, moved


def by_hand(student, teacher, batches, views, terms):
    optimizer = torch.optim.SGD(student.parameters(), LR, momentum=0.9, weight_decay=DECAY)
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (student.inputs.mean, student.inputs.std))
    for step, batch in enumerate(batches):
        assert torch.allclose(views[step], ((batch.images / 255 - mean) / std).double(), atol=1e-5)
        # Five steps an epoch, the learning rate falls after 0.6 of it.
        optimizer.param_groups[0]["lr"] = LR if step < 3 else 0.1 * LR
        images, labels = views[step], batches[step].labels
        with torch.no_grad():
            other = teacher(images).logits
        logits = student(images).logits
        loss = terms[1]["weight"] * F.cross_entropy(logits, labels)
        if terms[0]["name"] == "kd":
            loss = loss + terms[0]["weight"] * kd(logits, other, terms[0]["temperature"])
        else:
            loss = loss + dkd(logits, other, labels, beta=terms[0]["beta"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def kd(logits, other, temperature):
    log_q, p = (logits / temperature).log_softmax(1), (other / temperature).softmax(1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def dkd(logits, other, labels, *, alpha=1.0, beta=1.0, temperature=4.0):
    """Zhao et al. 2022, equation 7: target against the rest, and the rest among themselves."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    q, p = (logits / temperature).softmax(1), (other / temperature).softmax(1)
    pairs = [torch.stack([x[right], 1 - x[right]], 1) for x in (p, q)]
    target = (pairs[0] * (pairs[0] / pairs[1]).log()).sum(1).mean()
    rest = [x[~right].view(len(x), -1) / (1 - x[right]).unsqueeze(1) for x in (p, q)]
    others = (rest[0] * (rest[0] / rest[1]).log()).sum(1).mean()
    return temperature**2 * (alpha * target + beta * others)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
