"""The cache of what a student's frozen parts make of images: filled by ``vlm-distill cache``, read in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Encoded
from data.conversation import Document
from data.errors import BadSample, UserError
from data.sources import Source, TextSource
from data.workers import make_loader
from vlm_distill.config.model_sections import TEACHERS
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.common import DTYPES, cast_parameters, first_line
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.processor import Processor
from vlm_distill.run import Run
from vlm_distill.runtime.launch import cores
from vlm_distill.runtime.processes import Processes
from vlm_distill.training.open_data import image_loader, open_sources

from .check_features import feature_identity
from .fill_tokens import Told, say
from .image_features import FeatureCache, FeatureWriter
from .store import ABOUT, compare, in_words, make_folder, read_about
from .token_records import image_digest

WHAT = "the vision encoder's features"


class _Rows(Dataset[dict[int, Encoded]]):
    """Of a micro-batch's worth of rows by number, the images that are not in the cache yet.

    Those that are seen together stand in one row, by their digest.
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source | TextSource],
        rows: Sequence[Sequence[tuple[int, int]]],
        processor: Processor,
        cache: FeatureCache,
    ) -> None:
        self.sources, self.rows, self.processor, self.cache = sources, rows, processor, cache
        self.load = image_loader(config.data)

    def __getitem__(self, index: int) -> dict[int, Encoded]:
        found: dict[int, Encoded] = {}
        for source, row in self.rows[index]:
            try:
                sample = self.sources[source][row]
                images = [] if isinstance(sample, Document) else [self.load(image) for image in sample.images]
                for group in self.processor.image_groups(images):
                    digest = image_digest(group)
                    if digest not in found and digest not in self.cache:
                        found[digest] = self.processor.image_row(group)
            except BadSample:  # which the training counts
                continue
        return found


def fill(config: RunConfig, processes: Processes) -> None:
    """Lets the student see all images of all sources that are not in its cache yet.

    Args:
        config: the run that will read them.
        processes: the ranks; every rank calls this. Each takes its share of the rows.

    Raises:
        UserError: the cache is of something else, or the student cannot take features in place of images.
    """
    assert config.student.vision_cache is not None
    folder, dtype = Path(config.student.vision_cache), DTYPES[config.training.dtype]
    sources = open_sources(config.data.train, config.data.max_length)
    # As the run loads it: cut from its teacher, or with its tokenizer. One from a path needs no teacher.
    alone = config.student.path is not None and config.student.tokenizer != TEACHERS
    model = Run(config.model_copy(update={"teacher": None}) if alone else config, processes).student
    model.to(processes.device)
    identity = feature_identity(config, model)
    cast_parameters(model, dtype)
    model.eval()
    blank = _try(model)
    if processes.first and not (folder / ABOUT).exists():
        about = FeatureCache.describe(blank.shape[1], dtype)
        make_folder(folder, WHAT, {"identity": identity, **about}, lambda _: None)
    processes.barrier()
    compare(folder, "features", read_about(folder).get("identity", {}), identity)
    cache = FeatureCache(folder)
    if processes.first:
        say(f"{folder}: {cache.bytes_a_token:,} bytes a token of an image; {len(cache):,} images are there")
    # Nobody writes before every rank knows what is there.
    processes.barrier()
    micro = config.training.micro_batch_size or max(1, config.training.batch_size // processes.world)
    places = [(number, row) for number, source in enumerate(sources) for row in range(len(source))]
    whole = [places[i : i + micro] for i in range(0, len(places), micro)]
    # As many on every rank: one may get nothing at the end.
    rows = [*whole, *[[]] * (-len(whole) % processes.world)][processes.rank :: processes.world]
    _run(model, cache, _Rows(config, sources, rows, model.processor, cache), config, processes)
    processes.barrier()
    if processes.first:
        cache = FeatureCache(folder)
        say(f"{folder}: {len(cache):,} images in {in_words(cache.nbytes)}")


@torch.no_grad()
def _try(model: VisionLanguageModel) -> Tensor:
    """The features of a blank image, after the model was seen to say the same of them as of the image.

    Families of Transformers may take more of an image than what :meth:`VisionLanguageModel.see` gives.
    """
    own, device = model.processor, next(model.parameters()).device
    refusal = "student.vision_cache: this model does not take its own features in place of images"
    try:
        row = own.dummy()
        (features,) = model.encode_images([row])
        known = own.with_features(lambda _: features.cpu())
        places = torch.arange(len(row.input_ids), device=device)
        one, other = (
            model(processor.collate([processor.dummy()]).to(device, model.dtype), places).hidden.float()
            for processor in (own, known)
        )
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        raise UserError(f"{refusal} ({first_line(error)}); leave it out") from error
    if not (one - other).abs().max() <= 1e-3 * one.abs().max():
        raise UserError(f"{refusal}; leave it out")
    return features


@torch.no_grad()
def _run(
    model: VisionLanguageModel, cache: FeatureCache, dataset: _Rows, config: RunConfig, processes: Processes
) -> None:
    workers, count = min(config.data.workers, cores()), len(dataset.rows)
    pictures = make_loader(dataset, 0, count, workers=workers, prefetch=config.data.prefetch)
    writer, told, seen = FeatureWriter(cache), Told(processes, count), set[int]()

    # Rows without an image have a blank one in training.
    digest = image_digest([model.processor.blank()])
    blank = {} if digest in cache else {digest: model.processor.dummy()}
    try:
        for done, rows in enumerate(chain([blank], pictures)):
            # Whoever comes upon an image first sees it for all; of several at once the lowest rank.
            everyone = processes.gather([digest for digest in rows if digest not in seen])
            seen.update(*everyone[: processes.rank])
            own = [digest for digest in rows if digest not in seen]
            for digest, features in zip(own, model.encode_images([rows[d] for d in own]) if own else [], strict=True):
                writer.write(digest, features)
            seen.update(*everyone[processes.rank :])
            if done:
                told(done)
    finally:
        writer.close()
