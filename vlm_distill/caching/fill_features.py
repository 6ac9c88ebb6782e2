"""Fill a cache with a frozen vision encoder's features of all images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import Encoded, SampleId
from data.errors import BadSample, UserError, first_line
from data.sample_images import load_images
from vlm_distill.config.model_sections import TEACHERS
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.common import DTYPES, cast_parameters
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.processor import Processor
from vlm_distill.run import Run
from vlm_distill.runtime.processes import Processes

from .check_features import compare_features, feature_identity
from .fill_loop import Filling, SampleBatches, say
from .image_features import FeatureCache, FeatureWriter
from .sample_digests import image_digest
from .store import ABOUT, in_words, make_folder

WHAT = "the vision encoder's features"


class _NewImages(SampleBatches[dict[int, Encoded]]):
    """Of each micro-batch, the images that are not in the cache yet, by digest.

    Images that are encoded together are one entry.
    """

    def __init__(
        self,
        run: Run,
        sample_ids: Sequence[Sequence[SampleId]],
        processor: Processor,
        cache: FeatureCache,
    ) -> None:
        super().__init__(sample_ids)
        self.sources, self.load = run.sources, run.load_image
        self.processor, self.cache = processor, cache

    def __getitem__(self, number: int) -> dict[int, Encoded]:
        found: dict[int, Encoded] = {}
        for source, index in self.sample_ids[number]:
            try:
                sample = self.sources[source][index]
                _, images = load_images(sample, self.load)
                for group in self.processor.image_groups(images):
                    digest = image_digest(group)
                    if digest not in found and digest not in self.cache:
                        found[digest] = self.processor.image_row(group)
            except BadSample:  # training counts it
                continue
        return found


class FeatureFilling(Filling[dict[int, Encoded]]):
    """Runs the student's vision encoder over all images of all sources that are not in its cache yet.

    Raises:
        UserError: (by ``prepare``) the cache has another identity, or the student cannot take features in place of
            images.
    """

    key = "student.vision_cache"

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        super().__init__(config, processes)
        assert config.student.vision_cache is not None
        self.folder = Path(config.student.vision_cache)
        self.seen: set[int] = set()

    def prepare(self) -> _NewImages:
        config, processes = self.config, self.processes
        dtype = DTYPES[config.training.dtype]
        run = Run(config, processes)
        sources = run.sources

        # The student may be cut from its teacher, or take its tokenizer. Otherwise no teacher is needed.
        alone = config.student.path is not None and config.student.tokenizer != TEACHERS
        self.model = Run(config.model_copy(update={"teacher": None}), processes).student if alone else run.student
        self.model.to(processes.device)
        identity = feature_identity(config, self.model)
        cast_parameters(self.model, dtype)
        self.model.eval()
        blank = _try_features(self.model)

        # Open the cache.
        if processes.first and not (self.folder / ABOUT).exists():
            about = FeatureCache.describe(blank.shape[1], dtype)
            make_folder(self.folder, WHAT, {"identity": identity, **about}, lambda _: None)
        processes.barrier()
        compare_features(self.folder, identity)
        self.cache = FeatureCache(self.folder)
        if processes.first:
            tokens = f"{self.cache.bytes_a_token:,} bytes a token of an image"
            say(f"{self.folder}: {tokens}; {len(self.cache):,} images are stored")
        # No rank writes before every rank has seen what is stored.
        processes.barrier()
        self.writer = FeatureWriter(self.cache)

        everything = [(number, index) for number, source in enumerate(sources) for index in range(len(source))]
        size = self.micro_batch_size
        sample_ids = [everything[i : i + size] for i in range(0, len(everything), size)]
        batches = _NewImages(run, sample_ids, self.model.processor, self.cache)
        batches.take_share(processes)
        return batches

    def begin(self) -> None:
        """Write the blank image that micro-batches without an image have in training."""
        digest = image_digest([self.model.processor.blank()])
        self.write({} if digest in self.cache else {digest: self.model.processor.dummy()})

    @torch.no_grad()
    def write(self, item: dict[int, Encoded]) -> None:
        # The first rank to meet an image encodes it for all; of several at once, the lowest.
        everyone = self.processes.gather([digest for digest in item if digest not in self.seen])
        self.seen.update(*everyone[: self.processes.rank])
        own = [digest for digest in item if digest not in self.seen]
        encoded = self.model.encode_images([item[digest] for digest in own]) if own else []
        for digest, features in zip(own, encoded, strict=True):
            self.writer.write(digest, features)
        self.seen.update(*everyone[self.processes.rank :])

    def close(self) -> None:
        self.writer.close()

    def report(self) -> None:
        self.processes.barrier()
        if self.processes.first:
            cache = FeatureCache(self.folder)
            say(f"{self.folder}: {len(cache):,} images in {in_words(cache.nbytes)}")


@torch.no_grad()
def _try_features(model: VisionLanguageModel) -> Tensor:
    """Return the features of a blank image, after checking that the model's output from them is the same.

    Some families of Transformers take more of an image than :meth:`VisionLanguageModel.encode_images` returns.
    """
    own, device = model.processor, next(model.parameters()).device
    refusal = "student.vision_cache: this model does not take its own features in place of images"
    try:
        sample = own.dummy()
        (features,) = model.encode_images([sample])
        known = own.with_features(lambda _: features.cpu())
        positions = torch.arange(len(sample.input_ids), device=device)
        outputs = []
        for processor in (own, known):
            inputs = processor.collate([processor.dummy()]).to(device, model.dtype)
            outputs.append(model(inputs, positions).hidden.float())
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        raise UserError(f"{refusal} ({first_line(error)}); leave it out") from error
    from_image, from_features = outputs
    if not (from_image - from_features).abs().max() <= 1e-3 * from_image.abs().max():
        raise UserError(f"{refusal}; leave it out")
    return features
