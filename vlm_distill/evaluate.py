"""One rank of an evaluation: ``python -m vlm_distill.evaluate --model M --data test.jsonl --out DIR``.

The launchers start it on several processes as they start training; each answers its share of the questions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.batch import Problem
from data.errors import UserError
from vlm_distill.launch import guarded, leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers and scores; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="vlm_distill.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name of a model")
    parser.add_argument("--data", action="append", required=True, help="questions; may be repeated")
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to")
    parser.add_argument("--root", type=Path, action="append", default=[], help="read no image outside; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions and scores")
    parser.add_argument("--limit", type=int, help="ask this many questions, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: as saved; fp32 on a CPU")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(given)
    return guarded(lambda: evaluate_files(options))


def evaluate_files(options: argparse.Namespace) -> None:
    """Every data file of the options, answered, scored, written and shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rich.console import Console
    from rich.table import Table

    from data.images import load_image
    from data.sources import open_source
    from vlm_distill.evaluation.runner import evaluate, in_words, summarise
    from vlm_distill.models import load_vlm
    from vlm_distill.training.engine import Processes

    sources = [open_source(path, images=options.images) for path in options.data]
    if len({source.name for source in sources}) < len(sources):
        raise UserError("--data: two files have one name, so that their scores would overwrite each other; rename one")
    processes = Processes()
    try:
        # A CPU gains nothing from 16 bits, and some of its layers refuse them.
        dtype = options.dtype or ("fp32" if processes.device.type == "cpu" else None)
        model = load_vlm(options.model, dtype=dtype)
        model = model.to(processes.device).eval()
        empty = []
        for source in sources:
            skipped: list[Problem] = []
            predictions = evaluate(
                model,
                source,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                limit=options.limit,
                rank=processes.rank,
                world=processes.world,
                all_gather=processes.gather,
                out=options.out / source.name,
                resume=_identity(options.model),
                load=partial(load_image, roots=options.root),
                skipped=skipped,
            )
            if not predictions:
                empty.append(source.name)
            if not processes.first:
                continue
            scores = summarise(predictions)
            print(f"{source.name}: {in_words(scores)}")
            if scores["by_type"]:
                table = Table("questions", "n", "exact match", "VQA accuracy")
                for name, row in scores["by_type"].items():
                    table.add_row(name, str(row["n"]), f"{row['exact']:.2%}", f"{row['soft']:.2%}")
                Console().print(table)
            if skipped:
                one = skipped[0]
                print(f"{len(skipped)} left out, the first: {one.source}, line {one.line}: {one.reason}")
            print(options.out / source.name)
        if empty:
            raise UserError(f"{', '.join(empty)}: no question could be read")
    finally:
        processes.close()


def _identity(model: str) -> str:
    """A name or a folder, with what tells one state of its weights from another."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return " ".join([model, *(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)])


if __name__ == "__main__":
    leave(main())
