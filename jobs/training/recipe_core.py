"""What every trainer's recipe has: data, network, optimizer, averages, how it is computed, how long it runs."""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from pipeline.recipe_schema import PATH, Section
from pipeline.shards.order import Sequential


class Bucket(Section):
    """A shape that batches have."""

    frames: int = Field(16, ge=1, description="frames of the clip; 1: pictures")
    height: int = Field(64, ge=8, description="pixels")
    width: int = Field(64, ge=8, description="pixels")


class Mixed(Section):
    """Another run that is trained on."""

    data: str = Field(description="folder of a run with shards", json_schema_extra=PATH)
    share: float = Field(ge=1e-4, lt=1, description="of the micro-batches, to a ten-thousandth")


class Data(Section):
    """What a trainer sees of the clips."""

    fps: float | None = Field(8.0, gt=0, description="frames a second; null spreads them over the whole clip")
    buckets: tuple[Bucket, ...] = Field(
        (Bucket(),), min_length=1, description="a clip goes to the longest it fills, of the nearest aspect"
    )
    batch: int | None = Field(None, ge=1, description="samples a micro-batch; null: as many as `tokens` hold")
    tokens: int = Field(8192, ge=1, description="latent positions a micro-batch may hold")
    micro_batches: int = Field(
        1,
        ge=1,
        description="micro-batches a step, shared by all processes: a step is the same on any number of them",
    )
    captions: Literal["chosen", "sample", "fields"] = Field(
        "chosen",
        description="sample: any of the candidates, by chance; fields: some, in some order, of the structured one",
    )
    mixture: tuple[Mixed, ...] = Field(
        (),
        description="other runs to train on, each with its share; the one that is named to train has the rest",
    )
    workers: int = Field(1, ge=0, description="processes that decode")
    shuffle: Literal["full", "shards"] = Field(
        "full", description="shards: clips that lie together are read in one request, for object stores"
    )
    together: int = Field(16, ge=1, description="shuffle shards: clips a request")
    window: int = Field(
        256, ge=1, description="shuffle shards: clips shuffled with one another, of each bucket and stream"
    )
    streams: int = Field(
        16, ge=1, description="shuffle shards: parts read side by side, a multiple of processes × workers"
    )

    def sequential(self) -> Sequential | None:
        return Sequential(self.together, self.window, self.streams) if self.shuffle == "shards" else None

    @field_validator("mixture")
    @classmethod
    def _leaves_some(cls, mixture: tuple[Mixed, ...]) -> tuple[Mixed, ...]:
        if (taken := sum(mixed.share for mixed in mixture)) > 1 - 1e-4:
            raise ValueError(f"the shares add up to {taken:g}: leave some for the run that is named to train")
        return mixture

    def shares(self) -> list[float]:
        """Of each run: the one that is named to train, then those of the mixture."""
        others = [mixed.share for mixed in self.mixture]
        return [round(1 - sum(others), 9), *others]


class Model(Section):
    """The network: `models/*/<kind>.py`, whose `build` takes what else is written here."""

    model_config = Section.model_config | {"extra": "allow"}
    PATHS: ClassVar = dict.fromkeys(
        ("spatial", "weights", "tower", "video_tower", "language"), "maybe"
    )  # of what `build` takes: a file or folder
    kind: str = Field(
        "dit", description="dit, unet3d, video_ldm or sora; vae; vq; llava, qwen_vl; world; vivit"
    )
    preset: str | None = Field(None, description="a name in PRESETS of that file")

    @model_validator(mode="after")
    def _known(self) -> Model:
        try:
            module = import_spec(self.kind)
        except ImportError as e:
            raise ValueError(f"there is no models/*/{self.kind}.py with a build function") from e
        if self.preset is not None and self.preset not in module.PRESETS:
            raise ValueError(f"preset {self.preset!r} of {self.kind} is none of {', '.join(module.PRESETS)}")
        built = inspect.signature(module.build).parameters
        _, *taken = (name for name in built if name != "text_width")
        types = get_type_hints(module.build.__init__ if inspect.isclass(module.build) else module.build)
        given = self.__pydantic_extra__ or {}
        for name, value in given.items():
            if name not in taken:
                raise ValueError(f"{self.kind} takes no {name!r}; it takes {', '.join(taken)}")
            given[name] = _option(name, value, types[name], built[name].default == 0)
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `build`: those of the preset, then what is written here."""
        preset = import_spec(self.kind).PRESETS[self.preset] if self.preset else {}
        return preset | (self.__pydantic_extra__ or {})


LEVELS = ("attention", "time")  # options that name levels of a U-Net, the first of which is 0
COUNTED = ("layer",)  # options that may count from the end


def _option(name: str, value: Any, annotation: Any, off: bool) -> Any:
    """A network's option as its `build` wants it. Args: off: it may be 0. Raises ValueError."""
    try:
        found = TypeAdapter(annotation).validate_python(value)
    except ValidationError as e:
        raise ValueError(f"{name} is {value!r}: {e.errors()[0]['msg'].lower()}") from e
    for x in found if isinstance(found, list | tuple) else [found]:
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if number and not (0 < x < math.inf or (x == 0 and (off or name in LEVELS)) or name in COUNTED):
            raise ValueError(f"{name} is {value!r}: give numbers above 0")
    return found


