"""DistillationTrainer inside another project, which has packages called ``data`` and ``vision`` of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRAIN = """
import sys

import data
import torch
import vision
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from vlm_distill.integrations.transformers import DistillationTrainer

sizes = dict(intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=19)
student = LlamaForCausalLM(LlamaConfig(hidden_size=16, **sizes))
teacher = LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes))
rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(8)]
settings = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1)
trainer = DistillationTrainer(student, settings, teacher=teacher, loss="taid", train_dataset=rows)
trainer.train()
print([entry["taid/loss"] > 0 for entry in trainer.state.log_history if "loss" in entry])
ours = [name for name in sys.modules if name.split(".")[0] in ("data", "vision", "vlm_distill")]
print(sorted({".".join(name.split(".")[:2]) for name in ours}))
"""


def test_it_needs_the_losses_alone(tmp_path):
    for name in ("data", "vision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "use.py").write_text(TRAIN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, losses, modules = done.stdout.splitlines()
    assert losses == "[True, True]"
    assert modules == str(
        ["data", "vision", "vlm_distill", "vlm_distill.integrations", "vlm_distill.losses", "vlm_distill.version"]
    )
