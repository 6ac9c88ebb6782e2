"""Do once what the processors of a student and a teacher have in common: all of a sample, its text, or its images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from .composed_processor import ComposedProcessor
from .pretrained_processor import PretrainedProcessor
from .processor import Processor


def share_processing(student: Processor, teacher: Any) -> tuple[Processor, Any]:
    """Return what encodes samples for both models: the student's processor twice if the teacher's does the same.

    Collation recognises one processor that serves both models, encodes each sample once, and makes one set of tensors.
    Otherwise copies of both are returned. Conversations are rendered once if tokenizer and chat template are the same,
    and images resized and normalised once if the image processor is. The student's must be asked first.

    A teacher that is cached has no processor of its own, and is left as it is.
    """
    if not isinstance(teacher, Processor):
        return student, teacher
    if student.recipe() == teacher.recipe():
        return student, student
    if type(student) is not type(teacher) or not isinstance(student, PretrainedProcessor | ComposedProcessor):
        return student, teacher
    assert isinstance(teacher, PretrainedProcessor | ComposedProcessor)
    same_text = student.text_recipe() == teacher.text_recipe()
    same_images = student.image_recipe() == teacher.image_recipe()
    student, teacher = copy.copy(student), copy.copy(teacher)
    if same_text:
        once = _Once(student.rendered_sample)
        student.shared_rendering, teacher.shared_rendering = once.first, once.second
    if same_images and student.image_function is not None:
        once = _Once(student.image_function)
        student.set_image_function(_Delegate(once.first, student.image_function))
        teacher.set_image_function(_Delegate(once.second, teacher.image_function))
    return student, teacher


class _Once:
    """A function that two models call with the same arguments: computed for the first, kept for the second.

    Arguments are the same if they are the same objects. What the second never asks for is forgotten when the first goes
    on after the second has called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._kept: dict[Any, tuple[Any, Any]] = {}
        self._handed_over = False

    def first(self, *args: Any, **options: Any) -> Any:
        if self._handed_over:
            self._kept.clear()
            self._handed_over = False
        result = self._function(*args, **options)
        # The arguments are kept, too: another object must not get the identity of one that is gone.
        self._kept[_identity((args, options))] = (args, options), copy.copy(result)
        return result

    def second(self, *args: Any, **options: Any) -> Any:
        self._handed_over = True
        kept = self._kept.pop(_identity((args, options)), None)
        return self._function(*args, **options) if kept is None else kept[1]


def _identity(value: Any) -> Any:
    """Return what is equal for the same objects in the same lists, and for equal settings."""
    if isinstance(value, list | tuple):
        return tuple(_identity(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((key, _identity(entry)) for key, entry in sorted(value.items()))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return id(value)


class _Delegate:
    """Stands for an object that is called, such as an image processor; everything else is the object's own."""

    def __init__(self, call: Callable[..., Any], of: Any) -> None:
        self._call, self._of = call, of

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("_call", "_of"):  # not there yet while this is copied or sent to a worker
            raise AttributeError(name)
        return getattr(self._of, name)
