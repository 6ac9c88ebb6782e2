"""The sections ``student`` and ``teacher``: where a model comes from, where its weights are, which parts train."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from .fields import AboveZero, Beta, DType, NotNegative, Part, Positive, Replaces, Section

#: In place of a tokenizer's name: the student uses its teacher's.
TEACHERS = "teacher"


class CutSection(Section):
    """What is kept of the teacher's decoder or vision encoder; a size that is not given stays the teacher's."""

    layers: Positive | Annotated[list[NotNegative], Field(min_length=1)] | None = Field(
        None, description="Layers that are kept: how many, or a list of their numbers, counted from 0."
    )
    by: Literal["spaced", "first", "influence"] = Field(
        "spaced",
        description="Which layers are kept if `layers` is a number: evenly spaced ones, the first ones, or those that "
        "change their input most.",
    )
    neurons: Positive | None = Field(None, description="Neurons of each MLP (`intermediate_size`).")
    heads: Positive | None = Field(
        None, description="Attention heads of each layer; key-value heads stay together with their query heads."
    )
    width: Positive | None = Field(None, description="Hidden size.")

    @property
    def narrows(self) -> bool:
        """Whether a size inside the layers is given."""
        return any(size is not None for size in (self.neurons, self.heads, self.width))

    @model_validator(mode="after")
    def _listed(self) -> CutSection:
        if isinstance(self.layers, list) and sorted(set(self.layers)) != self.layers:
            raise ValueError("layers: list them in ascending order, each once")
        if self.by != "spaced" and not isinstance(self.layers, int):
            raise ValueError("by: chooses a number of layers; set layers to a number, or leave by out")
        return self


class FromTeacherSection(CutSection):
    """What the student keeps of its teacher: of the decoder here, and of the vision encoder in a section of its own."""

    vision_encoder: CutSection | None = Field(None, description="What is kept of the vision encoder: the same keys.")
    calibrate: Positive = Field(
        32, description="Number of training samples by which layers, neurons, heads and channels are chosen."
    )

    @property
    def parts(self) -> dict[str, CutSection]:
        """What is kept, by the part's name."""
        vision = {} if self.vision_encoder is None else {"vision_encoder": self.vision_encoder}
        return {"decoder": self, **vision}


def _named_type(given: Any) -> Any:
    """Return ``{type: teacher}`` for ``teacher``."""
    return {"type": given} if given == TEACHERS else given


