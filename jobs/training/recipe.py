"""A training recipe: what is trained, on what, how; YAML checked before any work, like a curation recipe.

Bundled ones lie in recipes/training. A checkpoint keeps its recipe; a resumed run must have the same, apart
from `run` (steps, how often to save and look).
"""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from pipeline.caption.structured import told
from pipeline.recipe import RECIPES, Recipe, load
from pipeline.recipe_file import bases, bundled, load_as
from pipeline.recipe_schema import MAYBE_PATH, PATH, RecipeError, Section, nearest

TRAINING = RECIPES / "training"


class Bucket(Section):
    """A shape that batches have."""

    frames: int = Field(16, ge=1, description="frames of the clip; 1: pictures")
    height: int = Field(64, ge=8, description="pixels")
    width: int = Field(64, ge=8, description="pixels")


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
    workers: int = Field(1, ge=0, description="processes that decode")


class DiffusionData(Data):
    """What a diffusion model sees of the clips."""

    pack: bool = Field(
        False,
        description="clips and pictures of all buckets share a micro-batch of `tokens`, as one sequence",
    )
    images: int = Field(0, ge=0, description="independent images beside each clip (Ho et al. 2022: 4 to 8)")
    stills: int = Field(0, ge=0, description="micro-batches of single frames before the first of clips")
    cache: str | None = Field(
        None,
        description="folder of `clipmill encode`: latents and text, no decoding",
        json_schema_extra=PATH,
    )

    @model_validator(mode="after")
    def _whole_steps(self) -> DiffusionData:
        """A step is of stills or of clips: with both, ranks would pass through the model unequally often."""
        if rest := self.stills % self.micro_batches:
            less, more = self.stills - rest, self.stills - rest + self.micro_batches
            raise ValueError(
                f"stills: {self.stills} micro-batches are no whole number of steps of {self.micro_batches} "
                f"(micro_batches): give {less} or {more}"
            )
        return self

    @model_validator(mode="after")
    def _packed(self) -> DiffusionData:
        for name in ("batch", "images"):
            if self.pack and getattr(self, name):
                raise ValueError(
                    f"{name}: packed micro-batches hold what `tokens` do: leave it out, or set pack to false"
                )
        return self


class Autoencoder(Section):
    """Pixels to latents, frozen while a diffusion model trains."""

    kind: Literal["none", "dct", "vae", "diffusers"] = Field("dct", description="none: the model sees pixels")
    path: str | None = Field(
        None, description="vae: a checkpoint; diffusers: a folder or hub id", json_schema_extra=MAYBE_PATH
    )
    patch: int = Field(8, ge=1, description="dct: side of a block, pixels")
    keep: int = Field(8, ge=1, description="dct: coefficients kept a colour")


class Text(Section):
    """Captions to features."""

    kind: Literal["none", "words", "transformers", "diffusers"] = Field(
        "words",
        description="words: hashed words, no weights needed; diffusers: a pipeline's, as its image model reads them",
    )
    model: str | None = Field(
        None,
        description="transformers: folder or hub id of CLIP, T5, Qwen, …; diffusers: folder of a pipeline",
        json_schema_extra=MAYBE_PATH,
    )
    length: int = Field(64, ge=2, description="most tokens")
    width: int = Field(192, ge=8, description="words: features a token")
    depth: int = Field(2, ge=0, description="words: transformer layers, trained along")
    rows: int = Field(8192, ge=2, description="words: of the table that words are hashed into")
    dropout: float = Field(0.1, ge=0, lt=1, description="captions left out, for guidance")


