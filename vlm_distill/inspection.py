"""A run's samples as its models receive them, for ``vlm-distill inspect``."""

from __future__ import annotations

import torch

from data.batch import Encoded
from data.collate import Collator, Pair
from data.conversation import Document
from data.errors import BadSample
from data.mixture import Mixture
from vlm_distill.config import RunConfig
from vlm_distill.models.interface import Processor
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.reporting.inspect import InspectedModel, InspectedSample
from vlm_distill.training.build import (
    build_terms,
    image_loader,
    load_models,
    open_sources,
    pair_vocabularies,
    turns,
)
from vlm_distill.training.engine import Processes


def inspect_samples(config: RunConfig, count: int) -> list[InspectedSample]:
    """The first ``count`` samples in the order in which training meets them, bad ones with what is wrong."""
    torch.manual_seed(config.training.seed)
    processes = Processes("cpu")
    sources = open_sources(config.data.train, config.data.max_length)
    if config.teacher is not None:  # what the teacher receives is shown of itself
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache": None})})
    student, teacher = load_models(config, processes)
    processors, grouped = {"student": student.processor}, False
    if isinstance(teacher, ModelTeacher):
        processors["teacher"] = teacher.processor
        if isinstance(teacher, ModelTeacher):
            grouped = pair_vocabularies(config, student, teacher.model, build_terms(config))
    processes.close()
    mixture = Mixture(
        sources,
        [section.weight for section in config.data.train],
        seed=config.training.seed,
        batch_size=count,
        window=0,
    )
    both = processors["student"], processors.get("teacher")
    collator = Collator(*both, config.data.max_length, turns(config.data), grouped)
    load, shown = image_loader(config.data), []
    for source, row in mixture.rows(0):
        title, images = f"{sources[source].name}, row {row + 1}", []
        models: dict[str, InspectedModel] = {}
        groups: list[tuple[str, str]] = []
        problem = None
        try:
            sample = sources[source][row]
            title = f"{sample.source}, line {sample.line}"
            if isinstance(sample, Document):
                models = {name: _inspected(p, p.encode_document(sample)) for name, p in processors.items()}
            else:
                images = [load(image) for image in sample.images]
                models = {name: _inspected(p, p.encode(sample, images)) for name, p in processors.items()}
            pairs = collator.encode(sample, images)
            if config.data.answers == "last":  # as it is learnt
                learnt = {"student": pairs[0].student, "teacher": pairs[0].teacher}
                models |= {name: _inspected(processors[name], row) for name, row in learnt.items() if row is not None}
            groups = _groups(pairs[0], processors)
        except BadSample as bad:
            problem = str(bad)
        shown.append(InspectedSample(title=title, images=images, models=models, problem=problem, groups=groups))
    return shown


def _groups(pair: Pair, processors: dict[str, Processor]) -> list[tuple[str, str]]:
    """The tokens of each group in both models, joined by dots."""
    if pair.groups is None or pair.teacher is None:
        return []
    texts = []
    for name, row, spans in zip(("student", "teacher"), (pair.student, pair.teacher), pair.groups, strict=True):
        decode = processors[name].tokenizer.decode
        pieces = [decode([token]) for token in row.input_ids[row.supervised].tolist()]
        texts.append(["·".join(pieces[first:stop]) for first, stop in spans.tolist()])
    return list(zip(*texts, strict=True))


def _inspected(processor: Processor, sample: Encoded) -> InspectedModel:
    return InspectedModel(
        pieces=[processor.tokenizer.decode([token]) for token in sample.input_ids.tolist()],
        supervised=sample.supervised.tolist(),
        ends=sample.ends.tolist(),
        image=processor.image_tokens(sample).tolist(),
    )
