"""The typed configuration of a classification run; sections shared with the VLM path are in that path's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm_distill.config import deepspeed_keys
from vlm_distill.config.checks import check_losses
from vlm_distill.config.fields import AboveZero, AtLeastZero, DType, Fraction, NotNegative, Positive, Section
from vlm_distill.config.sections import DeepSpeedSection, LossSection, TrainingSection

from .augmentation import Augmentation, Erasing, Mixing
from .losses import REGISTRY

Colour = tuple[float, float, float]


class ClassifierSection(Section):
    """A classifier: an architecture or folder, its weights, classes and input settings."""

    replaces = {"weights": ("pretrained",), "pretrained": ("weights",)}

    name: str = Field(description="A model of timm or open_clip, or the folder of a saved classifier.")
    source: Literal["timm", "open_clip"] = Field("timm", description="Library of the model; a folder overrides it.")
    pretrained: bool | str = Field(False, description="Load weights from the hub; a string names one of several.")
    weights: str | None = Field(None, description="Local file of weights, instead of `pretrained`.")
    num_classes: Positive | None = Field(
        None,
        description="Number of outputs, by default the weights' (or the data's); another number than the weights' "
        "starts with a new classification layer.",
    )
    classes: list[str] | str | None = Field(
        None,
        description="Names of the outputs in order: a list, a file with one per line, or a set such as `imagenet`; "
        "by default the weights' own. For open_clip, what the zero-shot classifier tells apart.",
    )
    image_size: Positive | None = Field(
        None, description="Pixels per side, to which position embeddings are resampled; by default the model's own."
    )
    mean: Colour | None = Field(None, description="Mean of red, green and blue in 0..1; by default the model's own.")
    std: Colour | None = Field(
        None, description="Standard deviation of red, green and blue in 0..1; by default the model's own."
    )
    config: dict[str, Any] = Field(
        {}, description="More keyword arguments of `timm.create_model`, or an open_clip model configuration."
    )
    templates: str | list[str] = Field(
        "openai", description="Prompts of a zero-shot classifier: `openai`, `simple`, or a list with `{}` for the name."
    )


class StudentSection(ClassifierSection):
    """The classifier that is trained."""

    train: Literal["all", "head"] = Field(
        "all", description="What is trained: everything, or with `head` the classification layer alone."
    )


class TeacherSection(ClassifierSection):
    """The teacher."""

    cache: str | None = Field(
        None, description="Folder for its logits of fixed views (`data.fixed_views`), which are then computed once."
    )


class ClassifierLossSection(LossSection):
    """One term of the loss."""

    warmup_epochs: AtLeastZero = Field(
        0.0, description="Epochs over which the weight rises: epoch e has e/warmup_epochs of it, as in DKD's code."
    )


class ImagesSection(Section):
    """One source of labelled images."""

    path: str = Field(description="File, folder, or name of a dataset.")
    name: str | None = Field(None, description="Name in metrics and messages; by default made from the path.")
    format: str = Field("auto", description="Layout of the data; `auto` infers it from the path.")
    split: str | None = Field(None, description="Split of the data, such as `train`.")
    config: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    image_key: str | None = Field(None, description="Column with the image, if the usual names do not find it.")
    label_key: str | None = Field(None, description="Column with the label, if the usual names do not find it.")
    weight: AboveZero = Field(1.0, description="How often each image is seen in an epoch; 0.5 is every other epoch.")
    limit: Positive | None = Field(None, description="Use only this many images, evenly spaced.")


class DataSection(Section):
    """Training and evaluation data, and how images become views."""

    train: list[ImagesSection] = Field(min_length=1, description="Sources to train on.")
    eval: list[ImagesSection] = Field([], description="Sources to evaluate on.")
    views: list[Augmentation] = Field(
        [Augmentation()], min_length=1, description="Augmentations of an image: one, or a weak and a strong one."
    )
    erasing: Erasing = Field(Erasing(), description="Random erasing of views.")
    mixing: Mixing = Field(Mixing(), description="Mixup and CutMix of views.")
    repeats: Positive = Field(1, description="Times that each image occurs in a step, augmented differently each time.")
    fixed_views: NotNegative = Field(
        0, description="Number of different views of an image, shown in turn by epoch; 0 makes new ones in every epoch."
    )
    roots: list[str] = Field([], description="The only folders that images are read from; by default any.")
    max_pixels: Positive = Field(89_478_485, description="Largest image, in pixels; larger ones are bad samples.")
    bad_samples: Literal["skip", "fail"] = Field("skip", description="What to do with an image that cannot be used.")
    max_bad: Fraction = Field(0.5, description="The run ends when it leaves out a larger share of its images.")
    workers: NotNegative = Field(4, description="Processes that decode and augment images, of each rank.")
    prefetch: Positive = Field(2, description="Steps that are prepared ahead.")


class OptimizerSection(Section):
    """An optimizer and a schedule, by timm's names; epochs may be fractions."""

    # Milestones need the schedule ``multistep``.
    replaces = {"schedule": ("milestones",)}

    name: str = Field("sgd", description="A name of `timm.optim`: `sgd` has Nesterov momentum, `momentum` does not.")
    lr: AboveZero = Field(0.1, description="Highest learning rate.")
    weight_decay: AtLeastZero = Field(1e-4, description="Weight decay.")
    momentum: Fraction = Field(0.9, description="Momentum of optimizers that have one.")
    decay: Literal["weights", "all"] = Field(
        "weights",
        description="Parameters that decay: `weights` leaves out biases and norms, `all` includes them and the "
        "losses' own.",
    )
    layer_decay: AboveZero | None = Field(
        None, description="Factor on the learning rate from each layer to the one before it; by default 1."
    )
    schedule: Literal["cosine", "multistep", "step", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_epochs: AtLeastZero = Field(0.0, description="Epochs over which the learning rate rises from `warmup_lr`.")
    warmup_lr: AtLeastZero = Field(1e-5, description="Learning rate at the start of the warm-up.")
    min_lr: AtLeastZero = Field(0.0, description="Lowest learning rate, at the end of `cosine`.")
    milestones: list[AboveZero] = Field(
        [], description="Epochs after which the learning rate is multiplied by `decay_rate`, for `multistep`."
    )
    decay_epochs: AboveZero = Field(
        30.0, description="Epochs between multiplications of the learning rate by `decay_rate`, for `step`."
    )
    decay_rate: AboveZero = Field(0.1, description="Factor on the learning rate, for `multistep` and `step`.")
    max_grad_norm: AboveZero | None = Field(None, description="Clip the gradient to this norm; by default not at all.")
    options: dict[str, Any] = Field({}, description="Further arguments of the optimizer.")

    @model_validator(mode="after")
    def _steps_are_named(self) -> OptimizerSection:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("milestones and schedule: multistep belong together; give both or neither")
        return self


class ClassifierTrainingSection(TrainingSection):
    """What differs from the VLM path."""

    batch_size: Positive = Field(256, description="Images in an optimizer step, over all ranks.")
    dtype: DType = Field("fp32", description="Precision of the forward; `bf16` is autocast, weights stay in float32.")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of a moving average of the weights, which becomes the student; by default none."
    )
    gather: bool = Field(False, description="Let losses that compare the images of a batch see those of all ranks.")
    channels_last: bool = Field(False, description="Keep images and weights in channels-last memory.")
    compile: bool = Field(False, description="Compile student and teacher with `torch.compile`.")


