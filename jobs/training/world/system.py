"""Everything between text, pictures and videos of a world model, which training and sampling share.

pixels ─ VQ autoencoder ─ codes ─┐
text ─ tokenizer ────────────────┴─ layout ─ network ─ draws ─ codes, text ─ pixels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.training.data.pixels import to_bytes, to_unit
from jobs.training.distributed import device_of
from jobs.training.exported import Trained, load_model, longest_average
from jobs.training.parallelize import make
from jobs.training.paths import as_written
from jobs.training.recipe_core import Bucket
from jobs.training.world.documents import layout_of, tokenizer_of
from jobs.training.world.recipe import Drawing, WorldRecipe
from models.attention import choose_kernel
from models.autoencoders import vq
from models.language import world
from models.language.generate import TEXT, Parts, Sampling, frames, write
from models.language.layout import Layout
from models.language.world import World
from models.measures.features import weights_hash

AT_ONCE = 64  # frames that become codes, or pictures, together
LONGEST = 256  # tokens of a text that is written
MARKS = 2  # <eof> and <eov>


@dataclass
class WorldSystem:
    """Made by `build_world` or `load_world`. vq: frozen; None of a model of text alone.

    made_of: what `models.language.world.build` takes. tokenizer: its files; None: bytes.
    """

    recipe: WorldRecipe
    vq: vq.VQ | None
    layout: Layout
    model: World
    device: torch.device
    made_of: dict[str, Any]
    tokenizer: Mapping[str, str] | None = None
    step: int = 0
    ema: float = 0.0

    @torch.no_grad()
    def encode(self, pixels: Tensor, clips: Sequence[int]) -> Tensor:
        """uint8 [F, 3, H, W] of clips of so many frames each → codes int64 [F', frame], clip after clip."""
        assert self.vq is not None
        video = to_unit(pixels.to(self.device))
        if self.vq.stride[0] == 1:  # frame by frame, whosever they are
            found = [self.vq.encode(part[:, :, None]).flatten(1) for part in video.split(AT_ONCE)]
        else:
            parts = [clip.transpose(0, 1)[None] for clip in video.split(list(clips))]
            found = [self.vq.encode(part, AT_ONCE)[0].flatten(1) for part in parts]
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N, frame] of a video → uint8 [T, H, W, 3]."""
        assert self.vq is not None
        bucket, (_, y, x) = self.recipe.data.buckets[0], self.vq.stride
        grid = codes.to(self.device).view(1, len(codes), bucket.height // y, bucket.width // x)
        made = [to_bytes(part)[0] for part in self.vq.decode_chunks(grid.split(AT_ONCE, dim=1))]
        return torch.cat(made)

    def frames(self, count: int) -> int:
        """Of codes, of a video of so many frames. Raises ValueError where there is no such video."""
        assert self.vq is not None
        if (count - 1) % self.vq.stride[0]:
            raise ValueError(f"{count} frames: give 1 + a multiple of {self.vq.stride[0]}")
        return 1 + (count - 1) // self.vq.stride[0]

    def draw(
        self,
        prompts: Sequence[Parts],
        count: int,
        seeds: Sequence[int],
        given: Tensor | None = None,
        *,
        first: Drawing | None = None,
        rest: Drawing | None = None,
        model: World | None = None,
    ) -> list[Tensor]:
        """Videos of `count` frames after each prompt, uint8 [T, H, W, 3]; see `models.language.generate.frames`."""
        hows = (first or self.recipe.run.first), (rest or self.recipe.run.rest)
        a, b = (Sampling(how.guidance, how.temperature, how.top_k) for how in hows)
        found = frames(
            model or self.model,
            self.layout,
            prompts,
            self.frames(count),
            seeds,
            given=given,
            first=a,
            rest=b,
        )
        return [self.decode(codes) for codes in found]

    def tell(
        self,
        prompts: Sequence[Parts],
        *,
        most: int = LONGEST,
        how: Sampling = TEXT,
        seed: int = 0,
        model: World | None = None,
    ) -> list[str]:
        """What the model writes after each: prompts begin with codes, as captions of videos do."""
        seeds = [seed + i for i in range(len(prompts))]
        return [text.strip() for text in write(model or self.model, self.layout, prompts, most, seeds, how)]

    @property
    def bucket(self) -> Bucket:
        """The longest that it was trained on."""
        return max(self.recipe.data.buckets, key=lambda b: b.frames)

    def state(self) -> dict[str, Any]:
        """What `load_world` needs beside the weights; plain values."""
        hashed = None if self.vq is None else weights_hash(self.vq)
        return {"trains": "world", "world": self.made_of, "tokenizer": self.tokenizer, "vq_weights": hashed}


def load_vq(folder: str, key: str, device: torch.device) -> vq.VQ:
    """A trained VQ autoencoder, frozen. Raises ValueError, CheckpointError."""
    trained = load_model(Path(folder))
    if "vq" not in trained.state:
        raise ValueError(f"{key} {folder} holds no VQ autoencoder: train one, trains: vq")
    found = vq.build(**trained.state["vq"])
    trained.load_into(found, "vq")
    return found.to(device).requires_grad_(False).eval()


def build_world(
    recipe: WorldRecipe,
    device: torch.device,
    made_on: torch.device | None = None,
    state: dict[str, Any] | None = None,
    captions: Callable[[], list[str]] = list,
) -> WorldSystem:
    """With new weights, those that the recipe begins with or, of a checkpoint's `state`, none that matter.

    Args:
        captions: of the data, for a tokenizer that is trained on them.

    Raises ValueError, CheckpointError or models.hub.MissingModel: one sentence with the fix.
    """
    made_on = made_on or device
    autoencoder, codes, frame = None, 0, 1
    if recipe.vq.path:
        if not (Path(recipe.vq.path) / "model.safetensors").is_file():
            raise ValueError(
                f"vq.path {as_written(recipe.vq.path)} holds no trained VQ autoencoder: make it with "
                f"{recipe.makes_vq}, or say where one is, --set vq.path=FOLDER"
            )
        autoencoder = load_vq(recipe.vq.path, "vq.path", device)
        if state and state["vq_weights"] != weights_hash(autoencoder):
            raise ValueError(
                f"the world model was trained with other weights of its VQ autoencoder than {recipe.vq.path} holds: "
                "name the folder of then as vq.path"
            )
        codes, (_, y, x), bucket = autoencoder.codes, autoencoder.stride, recipe.data.buckets[0]
        if bucket.height % y or bucket.width % x:
            raise ValueError(
                f"data.buckets: {bucket.width}×{bucket.height} pixels do not divide into codes of {x}×{y} pixels"
            )
        frame = (bucket.height // y) * (bucket.width // x)
    before: Trained | None = None
    if recipe.start and not state:
        before = load_model(Path(recipe.start), longest_average(Path(recipe.start)) or None)
        if before.state.get("trains") != "world":
            raise ValueError(f"start {recipe.start} holds no world model: train one, trains: world")
    known = state or (before.state if before else None)
    tokenizer = known["tokenizer"] if known else tokenizer_of(recipe.text, captions)
    layout = layout_of(tokenizer, codes, frame)
    if state:
        made_of = state["world"]
    elif before:
        made_of = begun(recipe, before, layout, codes)
    else:
        made_of = {"words": layout.words, "codes": codes + MARKS if codes else None} | recipe.model.options()
    fresh = {k: v for k, v in made_of.items() if k != "weights"} if state else made_of
    if made_on.type == "meta" and "weights" in fresh:
        raise ValueError("model.weights with compute.parallel fsdp: begin with a folder of training (start)")
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(recipe.seed)
        model = make(partial(world.build, **fresh), made_on)
    if before and made_on.type != "meta":
        model.load_state_dict(before.weights["world"])
    choose_kernel(model, recipe.compute.attention)
    if "weights" in made_of:
        made_of = sizes(model) | {"words": model.embed.num_embeddings, "codes": made_of["codes"]}
    return WorldSystem(recipe, autoencoder, layout, model, device, made_of, tokenizer)


def begun(recipe: WorldRecipe, before: Trained, layout: Layout, codes: int) -> dict[str, Any]:
    """Sizes of the model that a recipe begins with, with its θ. Raises ValueError where they are not its own."""
    found = dict(before.state["world"])
    asked = {"words": layout.words, "codes": codes + MARKS if codes else None} | recipe.model.options()
    for name, value in asked.items():
        if name not in ("theta", "weights") and found.get(name, value) != value:
            raise ValueError(
                f"start {recipe.start} has {name} {found.get(name)}, this recipe {value}: give the same"
            )
    theta = recipe.model.options().get("theta")
    return found | ({"theta": theta} if theta else {})


def sizes(model: World) -> dict[str, Any]:
    """The options that `models.language.world.build` makes such a model of."""
    return {
        "dim": model.embed.embedding_dim,
        "ffn": model.ffn,
        "heads": model.heads,
        "groups": model.groups,
        "head": model.head_width,
        "depth": len(model.blocks),
        "theta": model.theta,
        "eps": model.eps,
        "tied": model.tied,
    }


def load_world(
    folder: str,
    ema: float | None = None,
    device: str | None = None,
    located: Mapping[str, str] | None = None,
) -> WorldSystem:
    """What `clipmill train world` left, ready to be sampled; of a training in stages its last one.

    Args:
        ema: σ_rel of the averaged weights; None the longest, 0 the last weights themselves.
        located: key of the recipe → path, where what it names lies today.

    Raises ValueError, CheckpointError or models.hub.MissingModel: one sentence with the fix.
    """
    path = last_stage(Path(folder))
    length = longest_average(path) if ema is None else ema
    trained = load_model(path, length or None, located)
    if trained.state.get("trains") != "world":
        raise ValueError(f"{folder} holds no world model: give one that 'clipmill train world' wrote")
    recipe = WorldRecipe.model_validate(trained.recipe)
    if recipe.vq.path and not (Path(recipe.vq.path) / "model.safetensors").is_file():
        raise ValueError(
            f"the VQ autoencoder of {folder} is not at {recipe.vq.path}: bring it back, or say where it is, "
            "--locate vq.path=FOLDER"
        )
    found = build_world(recipe, device_of(device), state=trained.state)
    trained.load_into(found.model, "world")
    found.model.eval().requires_grad_(False)
    found.step, found.ema = trained.step, length
    return found


def last_stage(folder: Path) -> Path:
    """OUT/stage-N of a training in stages, the last that has a model; the folder itself where there are none."""
    done = [p for p in folder.glob("stage-*") if (p / "model.safetensors").is_file()]
    return max(done, key=lambda p: int(p.name.partition("-")[2])) if done else folder
