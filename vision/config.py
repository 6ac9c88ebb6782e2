"""The typed configuration of a classification run; sections shared with the VLM path are in that path's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm_distill.config import deepspeed_keys
from vlm_distill.config.checks import check_weights
from vlm_distill.config.fields import DType, Fraction, NotNegative, Positive, Section
from vlm_distill.config.sections import DeepSpeedSection, LossSection, TrainingSection

from .transforms import Augmentation, Erasing, Mixing

Colour = tuple[float, float, float]
AboveZero = Annotated[float, Field(gt=0)]


class ClassifierSection(Section):
    """A classifier, by the arguments of ``vision.classifier.load_classifier``."""

    replaces = {"weights": ("pretrained",), "pretrained": ("weights",)}

    name: str
    source: Literal["timm", "open_clip"] = "timm"
    pretrained: bool | str = False
    weights: str | None = None
    num_classes: Positive | None = None
    classes: list[str] | str | None = None
    image_size: Positive | None = None
    mean: Colour | None = None
    std: Colour | None = None
    config: dict[str, Any] = {}
    templates: str | list[str] = "openai"


class StudentSection(ClassifierSection):
    train: Literal["all", "head"] = "all"


class TeacherSection(ClassifierSection):
    """The teacher; ``cache`` names a folder for its logits of fixed views, which are then computed once."""

    cache: str | None = None


class ClassifierLossSection(LossSection):
    """One term of the loss. Its weight rises over ``warmup_epochs``: e/warmup in the e-th epoch, as in DKD's code."""

    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0


class ImagesSection(Section):
    """One source of labelled images, by the arguments of ``data.classification.open_images``."""

    path: str
    name: str | None = None
    format: str = "auto"
    split: str | None = None
    config: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    weight: AboveZero = 1.0
    limit: Positive | None = None


class DataSection(Section):
    """The data; ``views`` are the augmentations of an image: one, or a weak and a strong one.

    A run ends if it leaves out more than the share ``max_bad`` of its images.
    """

    train: list[ImagesSection] = Field(min_length=1)
    eval: list[ImagesSection] = []
    views: list[Augmentation] = Field([Augmentation()], min_length=1)
    erasing: Erasing = Erasing()
    mixing: Mixing = Mixing()
    repeats: Positive = 1
    fixed_views: NotNegative = 0
    roots: list[str] = []
    max_pixels: Positive = 89_478_485
    bad_samples: Literal["skip", "fail"] = "skip"
    max_bad: Fraction = 0.5
    workers: NotNegative = 4
    prefetch: Positive = 2


class OptimizerSection(Section):
    """An optimizer and a schedule, by timm's names; epochs may be fractions.

    Attributes:
        name: as ``timm.optim`` knows it: ``sgd`` has Nesterov momentum, ``momentum`` does not.
        decay: which parameters ``weight_decay`` applies to: ``weights`` leaves biases and norms out, ``all``
            includes them and what losses learn.
        layer_decay: factor on the learning rate from each layer to the one before it.
        milestones: epochs after which the learning rate is multiplied by ``decay_rate``, for ``multistep``.
        decay_epochs: epochs between such multiplications, for ``step``.
        options: further arguments of the optimizer.
    """

    # Milestones need the schedule ``multistep``.
    replaces = {"schedule": ("milestones",)}

    name: str = "sgd"
    lr: AboveZero = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Fraction = 0.9
    decay: Literal["weights", "all"] = "weights"
    layer_decay: AboveZero | None = None
    schedule: Literal["cosine", "multistep", "step", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-5
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    milestones: list[AboveZero] = []
    decay_epochs: AboveZero = 30.0
    decay_rate: AboveZero = 0.1
    max_grad_norm: AboveZero | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _steps_are_named(self) -> OptimizerSection:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("milestones and schedule: multistep belong together; give both or neither")
        return self


class ClassifierTrainingSection(TrainingSection):
    """``gather`` lets batch losses see the rows of all ranks; ``ema`` is the decay of the averaged weights."""

    batch_size: Positive = 256
    dtype: DType = "fp32"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    gather: bool = False
    channels_last: bool = False
    compile: bool = False


class EvaluationSection(Section):
    """``best`` names the data whose top-1 accuracy decides which student is kept as the best."""

    every_epochs: AboveZero | None = None
    limit: Positive | None = None
    batch_size: Positive = 256
    teacher: bool = True
    best: str | None = None

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationSection:
        if self.best is not None and self.every_epochs is None:
            raise ValueError("best chooses among evaluations while training; say how often they are (every_epochs)")
        return self


class ClassifierDeepSpeedSection(DeepSpeedSection):
    """ZeRO is off by default: classifiers are small."""

    stage: Literal[0, 1, 2, 3] = 0


class ClassifierConfig(Section):
    """A run. ``teacher`` is optional; without one, only losses that need no teacher are allowed."""

    student: StudentSection
    teacher: TeacherSection | None = None
    loss: list[ClassifierLossSection] = Field(min_length=1)
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    training: ClassifierTrainingSection
    deepspeed: ClassifierDeepSpeedSection = ClassifierDeepSpeedSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: str

    @model_validator(mode="after")
    def _one_voice(self) -> ClassifierConfig:
        deepspeed_keys.check_equal(self.deepspeed.extra, deepspeed_keys.set_by_run(self, autocast=True))
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> ClassifierConfig:
        check_weights(self.loss)
        if self.evaluation.every_epochs is not None and not self.data.eval:
            raise ValueError(
                "evaluation.every_epochs: there is nothing to evaluate; name data.eval, or leave every_epochs out"
            )
        if self.training.ema is not None and self.deepspeed.stage == 3:
            raise ValueError("training.ema: an average of the weights needs them whole; use deepspeed.stage 0, 1 or 2")
        if self.teacher is not None and self.teacher.cache is not None:
            if not self.data.fixed_views:
                raise ValueError("teacher.cache: keeps logits of fixed views; say how many (data.fixed_views)")
            if self.data.mixing.mixup or self.data.mixing.cutmix or self.data.erasing.probability:
                raise ValueError(
                    "teacher.cache: mixed and erased images are never the same twice; leave out data.mixing and "
                    "data.erasing, or the cache"
                )
        return self
