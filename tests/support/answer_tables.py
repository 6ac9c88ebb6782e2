"""Benchmarks as small TSV files, a model that answers them from a table, and a judge that says one thing."""

import csv
from types import SimpleNamespace

from vlm_distill.evaluation.answering import Asking
from vlm_distill.evaluation.benchmark_lookup import find_questions, get_benchmark
from vlm_distill.evaluation.benchmark_run import OpenBenchmark, run_benchmark
from vlm_distill.evaluation.kept_answers import AnswerFolder
from vlm_distill.models.answers import Answer


class Table:
    """Answers questions from a table; the likeliest option is the one it would say."""

    def __init__(self, answers):
        self.answers = answers
        self.processor = SimpleNamespace(encode=lambda conversation, images, *, generation: None)

    def generate(self, prompts, *, max_new_tokens):
        return [Answer(self.answers[conversation.metadata["index"]], [1], [-0.5]) for conversation, _ in prompts]

    def score_options(self, prompts, options):
        said = [self.answers[conversation.metadata["index"]] for conversation, _ in prompts]
        return [
            [0.0 if text == answer else -1.0 for text in texts] for texts, answer in zip(options, said, strict=True)
        ]


class Friend:
    """A judge that replies with one text."""

    def __init__(self, reply):
        self.reply, self.prompts = reply, []

    def ask(self, prompts):
        self.prompts += prompts
        return [self.reply for _ in prompts]

    def forget(self, prompts):
        pass


def write(folder, name, header, *rows):
    with (folder / f"{name}.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])


def choice(folder, name="MMStar"):
    header = ["index", "image", "question", "A", "B", "answer", "category", "l2-category"]
    write(
        folder,
        name,
        header,
        *([i, "x" * 70, f"Is it {i}?", "one", "two", "AB"[i % 2], f"c{i % 3}", "d"] for i in range(7)),
    )


def run(name, folder, answers, out=None, rules="vlmevalkit", **options):
    entry, model = get_benchmark(name), Table(answers)
    questions = find_questions(entry, folder, rules=rules)
    load = options.pop("load", lambda image: image)
    asking = Asking(batch_size=3, load=load, limit=options.pop("limit", None))
    kept = {new: options.pop(old) for old, new in (("resume", "identity"), ("about", "about")) if old in options}
    answers_in = AnswerFolder(out or folder / "out", "some/tiny", **kept)
    return run_benchmark(model, OpenBenchmark(entry, questions, rules), asking, folder=answers_in, **options)
