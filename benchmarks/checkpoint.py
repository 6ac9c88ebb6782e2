"""What a checkpoint's checksums cost, for docs/training.md.

    python benchmarks/checkpoint.py [--megabytes 400] [--rounds 9] [--folder /tmp]

Writes the same state of one rank in turn: as torch.save does by itself, with a CRC-32 of each tensor; as a run does,
with one checksum of the file and a manifest; and with no checksum at all. Each is flushed to the disk. Then all that a
resumed run looks at is read. Prints medians and writes them to benchmarks/results/checkpoint_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm_distill.runtime import manifest
from vlm_distill.runtime.output import flush_all
from vlm_distill.training import checkpoint
from vlm_distill.training.engine import _Files, _without_crc32

RESULTS = Path(__file__).parent / "results" / "checkpoint_cpu.csv"
#: Float32 numbers of a tensor: a layer's matrix of 2048 × 2048.
TENSOR = 2**22


def save_plainly(folder: Path, state: dict[str, Any]) -> None:
    with (folder / "state.pt").open("wb") as file:
        torch.save(state, file)
    flush_all(folder)


def save_unchecked(folder: Path, state: dict[str, Any]) -> None:
    with _without_crc32():
        save_plainly(folder, state)


def save_as_a_run(folder: Path, state: dict[str, Any]) -> None:
    files = _Files(folder)
    files.save(state, str(folder / "state.pt"))
    flush_all(folder)
    manifest.write(folder, files.entries)


def look_through(folder: Path) -> None:
    assert checkpoint.find(folder) is not None


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = {str(i): torch.randn(TENSOR) for i in range(max(1, options.megabytes * 10**6 // (4 * TENSOR)))}
    ways = {"torch.save": save_plainly, "run": save_as_a_run, "no checksum": save_unchecked}
    found: dict[str, list[float]] = {name: [] for name in (*ways, "look through")}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for _ in range(options.rounds):
            for name, save in ways.items():
                folder = Path(scratch) / name / "step_1"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "state.pt").unlink(missing_ok=True)
                found[name].append(seconds(lambda save=save, folder=folder: save(folder, state)))
            found["look through"].append(seconds(lambda: look_through(Path(scratch) / "run")))
        size = sum(path.stat().st_size for path in (Path(scratch) / "run").rglob("*") if path.is_file())
    rows = []
    for name, times in found.items():
        middle = statistics.median(times)
        ratio = middle / statistics.median(found["torch.save"])
        rows.append({"what": name, "megabytes": size // 10**6, "seconds": round(middle, 3), "ratio": round(ratio, 3)})
        print(f"{name:>12}: {middle:.3f} s, {size / middle / 1e9:.2f} GB/s, {ratio:.2f} of torch.save's time")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