NETWORKS = ("denoisers", "autoencoders", "language", "encoders")  # folders of models/ with a file a kind


def import_spec(kind: str) -> Any:
    """models/*/<kind>.py. Raises ImportError where no such file has a network that a recipe can name."""
    for folder in NETWORKS:
        if kind.isidentifier() and find_spec(f"models.{folder}.{kind}"):
            module = import_module(f"models.{folder}.{kind}")
            if hasattr(module, "build") and hasattr(module, "PRESETS"):
                return module
    raise ImportError(kind)


class Optimizer(Section):
    """AdamW."""

    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW: decay of its two running means")
    weight_decay: float = Field(
        0.0, ge=0, description="of AdamW; of matrices alone, not of norms, biases, gates and embeddings"
    )
    rates: dict[str, float] = Field(
        {}, description="part of the network, as its parameters' names begin → a learning rate of its own"
    )
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine", "linear"] = Field("constant", description="until step `decay_until`")
    decay_until: int | None = Field(
        None,
        ge=1,
        description="the step after which the rate is 0, of another decay than constant; null: run.steps",
    )
    clip: float = Field(1.0, gt=0, description="of the gradient's norm, once a step")


class EMA(Section):
    """Averages of the weights with power-function profiles (Karras et al. 2024, sec. 3)."""

    lengths: tuple[float, ...] = Field(
        (0.05, 0.1), description="σ_rel: width of the average as a share of training; () turns it off"
    )

    @field_validator("lengths")
    @classmethod
    def _range(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < x < 0.28 for x in lengths):
            raise ValueError("σ_rel lies between 0 and 0.28")
        return lengths


ActivationCheckpointing = Literal["none", "selective", "full"]


class Compute(Section):
    """How the steps are computed."""

    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, weights stay in fp32")
    activation_checkpointing: ActivationCheckpointing = Field(
        "none",
        description="what the backward pass computes again of a block: full, all; selective, all but matrix products, "
        "convolutions and attention",
    )
    compile: bool = Field(False, description="torch.compile of the repeated blocks, each as one graph")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="fsdp: the weights are sharded over the GPUs")
    attention: Literal["auto", "plain", "sdpa", "math", "efficient", "flash", "cudnn", "flex"] = Field(
        "auto", description="which kernel, see models/attention.py"
    )
    context: int = Field(
        1,
        ge=1,
        description="processes that share each sequence, a part each (ring attention); world models only",
    )


# Of recipes whose trainers keep clips apart to measure themselves on, each with a default of its own.
HeldOut = Annotated[
    float, Field(ge=0, lt=1, description="share of the sources whose clips are not trained on, but measured")
]
Measured = Annotated[int, Field(ge=1, description="clips of those, at most, each time")]


class Run(Section):
    """How long, and how often to save and to look. A resumed run may change these."""

    steps: int = Field(1000, ge=1, description="of the optimizer, all in all")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(3, ge=1, description="checkpoints kept")
    log_every: int = Field(10, ge=1, description="steps between lines of the log")
    sample_every: int = Field(500, ge=0, description="steps between looks at what it can do; 0: never")
    wandb: bool = Field(False, description="log to Weights & Biases too")


class TrainRecipe(Section):
    """What every trainer's recipe has."""

    SPLITS_SEQUENCES: ClassVar = False  # whether its trainer can share a sequence between processes

    name: str = Field(description="of the recipe; that of its file where none is given")
    trains: str = Field(
        "diffusion", description="what is trained: diffusion, vae, vq, vlm, world, vivit or selector"
    )
    seed: int = Field(0, description="of weights, data order and noise")
    data: Data = Field(Data(), description="which clips, in which shape")
    model: Model = Field(description="the network")
    optimizer: Optimizer = Optimizer()
    ema: EMA = EMA()
    compute: Compute = Compute()
    run: Run = Run()

    @model_validator(mode="after")
    def _sequences(self) -> TrainRecipe:
        if self.compute.context > 1 and not self.SPLITS_SEQUENCES:
            raise ValueError(
                f"compute.context: trains {self.trains} does not share sequences between processes: give 1"
            )
        return self


class LoRA(Section):
    """Low-rank adapters, trained in place of the network's weights, which stay as they are (Hu et al. 2021)."""

    rank: int = Field(16, ge=1, description="of what is added to a layer's weight")
    alpha: float = Field(16.0, gt=0, description="what is added is scaled by alpha ÷ rank")
    targets: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="linear layers, by the ends of their names; auto: those of attention and feed-forward",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what adapters see")

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if targets != "auto" and (not targets or "" in targets):
            raise ValueError("give auto, or the ends of linear layers' names")
        return targets
