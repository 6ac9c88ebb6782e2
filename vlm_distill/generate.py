"""One rank of writing a model's answers as data: ``python -m vlm_distill.generate CONFIG [key=value …] --out FILE``.

Training on such a file by cross-entropy is distillation on the sequence level (Kim & Rush 2016, arXiv 1606.07947).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.batch import Problem
from data.conversation import Conversation, ImageSource
from data.errors import UserError
from data.json_files import read_object
from data.loader import ProblemLog
from data.sources import Source
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.answering import Answerer, Asking, Feedback, evaluate
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.evaluation.model_identity import identity
from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.evaluation.rank_share import RankShare
from vlm_distill.models.chat import whole_thought
from vlm_distill.runtime.launch import guarded, leave

if TYPE_CHECKING:
    from vlm_distill.models.answers import Answer
    from vlm_distill.models.interface import VisionLanguageModel
    from vlm_distill.models.processor import Processor, Prompt
    from vlm_distill.runtime.processes import Processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="vlm_distill.generate", description=__doc__)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--model", help="folder or name of a model, instead of the run's teacher")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longer answers are left out")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens")
    parser.add_argument("--samples", type=int, default=1, help="answers drawn to each question")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_intermixed_args(given)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Answers to all training questions, in the data's order, each sample of a question after the other."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = load_config(options.config, options.overrides)
    if config.training.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    from vlm_distill.runtime.output import claim
    from vlm_distill.runtime.processes import Processes
    from vlm_distill.training.open_data import image_loader, open_sources

    _check(config, options)
    sources: list[Any] = open_sources(config.data.train, config.data.max_length)
    processes = Processes(config.training.device)
    lock = None
    try:
        about, asks = _asks(config, options, processes)
        writer = _Writer(options, sources, f"{about} {config.data.train} {config.training.seed}")
        lock = claim(writer.folder) if processes.first else None
        for number, source in enumerate(sources):
            for sample in range(options.samples):
                part = writer.part(number, sample)
                if any(processes.gather(part.is_file())):
                    continue
                show = _teller(f"{source.name}, sample {sample + 1}") if processes.first else None
                model, sizes = asks(sample)
                evaluate(
                    model,
                    source,
                    Asking(
                        **sizes,
                        max_new_tokens=options.max_new_tokens,
                        references=False,
                        load=image_loader(config.data),
                    ),
                    ranks=RankShare(processes.rank, processes.world, processes.gather),
                    folder=AnswerFolder(writer.folder, identity={"part": part.stem}),
                    feedback=Feedback(show),
                    finish=partial(_write_part, part),
                )
        if processes.first:
            print(writer.finish())
        processes.barrier()
    finally:
        if lock is not None:
            lock.close()
        processes.close()


def _check(config: RunConfig, options: argparse.Namespace) -> None:
    if options.out.exists():
        raise UserError(f"--out: {options.out} is there already; remove it, or name another file")
    section = config.teacher
    if options.model is None and (section is None or section.from_student):
        raise UserError(f"{options.config}: has no teacher with weights of its own to answer; name a model (--model)")
    if options.samples > 1 and not options.temperature:
        raise UserError("--samples: the likeliest answer is always the same one; set a --temperature")
    text = next((source.path for source in config.data.train if source.format == "text"), None)
    if text is not None:
        raise UserError(f"{text}: is plain text, which gets no answers; leave it out of data.train")


def _asks(
    config: RunConfig, options: argparse.Namespace, processes: Processes
) -> tuple[str, Callable[[int], tuple[Answerer, dict[str, int]]]]:
    """What tells the model from others, and how ``evaluate`` asks it for the so many-th sample of each question."""
    section, seed = config.teacher, config.training.seed
    about = f"{identity(options.model)} {config.training.dtype}" if options.model is not None else ""
    if options.model is None and section is not None:
        # Where it runs decides no answer; what a server calls it is added below.
        settings = section.model_dump(exclude={"placement", "server"})
        about = f"{identity(section.path) if section.path else ''} {settings} {config.training.dtype}"
    if options.model is None and section is not None and section.server is not None:
        from vlm_distill.models.served import ServedAnswers
        from vlm_distill.training.loading import open_served

        served, workers = open_served(section, section.server), section.server.workers

        def there(sample: int) -> tuple[Answerer, dict[str, int]]:
            model = ServedAnswers(served, options.temperature, f"{seed} {sample}")
            return model, {"batch_size": 1, "at_once": workers}

        return f"{about} served as {served.name}", there
    model = _load(config, options.model, processes)

    def here(sample: int) -> tuple[Answerer, dict[str, int]]:
        answerer = _Drawing(model, options.temperature, f"{seed} {sample}") if options.temperature else model
        return answerer, {"batch_size": options.batch_size}

    return about, here


def _load(config: RunConfig, name: str | None, processes: Processes) -> VisionLanguageModel:
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES
    from vlm_distill.run import Run

    if name is not None:
        return load_vlm(name, dtype=DTYPES[config.training.dtype]).to(processes.device).eval()
    teacher = Run(config, processes).uncached.teacher
    assert teacher is not None
    assert teacher.model is not None
    return teacher.model


@dataclass(frozen=True)
class _Drawing:
    """Draws answers, each with random numbers of its own question and of this sample's key."""

    model: VisionLanguageModel
    temperature: float
    key: str

    @property
    def processor(self) -> Processor:
        return self.model.processor

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
        from vlm_distill.models.answers import Sampling

        rows = [self.model.encode_prompt(*prompt) for prompt in prompts]
        keys = [f"{self.key} {conversation.source} {conversation.line}" for conversation, _ in prompts]
        sampling = Sampling(self.temperature, [random.Random(key) for key in keys])
        return self.model.answer(rows, max_new_tokens=max_new_tokens, sampling=sampling)


