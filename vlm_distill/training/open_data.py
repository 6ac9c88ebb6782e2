"""What is read of the data: sources, how images are decoded, which answers are learned, and what the teacher sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.encoding import Turns
from data.errors import UserError
from data.opening import open_source, open_text
from data.plain_text import CHARACTERS_PER_TOKEN, TextSource
from data.sample_images import ImageLoader
from data.sources import Source
from data.teacher_view import View
from data.video import VideoLimits, check_installed
from vlm_distill.config.model_sections import BlurSection, DownsampleSection, TeacherSection
from vlm_distill.config.sections import AnyData, DataSection, SourceSection, VideoSection


def open_sources(sections: Sequence[SourceSection], max_length: int, key: str) -> list[Source | TextSource]:
    """Open the readers of a configuration's sources.

    Args:
        sections: of the configuration.
        key: where they are in the configuration, for messages.
        max_length: the most tokens in a row.

    Raises:
        UserError: a source cannot be read, or two sources have the same name, so that neither problems nor scores
            could tell them apart.
    """
    sources: list[Source | TextSource] = []
    for section in sections:
        try:
            sources.append(_open(section, max_length))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    name, count = Counter(source.name for source in sources).most_common(1)[0] if sources else ("", 0)
    if count > 1:
        raise UserError(f"{key}: {count} sources are called {name}; give each a name of its own (key name)")
    return sources


def _open(section: SourceSection, max_length: int) -> Source | TextSource:
    named = section.model_dump(include={"split", "config", "name", "skip", "limit", "columns"})
    if section.format == "text":
        return open_text(section.path, CHARACTERS_PER_TOKEN * max_length, **named)
    images = Path(section.images) if section.images else None
    return open_source(section.path, images=images, format=section.format, layout=section.layout, **named)


def image_loader(data: AnyData) -> ImageLoader:
    """Return what decodes images and videos within the limits of the data section."""
    limits = video_limits(getattr(data, "video", None))
    return ImageLoader([Path(root) for root in data.roots], data.max_pixels, video=limits)


def video_limits(section: VideoSection | None) -> VideoLimits | None:
    """Return how files of videos are read. Raise ``UserError`` if no package reads them."""
    if section is None:
        return None
    check_installed()
    return VideoLimits(**section.model_dump())


def turns(data: DataSection) -> Turns:
    """Return which answers of a conversation are learned, and how long prompt and answer may be."""
    return Turns(data.answers == "last", data.turns == "split", data.max_prompt, data.max_response)


def teacher_view(teacher: TeacherSection | None) -> View | None:
    """Return what the teacher sees of a sample; ``None`` if it sees what the student sees."""
    section = None if teacher is None else teacher.view
    if section is None:
        return None
    return view_of(section.system, section.question, section.images)


def view_of(
    system: str | None = None,
    question: str | None = None,
    images: Literal["same", "full", "none"] | BlurSection | DownsampleSection = "same",
) -> View:
    """Return a view from the values of a section; for ``full``, the processor makes the difference."""
    return View(
        system,
        question,
        images="drop" if images == "none" else "keep",
        blur=images.blur if isinstance(images, BlurSection) else 0.0,
        downsample=images.downsample if isinstance(images, DownsampleSection) else 1.0,
    )
