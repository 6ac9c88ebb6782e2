"""What a teacher on vLLM costs in bytes and time, and how fast vLLM draws answers, on this machine's CPU.

    bash tests/vllm/environment.sh .venv-vllm
    PYTHONPATH=.:tests/vllm:tests/support:.venv-vllm/smollm2 python benchmarks/served.py [--batches 6] [--output FILE]

The model is SmolLM2-135M-Instruct in float32; vLLM computes with one thread, and so does this process.

- Teachers: micro-batches of 8 rows, each a question and a paragraph of this project's documentation as its answer. For
  each form, bytes of requests and replies and seconds a supervised token, from sending a micro-batch's requests to the
  teacher's targets. The median over micro-batches; the local teacher and each server take turns.
- Answers: greedy, 64 tokens, to 1, 8 and 64 questions at once; tokens a second of ``generate`` here and of vLLM.

Forms with likeliest tokens and with hidden states need two servers, which run one after the other.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import real_server
import tiny
import torch

from data.opening import open_source
from vlm_distill import endpoint
from vlm_distill.config.sections import RunConfig
from vlm_distill.endpoint import Endpoint
from vlm_distill.models import load_vlm
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.served import ServedModel
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

sys.path.append(str(Path(__file__).parent))
from losses import processor  # benchmarks/losses.py
from smollm2_study import write_teacher  # benchmarks/smollm2_study.py

NAME = "teacher-1"
ROWS = 8  # of a micro-batch
NEW_TOKENS = 64
AT_ONCE = (1, 8, 64)
GENERATING = ("--max-logprobs", "64")
#: What a teacher on each kind of server is asked for.
FORMS: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {
    GENERATING: {
        "top-20": {"form": "topk", "top_logprobs": 20},
        "top-64": {"form": "topk", "top_logprobs": 64},
    },
    real_server.POOLING: {
        "hidden fp32": {"form": "hidden", "embed_dtype": "fp32"},
        "hidden bf16": {"form": "hidden", "embed_dtype": "bf16"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6, help="micro-batches of each form")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_teacher(folder / "teacher")
        write_paragraphs(folder / "data.jsonl", ROWS * options.batches)
        processes = Processes("cpu")
        for flags, forms in FORMS.items():
            with real_server.serving(folder / "teacher", NAME, *flags) as server:
                rows += teacher_rows(folder, processes, server.url, forms)
                if flags is GENERATING:
                    rows += answer_rows(folder, server.url)
        processes.close()
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["what", "side", "at_once", "bytes_a_token", "ms_a_token", "tokens_per_second", "device"]
            )
            writer.writeheader()
            writer.writerows(row | {"device": f"{processor()}, 1 thread(s)"} for row in rows)


def write_paragraphs(path: Path, count: int) -> None:
    """Write conversations: the first words of a paragraph of the documentation, and the paragraph."""
    lines: list[dict[str, Any]] = []
    for page in sorted(Path("docs").glob("*.md")):
        for paragraph in page.read_text().split("\n\n"):
            words = paragraph.split()
            if paragraph[0].isalpha() and 40 <= len(words) <= 80 and len(lines) < count:
                question = {"from": "human", "value": f"Go on: {' '.join(words[:10])}"}
                lines.append({"conversations": [question, {"from": "gpt", "value": " ".join(words)}]})
    assert len(lines) == count, f"the documentation has only {len(lines)} paragraphs of this length"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def teacher_rows(
    folder: Path, processes: Processes, url: str, forms: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Measure the local teacher, and forms of one on a server, in turn."""
    trainers = {"local": trainer(folder, processes, None)}
    for name, keys in forms.items():
        trainers[name] = trainer(folder, processes, {"url": url, "model": NAME, "workers": ROWS, **keys})
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    bytes_sent: dict[str, list[float]] = {name: [] for name in trainers}
    local = trainers["local"]
    batches = [local.dataset[step].batches[0] for step in range(local.steps)]
    for number, batch in enumerate(batches):
        tokens = len(batch.targets)
        for name, there in trainers.items():
            with counted() as counts:
                start = time.perf_counter()
                there.loss_teacher.outputs(batch)
                spent = time.perf_counter() - start
            if number:  # the first warms up
                seconds[name].append(1000 * spent / tokens)
                bytes_sent[name].append(sum(counts) / tokens)
    for name in trainers:
        row = {
            "what": "teacher",
            "side": name,
            "at_once": ROWS,
            "bytes_a_token": round(statistics.median(bytes_sent[name])),
            "ms_a_token": round(statistics.median(seconds[name]), 2),
        }
        print(row, flush=True)
        yield row