class ModelSection(Section):
    """A model: loaded (``path``), assembled from parts (``decoder`` and others), or cut from the teacher."""

    path: str | None = Field(None, description="Folder, or name on the Hub, of a vision-language or language model.")
    vision_encoder: dict[str, Any] | None = Field(
        None, description="Vision encoder of a model assembled from parts: `name`, or `config` for random weights."
    )
    projector: dict[str, Any] | None = Field(
        None, description="Projector between vision encoder and decoder: `type` and its sizes."
    )
    decoder: dict[str, Any] | None = Field(
        None, description="Language model of a model assembled from parts: `name`, or `config` for random weights."
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer of a model assembled from parts; `teacher` takes the teacher's."
    )
    chat_template: str | None = Field(None, description="Chat template: a file, or the template itself.")
    template_arguments: dict[str, Any] = Field(
        {}, description="Arguments of the chat template wherever it is used, such as `{enable_thinking: false}`."
    )
    image: dict[str, Any] = Field(
        {},
        description="Sizes of the image processor, such as `{longest_edge: 512}`; its family decides which can be set.",
    )
    from_teacher: FromTeacherSection | None = Field(
        None, description="Prune the student from the teacher: which layers it keeps, and its sizes."
    )
    dtype: DType | None = Field(None, description="Precision of the weights; by default the run's.")
    attn_implementation: str | None = Field(
        None, description="Attention as Transformers names it: `sdpa`, `eager`, `flash_attention_2`."
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that a model on the Hub brings along.")

    #: Keys that say where the model comes from; a section has exactly one.
    ways: ClassVar[tuple[str, ...]] = ("path", "decoder", "from_teacher")
    replaces: ClassVar[Replaces] = {
        "path": ("decoder", "vision_encoder", "projector", "from_teacher"),
        "decoder": ("path", "from_teacher"),
        "decoder.name": ("decoder.config",),
        "decoder.config": ("decoder.name",),
        "from_teacher": ("path", "decoder", "vision_encoder", "projector"),
    }

    @model_validator(mode="after")
    def _one_way(self) -> ModelSection:
        ways = [name for name in self.ways if getattr(self, name) not in (None, False)]
        if len(ways) != 1:
            found = " and ".join(ways) or "none of them"
            raise ValueError(f"name exactly one of {', '.join(self.ways)} (found {found})")
        return self


class LoraSection(Section):
    """Low-rank adapters on linear layers."""

    rank: Positive = Field(16, description="Rank of the adapters.")
    alpha: AboveZero | None = Field(None, description="Scale of the adapters; by default 2 · rank.")
    dropout: Beta = Field(0.0, description="Dropout in front of the adapters.")
    target: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="Layers that get an adapter: all linear ones, or a list of names."
    )
    parts: Annotated[list[Part], Field(min_length=1)] = Field(
        ["decoder"], description="Parts of the student that get adapters."
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank (rsLoRA) instead of alpha / rank.")
    merge: bool = Field(True, description="Merge the adapters into the exported student; `false` exports the adapter.")


class StudentSection(ModelSection):
    """The student."""

    train: list[Part] | None = Field(
        None, description="Parts trained in full; by default all of them, or none when `lora` is given."
    )
    lora: LoraSection | None = Field(None, description="Low-rank adapters; leave out to train parts in full.")
    quantize: Literal["nf4"] | None = Field(None, description="Keep frozen weights in 4 bits under LoRA (QLoRA).")
    projector: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_named_type, json_schema_input_type=dict[str, Any] | Literal["teacher"] | None),
    ] = Field(
        None,
        description="Projector of a student assembled from parts: `type` and its sizes. `teacher` takes the teacher's, "
        "frozen, with an MLP behind it if the widths differ.",
    )
    vision_cache: str | None = Field(
        None, description="Folder of a frozen vision encoder's features, written by `vlm-distill cache`."
    )

    @property
    def trained_whole(self) -> list[Part]:
        """The parts trained in full."""
        if self.train is not None:
            return self.train
        return list(get_args(Part)) if self.lora is None else []

    @property
    def base(self) -> str | None:
        """The name or folder that an exported adapter would refer to; ``None`` if no such model is on disk."""
        alone = self.decoder is not None and self.vision_encoder is None
        return self.decoder.get("name") if self.decoder is not None and alone else self.path

    @model_validator(mode="after")
    def _frozen_vision(self) -> StudentSection:
        adapted = [] if self.lora is None else self.lora.parts
        if self.vision_cache is not None and "vision_encoder" in [*self.trained_whole, *adapted]:
            raise ValueError(
                "vision_cache: features change while the vision encoder trains; leave it out of train and lora.parts"
            )
        return self

    @model_validator(mode="after")
    def _lora(self) -> StudentSection:
        if self.lora is None:
            if self.quantize is not None:
                raise ValueError("quantize: 4-bit weights cannot be trained; add lora, or leave quantize out")
            return self
        both = [part for part in self.trained_whole if part in self.lora.parts]
        if both:
            raise ValueError(f"train and lora.parts both name the {both[0]}; train it in full or by LoRA, not both")
        if not self.lora.merge:
            if self.base is None:
                raise ValueError("lora.merge: an adapter refers to a base on disk, and there is none; give its path")
            if "decoder" in self.trained_whole:
                raise ValueError("lora.merge: an adapter cannot hold a decoder trained in full; set lora.merge to true")
        elif self.quantize is not None:
            raise ValueError(
                "quantize: adapters cannot be merged into 4-bit weights; set lora.merge to false (export merges them)"
            )
        return self


class CacheSection(Section):
    """A folder of teacher outputs at supervised tokens."""

    folder: str = Field(description="Folder that `vlm-distill cache` fills.")
    form: Literal["hidden", "topk", "token"] = Field(
        "hidden",
        description="What is kept of each token: the last hidden state, the `k` likeliest tokens, or with `token` its "
        "own log-probability alone.",
    )
    k: Positive = Field(64, description="Number of tokens kept with `form: topk`.")

    @property
    def likeliest(self) -> int | None:
        """Number of likeliest tokens kept, 0 if only a token's own probability is; ``None`` if nothing is lost."""
        return {"hidden": None, "topk": self.k, "token": 0}[self.form]


class ServerSection(Section):
    """An OpenAI-compatible server that scores and answers for the teacher."""

    url: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Base URL of the server's API, such as `http://host:8000/v1`, or a list of several servers'."
    )
    model: str | None = Field(None, description="The model's name on the server; by default the teacher's path.")
    form: Literal["hidden", "topk", "token"] = Field(
        "topk",
        description="What is asked for at each position: the last hidden state (vLLM's pooling runner), the "
        "`top_logprobs` likeliest tokens, or (`token`) the answer's own token alone.",
    )
    embed_dtype: DType = Field(
        "fp32", description="Precision in which hidden states are sent; `bf16` loses nothing if the server uses it."
    )
    top_logprobs: Positive = Field(20, description="Number of likeliest tokens asked for with `form: topk`.")
    workers: Positive = Field(16, description="Requests that a rank sends at once.")
    timeout: Positive = Field(300, description="Seconds that one request may take.")


