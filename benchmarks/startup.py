"""What starting costs, for docs/training.md: whole processes, from their start to what a person waits for.

    python benchmarks/startup.py [--rounds 5] [--folder /tmp/startup]

Each command runs once a round, in turn, on one thread: light commands to their end, a run with a misspelt loss to its
message, and a run of tiny models to the line of its first step in metrics.jsonl, started by `vlm-distill` (which starts
the ranks itself) and as the ranks' own module. "Transformers alone" is a script that builds a language model: what a
command with a model takes at least. While `vlm-distill train` waits for its rank, its private memory is read from /proc
(Linux). Prints medians and writes them to benchmarks/results/startup_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup_cpu.csv"
#: As the console script does.
LAUNCHER = ("-c", "from vlm_distill.cli import main; main()")
#: A student of some 15,000 parameters that learns from the data alone.
TINY = (
    "student.projector.type=linear",
    "student.decoder.config.hidden_size=16",
    "student.decoder.config.intermediate_size=16",
    "student.vision_encoder.config.channels=[8,8,8,8]",
    "training.steps=1",
    "training.batch_size=4",
    "training.device=cpu",
    "data.workers=0",
    "evaluation.every=null",
    "evaluation.limit=4",
)
#: A run by the command, and by the module that it starts; what looks at a run, and the run itself.
COMPARED = {
    "vlm-distill train": "python -m vlm_distill.train",
    "vlm-distill classify": "python -m vision.train",
    "inspect": "python -m vlm_distill.train",
    "plan": "python -m vlm_distill.train",
    "Transformers alone": "python -m vlm_distill.train",
}
ALONE = """
from transformers import AutoConfig, AutoModelForCausalLM
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=99, **sizes))
"""
TINY_CLASSIFIER = ("training.epochs=1", "training.batch_size=16", "training.device=cpu", "data.workers=0")


class Commands:
    """The commands that are timed, and the data that they read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = folder / "data"
        if not data.is_dir():
            subprocess.run([sys.executable, "-m", "vlm_distill.demo", str(data)], check=True)
        digits = folder / "digits"
        if not digits.is_dir():
            _write_images(digits)
        self.run = ["configs/demo/teacher.yaml", *TINY, f"student.tokenizer={data / 'tokenizer'}"]
        self.run += [f"data.train.0.path={data / 'train.jsonl'}", f"data.eval.0.path={data / 'test.jsonl'}"]
        self.classify = ["configs/cifar100/resnet56_resnet20/kd.yaml", *TINY_CLASSIFIER, "teacher=null"]
        self.classify += ["student.name=cifar_resnet8", "loss=[{name: cross_entropy}]", "evaluation.every_epochs=null"]
        self.classify += [f"data.train=[{{path: {digits}}}]", "data.eval=[]", "evaluation.best=null"]

    def light(self) -> dict[str, list[str]]:
        """Return the commands that run to their end."""
        misspelt = [*self.run, "loss.0.name=cros_entropy", f"output={self.folder / 'none'}"]
        return {
            "vlm-distill --help": [*LAUNCHER, "--help"],
            "vlm-distill losses": [*LAUNCHER, "losses"],
            "train, misspelt loss": [*LAUNCHER, "train", *misspelt],
            "inspect": [*LAUNCHER, "inspect", *self.run],
            "plan": [*LAUNCHER, "plan", *self.run, "--device", "cpu", "--memory", "8"],
            "Transformers alone": ["-c", ALONE],
        }

    def runs(self) -> dict[str, list[str]]:
        """Return the commands that train; ``output`` is added to each."""
        return {
            "vlm-distill train": [*LAUNCHER, "train", *self.run],
            "python -m vlm_distill.train": ["-m", "vlm_distill.train", *self.run],
            "vlm-distill classify": [*LAUNCHER, "classify", *self.classify],
            "python -m vision.train": ["-m", "vision.train", *self.classify],
        }


def _write_images(folder: Path) -> None:
    from PIL import Image

    for number in range(32):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)


def to_the_end(words: Sequence[str]) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    process = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    mistaken = "loss.0.name=cros_entropy" in words
    if (process.returncode != 0) != mistaken:
        raise SystemExit(f"{' '.join(words)}: ended with {process.returncode}: {process.stderr[-300:]}")
    return seconds


def to_the_first_step(words: Sequence[str], output: Path) -> tuple[float, float]:
    """Return the seconds until a run logs a step, and the private MB of the process that was started by then."""
    shutil.rmtree(output, ignore_errors=True)
    metrics = output / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words, f"output={output}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (metrics.is_file() and '"train"' in metrics.read_text()):
        if process.poll() is not None and not metrics.is_file():
            raise SystemExit(f"{' '.join(words)}: ended with {process.returncode} before its first step")
        time.sleep(0.02)
    seconds, memory = time.perf_counter() - began, private_megabytes(process.pid)
    process.kill()  # ranks end with the process that started them
    process.wait()
    return seconds, memory


def private_megabytes(process: int) -> float:
    """Return the memory that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/startup"))
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    commands = Commands(options.folder)
    seconds, memory = defaultdict(list), defaultdict(list)
    for number in range(options.rounds):
        for name, words in commands.light().items():
            seconds[name].append(to_the_end(words))
        runs = list(commands.runs().items())
        for name, words in runs[:: 1 if number % 2 else -1]:
            taken, private = to_the_first_step(words, options.folder / "run")
            seconds[name].append(taken)
            memory[name].append(private)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)

    rows = []
    for name, values in seconds.items():
        private = f"{statistics.median(memory[name]):.0f}" if name in memory else ""
        rows.append({"command": name, "seconds": f"{statistics.median(values):.2f}", "private_mb": private})
        print(f"{name:30} {rows[-1]['seconds']:>6} s {private:>5}")
    for launched, alone in COMPARED.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[launched], seconds[alone], strict=True))
        print(f"{launched} / {alone}: {ratio:.2f}")
        rows.append({"command": f"{launched} / {alone}", "seconds": f"{ratio:.2f}", "private_mb": ""})
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
