"""One rank of writing a model's answers as data: ``python -m vlm_distill.generate CONFIG [key=value …] --out FILE``.

Training on such a file with cross-entropy is sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947).
"""

from __future__ import annotations

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
from data.conversation import Conversation, ImageSource, VideoFile
from data.errors import UserError
from data.loader import ProblemLog
from data.saved_json import read_object
from data.sources import Source
from vlm_distill.cli.options import parse
from vlm_distill.cli.training import GenerateOptions
from vlm_distill.config.file import load_config
from vlm_distill.config.model_sections import TeacherSection
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.answering import Answerer, Asking, Feedback, evaluate
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.evaluation.model_identity import identity
from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.models.chat import whole_thought
from vlm_distill.runtime.launch import guarded, leave

if TYPE_CHECKING:
    from vlm_distill.models.answers import Answer
    from vlm_distill.models.interface import VisionLanguageModel
    from vlm_distill.models.processor import Processor, Prompt
    from vlm_distill.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: generate(parse(GenerateOptions, given, "vlm_distill.generate", __doc__)))


def generate(options: GenerateOptions) -> None:
    """Write answers to all training questions, in the order of the data; several answers to a question are adjacent."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = load_config(options.config, options.overrides or ())
    if config.training.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    from vlm_distill.run import Run
    from vlm_distill.runtime.output import claim
    from vlm_distill.runtime.processes import Processes

    # Report mistakes before a model is loaded.
    _check(config, options)
    sources: list[Any] = Run(config).sources

    processes = Processes(config.training.device)
    lock = None
    try:
        run = Run(config, processes)
        answers = _served(run, options) or _local(run, options)
        writer = _Writer(options, sources, f"{answers.identity} {config.data.train} {config.training.seed}")
        lock = claim(writer.folder) if processes.first else None
        for number, source in enumerate(sources):
            for sample in range(options.samples):
                part = writer.part(number, sample)
                if not any(processes.gather(part.is_file())):
                    _answer_source(answers, source, sample, run, part)
        if processes.first:
            print(writer.finish())
        processes.barrier()
    finally:
        if lock is not None:
            lock.close()
        processes.close()


def _check(config: RunConfig, options: GenerateOptions) -> None:
    """Raise ``UserError`` if there are no questions, no model to answer them, or the file exists already."""
    if options.out.exists():
        raise UserError(f"--out: {options.out} already exists; remove it, or name another file")
    section = config.teacher
    if options.model is None and (section is None or section.from_student):
        raise UserError(f"{options.config}: has no teacher with weights of its own to answer; name a model (--model)")
    if options.samples > 1 and not options.temperature:
        raise UserError("--samples: the likeliest answer is always the same one; set a --temperature")
    text = next((source.path for source in config.data.train if source.format == "text"), None)
    if text is not None:
        raise UserError(f"{text}: is plain text, which gets no answers; leave it out of data.train")


@dataclass(frozen=True)
class _Answers:
    """Who answers.

    Attributes:
        identity: tells this model from others whose answers may be kept.
        answerer: returns what answers; its argument tells several answers to a question apart.
        batch_size: questions answered together.
        max_new_tokens: longer answers are left out.
        at_once: batches in flight at once, as in ``Asking``.
    """

    identity: str
    answerer: Callable[[int], Answerer]
    batch_size: int
    max_new_tokens: int
    at_once: int | None = None


def _served(run: Run, options: GenerateOptions) -> _Answers | None:
    """Return the teacher on its server, if it is there and no other model is named."""
    section, seed = run.config.teacher, run.config.training.seed
    if options.model is not None or section is None or section.server is None:
        return None
    from vlm_distill.models.served import ServedAnswers
    from vlm_distill.training.loading import open_served

    served = open_served(section, section.server)
    return _Answers(
        f"{_teacher_identity(run.config, section)} served as {served.name}",
        lambda sample: ServedAnswers(served, options.temperature, f"{seed} {sample}"),
        batch_size=1,
        max_new_tokens=options.max_new_tokens,
        at_once=section.server.workers,
    )


def _local(run: Run, options: GenerateOptions) -> _Answers:
    """Return the named model or the teacher, loaded here."""
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import DTYPES

    config = run.config
    assert run.processes is not None
    model: VisionLanguageModel | None
    if options.model is not None:
        name = f"{identity(options.model)} {config.training.dtype}"
        model = load_vlm(options.model, dtype=DTYPES[config.training.dtype]).to(run.processes.device).eval()
    else:
        assert config.teacher is not None
        name = _teacher_identity(config, config.teacher)
        teacher = run.uncached.teacher
        model = None if teacher is None else teacher.model
    assert model is not None
    greedy = model

    def answerer(sample: int) -> Answerer:
        if not options.temperature:
            return greedy
        return _Drawing(greedy, options.temperature, f"{config.training.seed} {sample}")

    return _Answers(name, answerer, options.batch_size, options.max_new_tokens)


def _teacher_identity(config: RunConfig, section: TeacherSection) -> str:
    """Return what a teacher's answers depend on. Where it runs is no part of that."""
    settings = section.model_dump(exclude={"placement", "server", "view"})
    return f"{identity(section.path) if section.path else ''} {settings} {config.training.dtype}"