def _teller(what: str) -> Callable[[int, int], None]:
    """Tells of every hundredth part, since on a server every question comes by itself."""
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done >= min(total, told + total / 100):
            told = done
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return tell


@dataclass
class _Finished:
    """A source's answers to one sample of each question, as they wait for the others."""

    answers: dict[int, str]
    problems: list[Problem]


def _write_part(path: Path, predictions: list[Prediction], problems: list[Problem]) -> None:
    """Writes what ``evaluate`` gives in the end, whole or not at all; answers that are none become problems."""
    answers = {}
    for found in predictions:
        if found.complete and found.answer:
            # With its thoughts: a student learns all that the teacher wrote.
            answers[found.index] = found.answer if found.generated is None else found.generated
        else:
            reason = "empty answer" if found.complete else "answer is cut"
            problems = [*problems, Problem(found.source, found.line, reason, found.answer[:80])]
    unfinished = path.with_suffix(".part")
    content = {"answers": list(answers.items()), "problems": [*map(asdict, problems)]}
    unfinished.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    unfinished.rename(path)


def _read_part(path: Path) -> _Finished:
    content = read_object(path)
    try:
        return _Finished(dict(content["answers"]), [Problem(**fields) for fields in content["problems"]])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not answers that this command keeps; delete it, and they are drawn again") from None


class _Writer:
    """The file with everything, made when all of it is there, and the folder beside it for what is there until then.

    Args:
        options: the command's.
        sources: the questions.
        about: what else an answer depends on. What is left of another model's answers, or of those to questions of
            other lengths or in another order, is not taken for these.
    """

    def __init__(self, options: argparse.Namespace, sources: Sequence[Source], about: str) -> None:
        self.out, self.sources, self.samples = options.out, sources, options.samples
        self.folder = self.out.with_name(f"{self.out.name}.unfinished")
        self.images = self.out.with_name(f"{self.out.stem}_images")
        key = hashlib.sha256(f"{about} {options.max_new_tokens} {options.temperature}".encode())
        for source in sources:
            key.update(f" {len(source)} ".encode() + source.sizes().tobytes())
        self.key = key.hexdigest()[:16]

    def part(self, number: int, sample: int) -> Path:
        return self.folder / f"{self.key}-{number}-{sample}.json"

    def finish(self) -> str:
        """Writes the file and removes the folder; says in a line how it went."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log_path = self.out.with_name(f"{self.out.stem}.problems.jsonl")
        log_path.unlink(missing_ok=True)
        log, written = ProblemLog(log_path), 0
        unfinished = self.folder / "all.jsonl"
        with unfinished.open("w", encoding="utf-8") as file:
            for number, source in enumerate(self.sources):
                parts = [_read_part(self.part(number, sample)) for sample in range(self.samples)]
                log.add(problem for part in parts for problem in part.problems)
                for index in sorted({index for part in parts for index in part.answers}):
                    conversation = source[index]
                    for answer in (part.answers[index] for part in parts if index in part.answers):
                        file.write(json.dumps(self._record(conversation, answer), ensure_ascii=False) + "\n")
                        written += 1
        unfinished.rename(self.out)
        shutil.rmtree(self.folder)
        return f"{self.out}: {written:,} answers; {log.summary()}"

    def _record(self, conversation: Conversation, answer: str) -> dict[str, Any]:
        """A line of the chat layout: the question with this answer."""
        prompt = conversation.prompt()
        kept = {key: value for key, value in conversation.metadata.items() if key != "answers"}
        origin = {"source": conversation.source, "line": conversation.line}
        message = {"role": "assistant", "content": [{"type": "text", "text": whole_thought(answer)}]}
        return {
            "images": [self._image(image) for image in prompt.images],
            "messages": [*map(_with_weight, prompt.messages), message],
            **({"tools": [*prompt.tools]} if prompt.tools else {}),
            "metadata": {**{key: value for key, value in kept.items() if _plain(value)}, "origin": origin},
        }

    def _image(self, image: ImageSource) -> str:
        """An image's path from the file's folder; those that are no files become some."""
        if isinstance(image, str):
            return os.path.relpath(image, self.out.parent)
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, "png")
            image = buffer.getvalue()
        path = self.images / f"{hashlib.sha256(image).hexdigest()[:32]}.image"
        if not path.is_file():
            self.images.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        return os.path.relpath(path, self.out.parent)


def _with_weight(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as files have it: one that is context only has the weight 0."""
    kept = {key: value for key, value in message.items() if key != "supervised"}
    return kept if message.get("supervised", True) else {**kept, "weight": 0}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


if __name__ == "__main__":
    leave(main())
