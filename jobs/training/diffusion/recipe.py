"""What a diffusion model's recipe has beside the core."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from jobs.training.recipe_core import Data, LoRA, Mixed, Run, TrainRecipe
from pipeline.caption.structured import told
from pipeline.recipe_schema import MAYBE_PATH, PATH, Section

CACHE = "folder of `clipmill encode`: latents and text, no decoding"


class DiffusionMixed(Mixed):
    cache: str | None = Field(None, description=CACHE, json_schema_extra=PATH)


class DiffusionData(Data):
    """What a diffusion model sees of the clips."""

    mixture: tuple[DiffusionMixed, ...] = Field((), description=Data.model_fields["mixture"].description)

    pack: bool = Field(
        False,
        description="clips and pictures of all buckets share a micro-batch of `tokens`, as one sequence",
    )
    images: int = Field(0, ge=0, description="independent images beside each clip (Ho et al. 2022: 4 to 8)")
    stills: int = Field(0, ge=0, description="micro-batches of single frames before the first of clips")
    cache: str | None = Field(None, description=CACHE, json_schema_extra=PATH)

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
    def _all_cached_or_none(self) -> DiffusionData:
        for mixed in self.mixture:
            if bool(mixed.cache) != bool(self.cache):
                without = mixed.data if self.cache else "the run that is named to train"
                raise ValueError(
                    f"mixture: {without} has no cache: give each run one of its own, or none any"
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
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of encoding; bf16: autocast, weights stay in fp32: latents err by some 2 % of their spread, "
        "see bench/results/frozen.md",
    )

    @model_validator(mode="after")
    def _exact(self) -> Autoencoder:
        if self.precision != "fp32" and self.kind in ("none", "dct"):
            raise ValueError(
                f"precision {self.precision}: kind {self.kind} costs next to nothing: leave it out"
            )
        return self


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
    prediction: float = Field(
        0.0, ge=0, le=1, description="the first latent frames are known, 1 to `context` of them"
    )
    context: int = Field(2, ge=1, description="most known frames of prediction")
    interpolation: float = Field(0.0, ge=0, le=1, description="every `stride`-th frame is known")
    stride: int = Field(4, ge=2, description="of interpolation")
    upsampling: int = Field(0, ge=0, description="factor of super-resolution; 0: none")

    @model_validator(mode="after")
    def _sum(self) -> Tasks:
        if self.first_frame + self.prediction + self.interpolation > 1:
            raise ValueError("the chances of first_frame, prediction and interpolation sum to more than 1")
        return self


class DiffusionRun(Run):
    """And what is sampled whenever it is looked at."""

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

    @field_validator("prompts")
    @classmethod
    def _in_words(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(told, prompts))

    def but(self, **given: Any) -> DiffusionRun:
        """With what is given, but for None, in place of its own. Raises ValueError: one sentence."""
        changed = {name: value for name, value in given.items() if value is not None}
        if changed.get("sampler", self.sampler) != self.sampler:
            changed.setdefault("sampler_options", {})  # they were of another
        try:
            return DiffusionRun.model_validate(self.model_dump() | changed)
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
    def _sampler(self) -> DiffusionRun:
        from models.diffusion.samplers import named

        named(self.sampler, self.sampler_options)
        return self


class DiffusionRecipe(TrainRecipe):
    """From a run's shards to a video diffusion model."""

    trains: Literal["diffusion"] = "diffusion"
    start: str | None = Field(
        None,
        description="begin with the averaged weights of this diffusion model: a folder, to fine-tune it",
        json_schema_extra=PATH,
    )
    lora: LoRA | None = Field(None, description="train adapters alone; null: all weights")
    data: DiffusionData = Field(DiffusionData(), description="which clips, in which shape")
    autoencoder: Autoencoder = Autoencoder()
    text: Text = Text()
    objective: Objective = Objective()
    tasks: Tasks = Tasks()
    run: DiffusionRun = DiffusionRun()
