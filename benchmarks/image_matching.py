"""Reverse KL at image tokens with and without matching: peak memory and time.

    python benchmarks/image_matching.py [--tokens 4096] [--vocabulary 32768] [--match none hungarian] [--device cpu]

A CPU takes about a nanosecond for each pair of tokens and token of the vocabulary: nine minutes at the largest size.

Both models' hidden states at one image of that many tokens each (the student 256 wide, the teacher 512); forward and
backward. Peak memory is what torch's allocator held above the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
from losses import Case, Head, Shape, peak_bytes

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, fused_linear
from vlm_distill.training.image_matching import ImageMatching


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--match", nargs="+", default=["none", "hungarian"], choices=["none", "hungarian"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = Case(Shape(options.tokens, options.vocabulary, 256, 512), options.device)
    blocks = SimpleNamespace(image_blocks=torch.tensor([options.tokens]))
    batch = SimpleNamespace(student=blocks, teacher=blocks)
    teacher = HiddenTargets(case.teacher_hidden, Head(case.teacher_weight))

    def run(match: str) -> object:
        matching = ImageMatching(batch, case.hidden, Head(case.weight), teacher)
        hidden, targets = matching.hidden_states(match)
        sums = fused_linear(losses.build("reverse_kl"), hidden, Head(case.weight), targets)
        return torch.autograd.grad(sums.loss, (case.hidden, case.weight))

    print(f"{options.tokens:,} x {options.vocabulary:,}, {options.device}, {options.threads} thread(s)")
    for match in options.match:
        start = time.perf_counter()
        peak = peak_bytes(lambda match=match: run(match), options.device)
        taken = time.perf_counter() - start
        print(f"match {match:10} {peak / 2**20:8.0f} MiB {taken:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