class EvaluationSection(Section):
    """What is evaluated, and when."""

    every_epochs: AboveZero | None = Field(None, description="Epochs between evaluations; by default only at the end.")
    limit: Positive | None = Field(None, description="Images of each source while training; all of them at the end.")
    batch_size: Positive = Field(256, description="Images in a forward pass on a rank.")
    teacher: bool = Field(True, description="Evaluate the teacher, too, at the end.")
    best: str | None = Field(None, description="Data whose top-1 accuracy chooses the best student kept.")

    @model_validator(mode="after")
    def _best_of_several(self) -> EvaluationSection:
        if self.best is not None and self.every_epochs is None:
            raise ValueError("best chooses among evaluations while training; say how often they are (every_epochs)")
        return self


class ClassifierDeepSpeedSection(DeepSpeedSection):
    """ZeRO is off by default: classifiers are small."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="What ZeRO shards: nothing (0), optimizer states (1), gradients too (2), parameters too (3)."
    )


class ClassifierConfig(Section):
    """A run that trains an image classifier."""

    student: StudentSection = Field(description="The classifier that is trained.")
    teacher: TeacherSection | None = Field(
        None, description="The classifier to learn from; without it, only losses that need no teacher."
    )
    loss: list[ClassifierLossSection] = Field(min_length=1, description="Terms of the loss.")
    data: DataSection = Field(description="Training and evaluation data.")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="Optimizer and learning-rate schedule.")
    training: ClassifierTrainingSection = Field(description="Length, batch, precision and bookkeeping.")
    deepspeed: ClassifierDeepSpeedSection = Field(
        ClassifierDeepSpeedSection(), description="ZeRO, and DeepSpeed's own keys."
    )
    evaluation: EvaluationSection = Field(EvaluationSection(), description="What is evaluated, and when.")
    output: str = Field(description="Folder of the run.")

    @model_validator(mode="after")
    def _one_voice(self) -> ClassifierConfig:
        deepspeed_keys.check_equal(self.deepspeed.extra, deepspeed_keys.set_by_run(self, autocast=True))
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> ClassifierConfig:
        check_losses(self.loss, REGISTRY, has_teacher=self.teacher is not None)
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