class Model(Section):
    """The network: `models/*/<kind>.py`, whose `build` takes what else is written here."""

    model_config = Section.model_config | {"extra": "allow"}
    PATHS: ClassVar = {"spatial": "maybe", "weights": "maybe"}  # of what `build` takes: a file or folder
    kind: str = Field("dit", description="dit, unet3d, video_ldm or sora; vae; small_vlm")
    preset: str | None = Field(None, description="a name in PRESETS of that file")

    @model_validator(mode="after")
    def _known(self) -> Model:
        try:
            module = import_spec(self.kind)
        except ImportError as e:
            raise ValueError(f"there is no models/*/{self.kind}.py with a build function") from e
        if self.preset is not None and self.preset not in module.PRESETS:
            raise ValueError(f"preset {self.preset!r} of {self.kind} is none of {', '.join(module.PRESETS)}")
        _, *taken = (name for name in inspect.signature(module.build).parameters if name != "text_width")
        types = get_type_hints(module.build.__init__ if inspect.isclass(module.build) else module.build)
        given = self.__pydantic_extra__ or {}
        for name, value in given.items():
            if name not in taken:
                raise ValueError(f"{self.kind} takes no {name!r}; it takes {', '.join(taken)}")
            given[name] = _option(name, value, types[name])
        return self

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `build`: those of the preset, then what is written here."""
        preset = import_spec(self.kind).PRESETS[self.preset] if self.preset else {}
        return preset | (self.__pydantic_extra__ or {})


LEVELS = ("attention", "time")  # options that name levels of a U-Net, the first of which is 0


def _option(name: str, value: Any, annotation: Any) -> Any:
    """A network's option as its `build` wants it. Raises ValueError."""
    try:
        found = TypeAdapter(annotation).validate_python(value)
    except ValidationError as e:
        raise ValueError(f"{name} is {value!r}: {e.errors()[0]['msg'].lower()}") from e
    for x in found if isinstance(found, list | tuple) else [found]:
        number = isinstance(x, int | float) and not isinstance(x, bool)
        if number and not (0 < x < math.inf or (x == 0 and name in LEVELS)):
            raise ValueError(f"{name} is {value!r}: give numbers above 0")
    return found


NETWORKS = ("denoisers", "autoencoders", "language")  # folders of models/ with a file a kind


def import_spec(kind: str) -> Any:
    """models/*/<kind>.py. Raises ImportError where no such file has a network that a recipe can name."""
    for folder in NETWORKS:
        if kind.isidentifier() and find_spec(f"models.{folder}.{kind}"):
            module = import_module(f"models.{folder}.{kind}")
            if hasattr(module, "build") and hasattr(module, "PRESETS"):
                return module
    raise ImportError(kind)


class Objective(Section):
    """What is predicted, at which noise, weighted how (`models/diffusion`: noise, objective)."""

    schedule: Literal["cosine", "linear", "scaled_linear", "flow"] = Field(
        "flow", description="of noise over time; scaled_linear: Stable Diffusion's"
    )
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0,
        description="flow: t′ = s t / (1 + (s − 1) t), auto: s by each sample's frames and size; cosine: SNR × 1/s²",
    )
    prediction: Literal["eps", "x", "v", "flow"] = Field(
        "flow", description="what the network says: noise, picture, v or velocity"
    )
    weighting: Literal["uniform", "min_snr", "uncertainty"] = Field(
        "uniform", description="of the loss over noise levels"
    )
    min_snr_gamma: float = Field(
        5.0, gt=0, description="of weighting min_snr: the SNR from which on weights are cut"
    )
    times: Literal["uniform", "logit_normal"] = Field("uniform", description="which t are trained on")
    pure_noise: float = Field(0.0, ge=0, lt=1, description="share at t = 1, where the text says all there is")

    @model_validator(mode="after")
    def _shiftable(self) -> Objective:
        if self.shift != 1 and self.schedule in ("linear", "scaled_linear"):
            raise ValueError(f"shift {self.shift}: schedule {self.schedule} has none; leave it at 1")
        if self.shift == "auto" and self.schedule != "flow":
            raise ValueError(f"shift auto is of schedule flow: give {self.schedule} a number")
        return self


class Tasks(Section):
    """Chances that a sample is trained on with known frames (the rest: text → video)."""

    first_frame: float = Field(0.0, ge=0, le=1, description="image → video")
    prediction: float = Field(0.0, ge=0, le=1, description="the first 1 or 2 latent frames are known")
    interpolation: float = Field(0.0, ge=0, le=1, description="every `stride`-th frame is known")
    stride: int = Field(4, ge=2, description="of interpolation")
    upsampling: int = Field(0, ge=0, description="factor of super-resolution; 0: none")

    @model_validator(mode="after")
    def _sum(self) -> Tasks:
        if self.first_frame + self.prediction + self.interpolation > 1:
            raise ValueError("the chances of first_frame, prediction and interpolation sum to more than 1")
        return self