class BlurSection(Section):
    """Images that the teacher sees blurred."""

    blur: AboveZero = Field(description="Radius of a Gaussian blur, in pixels.")


class DownsampleSection(Section):
    """Images that the teacher sees coarsely."""

    downsample: Annotated[float, Field(gt=1)] = Field(
        description="Factor by which images are shrunk and then enlarged again; the tokens stay as many."
    )


class ViewSection(Section):
    """What the teacher sees of a sample in training, where the student sees something else."""

    system: str | None = Field(None, description="System message, in place of the sample's own.")
    question: str | None = Field(
        None,
        description="Template of questions: `{question}` is the sample's own, `{answer}` (optional) the right answer.",
    )
    images: Literal["same", "full", "none"] | BlurSection | DownsampleSection = Field(
        "same",
        description="Images: the `same`, `full` (without `student.image`; with `from_student`), `none`, or worse: "
        "`{blur: 8}`, `{downsample: 4}`.",
    )

    @model_validator(mode="after")
    def _template(self) -> ViewSection:
        if self.question is not None and self.question.count("{question}") != 1:
            raise ValueError("question: must hold {question} exactly once, where the sample's own question goes")
        if (self.system, self.question, self.images) == (None, None, "same"):
            raise ValueError("changes nothing; set system, question or images, or leave view out")
        return self


class TeacherSection(ModelSection):
    """The teacher."""

    ways: ClassVar[tuple[str, ...]] = ("path", "decoder", "from_student")
    replaces: ClassVar[Replaces] = {
        "path": ("decoder", "vision_encoder", "projector", "from_student", "ema"),
        "decoder": ("path", "from_student", "ema", "server"),
        "decoder.name": ("decoder.config",),
        "decoder.config": ("decoder.name",),
        "from_student": (*ModelSection.model_fields, "server", "placement", "quantize", "cache"),
        "server": ("dtype", "attn_implementation", "placement", "quantize", "cache", "from_student", "ema"),
        "cache": ("server",),
        "placement": ("server", "quantize"),
        "quantize": ("server", "placement"),
    }
    server: ServerSection | None = Field(
        None, description="Server that runs the teacher; only tokenizer and image processor of `path` are read here."
    )
    from_student: bool = Field(
        False, description="Learn from the student as it was at the start: its base under LoRA, or else a copy."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="With `from_student`: a copy that follows the student as the moving average of its weights."
    )
    placement: Literal["replicate", "shard", "offload"] = Field(
        "replicate",
        description="Where the weights live: whole on every rank, a share on each rank's device, or a share in main "
        "memory, fetched layer by layer.",
    )
    quantize: Literal["int8", "nf4", "fp8"] | None = Field(
        None, description="Keep the weights of linear layers in fewer bits."
    )
    cache: CacheSection | None = Field(
        None, description="Train from outputs that `vlm-distill cache` wrote; the teacher is not loaded."
    )
    view: ViewSection | None = Field(
        None, description="What the teacher sees of a sample in training, if not what the student sees."
    )

    @model_validator(mode="after")
    def _cached(self) -> TeacherSection:
        if self.cache is not None and self.path is None and not self.from_student:
            raise ValueError("cache: a cache records its teacher by path; save the teacher, and name its folder")
        return self

    @model_validator(mode="after")
    def _own_weights(self) -> TeacherSection:
        if self.from_teacher is not None:
            raise ValueError("from_teacher is for the student; a teacher has a path, or parts")
        more = sorted(self.model_fields_set - {"from_student", "ema", "view"})
        if self.from_student and any(getattr(self, name) != type(self).model_fields[name].default for name in more):
            raise ValueError(f"from_student is the student itself; leave {', '.join(more)} out")
        if self.ema is not None and not self.from_student:
            raise ValueError(
                "ema: averages the student's weights, so it needs from_student; add that, or leave ema out"
            )
        if self.quantize is not None and self.placement != "replicate":
            raise ValueError(f"quantize: ZeRO-3 cannot {self.placement} quantized weights; use placement: replicate")
        return self

    @model_validator(mode="after")
    def _served(self) -> TeacherSection:
        if self.server is None:
            return self
        if self.path is None:
            raise ValueError("server: give the teacher's path too; its tokenizer and image processing are read here")
        if self.server.embed_dtype != "fp32" and self.server.form != "hidden":
            raise ValueError("server.embed_dtype: is for form: hidden; leave it out")
        if self.image:
            raise ValueError("server: images are resized on the server; leave image out, and set their sizes there")
        here = [key for key in ("dtype", "attn_implementation") if getattr(self, key) is not None]
        here += ["placement"] if self.placement != "replicate" else []
        here += [key for key in ("quantize", "cache") if getattr(self, key) is not None]
        if here:
            raise ValueError(f"server: the teacher's weights are on the server; leave {', '.join(here)} out")
        return self
