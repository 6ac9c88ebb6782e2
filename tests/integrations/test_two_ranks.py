"""DistillationTrainer on two processes: the losses of one process with twice the accumulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAIN = """
import json
import sys

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from vlm_distill.integrations.transformers import DistillationTrainer


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


torch.manual_seed(3)
sizes = dict(intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=19)
student = LlamaForCausalLM(LlamaConfig(hidden_size=16, **sizes))
teacher = LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes))
rows = []
for i in range(8):
    ids = torch.arange(i, i + 8)
    rows.append({"input_ids": ids, "labels": torch.where(ids % (2 + i) > 0, ids, -100)})
settings = TrainingArguments(
    "out",
    max_steps=2,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=int(sys.argv[1]),
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    logging_steps=1,
    save_strategy="no",
)
loss = [{"name": "taid", "schedule": "adaptive"}, {"name": "ctkd", "grl_coefficient": -1.0}]
trainer = InOrder(student, settings, teacher=teacher, loss=loss, train_dataset=rows)
trainer.train()
if settings.process_index == 0:
    names = ("taid/loss", "taid/t", "ctkd/loss", "ctkd/temperature", "grad_norm")
    print(json.dumps([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]))
"""


def losses(folder, ranks, accumulation):
    (folder / "train.py").write_text(TRAIN)
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, "train.py", str(accumulation)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path):
    one, two = losses(tmp_path, 1, 4), losses(tmp_path, 2, 2)
    assert len(one) == 2
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)
