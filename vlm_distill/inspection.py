"""A run's samples as its models receive them, for ``vlm-distill inspect``."""

from __future__ import annotations

import torch

from data.batch import Encoded
from data.collate import encode_pair
from data.conversation import Conversation
from data.errors import BadSample
from data.mixture import Mixture
from vlm_distill.config import RunConfig
from vlm_distill.models.interface import Processor
from vlm_distill.reporting.inspect import InspectedModel, InspectedSample
from vlm_distill.training.build import image_loader, load_student, load_teacher, open_sources
from vlm_distill.training.engine import Processes


def inspect_samples(config: RunConfig, count: int) -> list[InspectedSample]:
    """The first ``count`` samples in the order in which training meets them, bad ones with what is wrong."""
    torch.manual_seed(config.training.seed)
    processes = Processes("cpu")
    sources = open_sources(config.data.train)
    teacher = load_teacher(config, processes)
    processors = {"student": load_student(config, teacher).processor}
    if teacher is not None:
        processors["teacher"] = teacher.processor
    processes.close()
    mixture = Mixture(
        sources,
        [section.weight for section in config.data.train],
        seed=config.training.seed,
        batch_size=count,
        window=0,
    )
    load, shown = image_loader(config.data), []
    for source, row in mixture.rows(0):
        title, images = f"{sources[source].name}, row {row + 1}", []
        models: dict[str, InspectedModel] = {}
        problem = None
        try:
            conversation: Conversation = sources[source][row]
            title = f"{conversation.source}, line {conversation.line}"
            images = [load(image) for image in conversation.images]
            models = {name: _inspected(p, p.encode(conversation, images)) for name, p in processors.items()}
            encode_pair(conversation, images, processors["student"], processors.get("teacher"), config.data.max_length)
        except BadSample as bad:
            problem = str(bad)
        shown.append(InspectedSample(title=title, images=images, models=models, problem=problem))
    return shown


def _inspected(processor: Processor, sample: Encoded) -> InspectedModel:
    return InspectedModel(
        pieces=[processor.tokenizer.decode([token]) for token in sample.input_ids.tolist()],
        supervised=sample.supervised.tolist(),
        ends=sample.ends.tolist(),
        image=processor.image_tokens(sample).tolist(),
    )
