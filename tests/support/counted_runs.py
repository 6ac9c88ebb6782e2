"""A run in this process, with how often each model's vision encoder ran in training."""

import json
from types import SimpleNamespace

from vlm_distill.models.pretrained import PretrainedVLM
from vlm_distill.trainer import Trainer


def trained(config, processes):
    """Trains; gives ``losses`` by step, ``weights``, ``flops``, ``calls`` of both encoders, and the ``trainer``."""
    trainer, calls = Trainer(config, processes), {"student": 0, "teacher": 0}

    def count(who):
        def note(*_):
            calls[who] += 1

        return note

    hooks = [
        _encoder(model).register_forward_hook(count(who))
        for who, model in (("student", trainer.student), ("teacher", trainer.loss_teacher.model))
    ]
    # Training alone is counted.
    trainer.introduce = lambda *_: None
    trainer.evaluate = lambda *_, **__: (None, [])
    lines = [json.loads(line) for line in (trainer.run() / "metrics.jsonl").read_text().splitlines()]
    learned = [line for line in lines if line["kind"] == "train"]
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(
        losses=[line["loss"] for line in learned],
        weights={name: p.detach().clone() for name, p in trainer.student.named_parameters()},
        flops=sum(line["flops"] for line in learned),
        calls=calls,
        trainer=trainer,
    )


def _encoder(model):
    return model.model.get_encoder(modality="image") if isinstance(model, PretrainedVLM) else model.vision_encoder