def trainer(folder: Path, processes: Processes, server: dict[str, Any] | None) -> Trainer:
    """Return a run of a small student that reads all rows once, a micro-batch a step."""
    changes = {"loss": [{"name": "forward_kl"}], "evaluation__teacher": False, "data__max_length": 512}
    name = "local" if server is None else f"{server['form']}_{len(list(folder.glob('run_*')))}"
    plain = tiny.config(folder / f"run_{name}", folder / "data.jsonl", folder / "teacher", **changes)
    plain["student"] = {"decoder": tiny.settings(width=32)["decoder"], "tokenizer": "teacher"}
    rows = len(open_source(folder / "data.jsonl"))
    plain["training"] |= {"steps": rows // ROWS, "batch_size": ROWS, "micro_batch_size": ROWS}
    if server is not None:
        plain["teacher"]["server"] = server
    return Trainer(RunConfig.model_validate(plain), processes)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes of requests' and replies' bodies."""
    counts: list[int] = []
    exchange = endpoint._exchange

    def counting(request: Any, *rest: Any) -> Any:
        reply = exchange(request, *rest)
        counts.extend((len(request.data or b""), len(reply.body)))
        return reply

    endpoint._exchange = counting
    try:
        yield counts
    finally:
        endpoint._exchange = exchange


def answer_rows(folder: Path, url: str) -> Iterator[dict[str, Any]]:
    """Measure answers drawn by vLLM and here, in turn."""
    model = load_vlm(folder / "teacher", dtype="float32").eval()
    served = ServedModel(model.processor, Endpoint("teacher.server", url, "OPENAI_API_KEY"), NAME)
    source = open_source(folder / "data.jsonl")
    sides: dict[str, Callable[[int], int]] = {
        "generate": lambda count: draw_here(model, source, count),
        "vLLM": lambda count: draw_there(served, source, count),
    }
    for count in AT_ONCE:
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(4 if count < 64 else 2):
            for name, draw in sides.items():
                start = time.perf_counter()
                tokens = draw(count)
                if repeat:
                    speeds[name].append(tokens / (time.perf_counter() - start))
        for name, values in speeds.items():
            speed = round(statistics.median(values), 1)
            row = {"what": "answers", "side": name, "at_once": count, "tokens_per_second": speed}
            print(row, flush=True)
            yield row


def draw_here(model: VisionLanguageModel, source: Any, count: int) -> int:
    """Answer questions with the suite's own loop; return how many tokens were drawn."""
    prompts = [(source[number % len(source)].before_last_answer(), []) for number in range(count)]
    answers = model.generate(prompts, max_new_tokens=NEW_TOKENS)
    return sum(len(answer.token_ids) for answer in answers)


def draw_there(served: ServedModel, source: Any, count: int) -> int:
    """Answer the same questions on the server, all at once; return how many tokens were drawn."""

    def ask(number: int) -> int:
        prompt = source[number % len(source)].before_last_answer().prompt()
        ids = served.processor.encode(prompt, [], generation=True).input_ids.tolist()
        ends = sorted(served.end_tokens)
        path, body = served.text(ids, max_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=ends)
        return served.endpoint.ask(path, body, lambda reply: int(reply["usage"]["completion_tokens"]))

    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(ask, range(count)))


if __name__ == "__main__":
    main()