class VAELoss(Section):
    """What an autoencoder is trained for, and from where."""

    channels: int = Field(16, ge=1, description="of the latents")
    train: Literal["all", "decoder"] = Field("all", description="decoder: the encoder is frozen (Video LDM)")
    image: str | None = Field(
        None,
        description="start from this image VAE of the same widths: a folder that clipmill train wrote",
        json_schema_extra=PATH,
    )
    kl: float = Field(1e-6, ge=0, description="weight of the KL in nats, per pixel value as the L1 loss is")
    perceptual: Literal["none", "efficientnet_lite0", "vgg16"] = Field(
        "efficientnet_lite0", description="the network of the perceptual distance"
    )
    perceptual_weight: float = Field(
        0.1, ge=0, description="1 with LPIPS' heads; without them each of five layers adds up to 4"
    )
    perceptual_file: str | None = Field(
        None, description="vgg16: torchvision's weights", json_schema_extra=PATH
    )
    perceptual_heads: str | None = Field(
        None, description="vgg16: LPIPS' linear heads; null: all channels weigh 1", json_schema_extra=PATH
    )
    adversarial: float = Field(0.5, ge=0, description="weight of the discriminator; 0: none")
    adversarial_start: int = Field(10_000, ge=0, description="the step from which it judges and learns")
    discriminator_width: int = Field(64, ge=8, description="features of its first layer")


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