def _answer_source(answers: _Answers, source: Any, sample: int, run: Run, part: Path) -> None:
    """Answer all questions of a source once, and keep the answers until those of all sources are there."""
    assert run.processes is not None
    ranks = run.processes.share
    asking = Asking(
        batch_size=answers.batch_size,
        at_once=answers.at_once,
        max_new_tokens=answers.max_new_tokens,
        references=False,
        load=run.load_image,
    )
    evaluate(
        answers.answerer(sample),
        source,
        asking,
        ranks=ranks,
        folder=AnswerFolder(part.parent, identity={"part": part.stem}),
        feedback=Feedback(_progress(f"{source.name}, sample {sample + 1}") if ranks.first else None),
        finish=partial(_write_part, part),
    )


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


def _progress(title: str) -> Callable[[int, int], None]:
    """Return a function that prints every percent of progress: a server's questions are answered one by one."""
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done >= min(total, shown + total / 100):
            shown = done
            print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show


@dataclass
class _Finished:
    """One answer to each question of a source, kept until those of all sources are there."""

    answers: dict[int, str]
    problems: list[Problem]


def _write_part(path: Path, predictions: list[Prediction], problems: list[Problem]) -> None:
    """Write the answers to a file, completely or not at all. Cut and empty answers become problems."""
    answers = {}
    for found in predictions:
        if found.complete and found.answer:
            # With its reasoning: a student learns all that the teacher wrote.
            answers[found.index] = found.answer if found.generated is None else found.generated
        else:
            reason = "empty answer" if found.complete else "answer is cut"
            problems = [*problems, Problem(found.source, found.line, reason, found.answer[:80])]
    unfinished = path.with_suffix(".part")
    content = {"answers": list(answers.items()), "problems": [*map(asdict, problems)]}
    unfinished.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    unfinished.rename(path)


def _read_part(path: Path) -> _Finished:
    """Read what :func:`_write_part` wrote."""
    content = read_object(path)
    try:
        return _Finished(dict(content["answers"]), [Problem(**fields) for fields in content["problems"]])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: is not a file of this command; delete it, and its questions are answered again"
        ) from None


class _Writer:
    """Writes the file when all answers are there, and keeps them in a folder beside it until then.

    Args:
        options: of the command.
        sources: of the questions.
        about: what else an answer depends on. Kept answers of another model, or to questions of other lengths or in
            another order, are ignored.
    """

    def __init__(self, options: GenerateOptions, sources: Sequence[Source], about: str) -> None:
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
        """Write the file and remove the folder. Return one line about the result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log_path = self.out.with_name(f"{self.out.stem}.problems.jsonl")
        log_path.unlink(missing_ok=True)
        log, written = ProblemLog(log_path), 0
        unfinished = self.folder / "all.jsonl"
        with unfinished.open("w", encoding="utf-8") as file:
            for number, source in enumerate(self.sources):
                parts = [_read_part(self.part(number, sample)) for sample in range(self.samples)]
                for part in parts:
                    log.add(part.problems)
                for index in sorted(set().union(*(part.answers for part in parts))):
                    conversation = source[index]
                    answers = [part.answers[index] for part in parts if index in part.answers]
                    for answer in answers:
                        file.write(json.dumps(self._record(conversation, answer), ensure_ascii=False) + "\n")
                    written += len(answers)
        unfinished.rename(self.out)
        shutil.rmtree(self.folder)
        return f"{self.out}: {written:,} answers; {log.summary()}"

    def _record(self, conversation: Conversation, answer: str) -> dict[str, Any]:
        """Return a line of the chat layout: the question with this answer."""
        prompt = conversation.prompt()
        kept = {key: value for key, value in conversation.metadata.items() if key != "answers"}
        origin = {"source": conversation.source, "line": conversation.line}
        message = {"role": "assistant", "content": [{"type": "text", "text": whole_thought(answer)}]}
        images, messages = self._with_files(prompt)
        return {
            "images": images,
            "messages": [*map(_with_weight, messages), message],
            **({"tools": [*prompt.tools]} if prompt.tools else {}),
            "metadata": {**{key: value for key, value in kept.items() if _plain(value)}, "origin": origin},
        }

    def _with_files(self, prompt: Conversation) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the paths of a question's images, and its messages, whose videos name their files themselves."""
        sources, images = iter(prompt.images), list[str]()
        messages = []
        for message in prompt.messages:
            parts = []
            for part in message["content"]:
                if part["type"] == "image":
                    images.append(self._image(next(sources)))
                parts.append({**part, "video": self._image(next(sources))} if part["type"] == "video" else part)
            messages.append({**message, "content": parts})
        return images, messages

    def _image(self, image: ImageSource) -> str:
        """Return the path of an image or video from the file's folder. Write those that are not files yet."""
        if isinstance(image, VideoFile):
            image = image.source
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
    """Return a message as files have it: with weight 0 if it is not learned."""
    kept = {key: value for key, value in message.items() if key != "supervised"}
    return kept if message.get("supervised", True) else {**kept, "weight": 0}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


if __name__ == "__main__":
    leave(main())