class Run(Section):
    """How long, and how often to save and to look. A resumed run may change these."""

    steps: int = Field(1000, ge=1, description="of the optimizer, all in all")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(3, ge=1, description="checkpoints kept")
    log_every: int = Field(10, ge=1, description="steps between lines of the log")
    sample_every: int = Field(500, ge=0, description="0: never")
    prompts: tuple[str, ...] = Field(
        (),
        description="what to sample, words or JSON records of structured captions; (): captions of the data",
    )
    sampler: str = Field("auto", description="a name in models/diffusion/samplers.py; auto: dpmpp_2m")
    sampler_options: dict[str, float] = Field(
        {}, description="of the sampler: gamma, corrections, delta of ancestral; eta of ddim"
    )
    sample_steps: int = Field(32, ge=1, description="of the sampler")
    spacing: Literal["time", "logsnr"] = Field("time", description="in which the sampler's steps are equal")
    guidance: float = Field(3.0, ge=0, description="classifier-free guidance w of (1 + w) ε_c − w ε_∅")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="noise levels, 0 data and 1 noise, that are guided"
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="how far guidance's gain in contrast is taken back"
    )
    frechet: int = Field(
        0, ge=0, description="videos sampled each time to measure their distance to real ones"
    )
    features: str = Field(
        "efficientnet-lite0", description="the network of that distance (`models.measures.features`)"
    )
    wandb: bool = Field(False, description="log to Weights & Biases too")

    @field_validator("prompts")
    @classmethod
    def _in_words(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(told, prompts))

    def but(self, **given: Any) -> Run:
        """With what is given, but for None, in place of its own. Raises ValueError: one sentence."""
        changed = {name: value for name, value in given.items() if value is not None}
        if changed.get("sampler", self.sampler) != self.sampler:
            changed.setdefault("sampler_options", {})  # they were of another
        try:
            return Run.model_validate(self.model_dump() | changed)
        except ValidationError as e:
            first = e.errors()[0]
            where = "".join(f"{name}: " for name in first["loc"][:1])
            raise ValueError(where + first["msg"].removeprefix("Value error, ")) from e

    @field_validator("frechet")
    @classmethod
    def _enough(cls, frechet: int) -> int:
        if frechet == 1:
            raise ValueError("one video has no distance to others: give 0 for none, or 2 or more")
        return frechet

    @field_validator("features")
    @classmethod
    def _feature_network(cls, features: str) -> str:
        from models.measures.features import check_name

        check_name(features)
        return features

    @field_validator("guidance_interval")
    @classmethod
    def _levels(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError("give two noise levels within 0…1, the lower one first")
        return interval

    @model_validator(mode="after")
    def _sampler(self) -> Run:
        from models.diffusion.samplers import named

        named(self.sampler, self.sampler_options)
        return self


class TrainRecipe(Section):
    """What every trainer's recipe has."""

    name: str = Field(description="of the recipe; that of its file where none is given")
    trains: str = Field("diffusion", description="what is trained: diffusion, vae or vlm")
    seed: int = Field(0, description="of weights, data order and noise")
    data: Data = Field(Data(), description="which clips, in which shape")
    model: Model = Field(description="the network")
    optimizer: Optimizer = Optimizer()
    ema: EMA = EMA()
    compute: Compute = Compute()
    run: Run = Run()


class DiffusionRecipe(TrainRecipe):
    """From a run's shards to a video diffusion model."""

    trains: Literal["diffusion"] = "diffusion"
    start: str | None = Field(
        None,
        description="begin with the averaged weights of this diffusion model: a folder, to fine-tune it",
        json_schema_extra=PATH,
    )
    data: DiffusionData = Field(DiffusionData(), description="which clips, in which shape")
    autoencoder: Autoencoder = Autoencoder()
    text: Text = Text()
    objective: Objective = Objective()
    tasks: Tasks = Tasks()


class VAERecipe(TrainRecipe):
    """From a run's shards to an autoencoder."""

    trains: Literal["vae"] = "vae"
    vae: VAELoss = VAELoss()


class VLMRecipe(TrainRecipe):
    """From a run's shards to a vision-language model."""

    trains: Literal["vlm"] = "vlm"
    caption_bytes: int = Field(64, ge=2, description="of a caption, at most")


KINDS: dict[str, type[TrainRecipe]] = {"diffusion": DiffusionRecipe, "vae": VAERecipe, "vlm": VLMRecipe}


def recipe_of(data: dict[str, Any]) -> TrainRecipe:
    """A recipe from what `model_dump` gave."""
    return KINDS[data["trains"]].model_validate(data)


def load_training(name_or_file: str, overrides: list[str] | None = None) -> TrainRecipe:
    """Raises RecipeError: one sentence with the key, what is wrong, and the fix."""
    return load_as(_kind(name_or_file), name_or_file, overrides, TRAINING)


def _kind(name_or_file: str) -> type[TrainRecipe]:
    """By `trains` of the recipe's file, or of what it is based on."""
    trains = next((data["trains"] for data in bases(name_or_file, TRAINING) if "trains" in data), "diffusion")
    if trains not in KINDS:
        raise RecipeError(
            f"recipe {name_or_file}: trains: {trains!r} is none of {', '.join(KINDS)}{nearest(str(trains), KINDS)}"
        )
    return KINDS[trains]


def load_either(
    name_or_file: str, overrides: list[str] | None = None, training: bool = False
) -> Recipe | TrainRecipe:
    """A recipe for curation or, where only that can be meant or is asked for, for training. Raises RecipeError."""
    if training or is_training(name_or_file):
        return load_training(name_or_file, overrides)
    return load(name_or_file, overrides)


def is_training(name_or_file: str) -> bool:
    """Whether a recipe is one for training: by where its name is found, or by the sections of its file."""
    if not name_or_file.endswith((".yaml", ".yml")) and "/" not in name_or_file:
        names, others = bundled(RECIPES), bundled(TRAINING)
        if name_or_file not in [*names, *others]:
            raise RecipeError(
                f"recipe {name_or_file!r} not found{nearest(name_or_file, [*names, *others])}; name a .yaml file or "
                f"one of {', '.join(names)}, or for training {', '.join(others)}"
            )
        return name_or_file not in names
    training = {key for kind in KINDS.values() for key in kind.model_fields}
    for data in bases(name_or_file, RECIPES):
        if only := data.keys() & (training ^ Recipe.model_fields.keys()):
            return bool(only & training)
        base = str(data.get("base", ""))
        if base in bundled(TRAINING) and base not in bundled(RECIPES):
            return True
        if base in bundled(RECIPES):
            return False
    return False
