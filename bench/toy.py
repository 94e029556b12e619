"""Tasks with known frames on the small world of `clipmill toy`, against its laws of motion.

  python bench/toy.py extend TOLD       8 true frames → 32: does every object go on as the law says?
  python bench/toy.py interpolate TOLD  every 4th frame → all of them
  python bench/toy.py join PLAIN        4 frames → 8 by a model that was never told frames: reconstruction
                                        guidance at several weights against replacement

TOLD is a model trained with known frames (recipe toy-frames), PLAIN one without (recipe toy). A video whose
objects cannot be read is counted as failed, not left out of the counts. Lengths are in pixels of 32.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import torch

from jobs.training.data.pixels import to_unit
from jobs.training.diffusion.build import load_trained
from jobs.training.diffusion.system import System
from models.diffusion.generate import extend, interpolate, with_known
from pipeline.toy.reader import judge, trajectory, velocity
from pipeline.toy.world import EDGE, SPEEDS, Scene, render, scene, story

SIDE, BATCH = 32, 20
FPS = 8.0  # of the videos of clipmill toy


def scenes(n: int, frames: int, seed: int, step: float = 1.0) -> list[Scene]:
    """Scenes of evenly drawn attributes, all objects inside the picture for so many frames.

    Args:
        step: frames of the world from one to the next. Speeds are the world's own, the slower of them where
            the fastest would leave the picture.
    """
    rng = np.random.default_rng(seed)
    slowest, fastest = (step * speed for speed in SPEEDS)
    fastest = min(fastest, (1 - 2 * EDGE) / (frames - 1))
    found: list[Scene] = []
    for _ in range(n):
        (drawn,) = story(rng, 1)
        while True:
            speed = np.sign(drawn.velocity) * rng.uniform(slowest, fastest)
            whole = replace(drawn, frames=frames, velocity=(float(speed[0]), float(speed[1])))
            if (np.abs(whole.positions() - 0.5) <= 0.5 - EDGE).all():
                break
            drawn = scene(rng, drawn.attributes)
        found.append(whole)
    return found


def step_of(system: System) -> float:
    """Frames of the world from one frame of the model to its next."""
    return FPS / (system.recipe.data.fps or FPS)


def pictures(scene: Scene) -> np.ndarray:
    """uint8 [T, 32, 32, 3], as training saw it: drawn at 64 and halved."""
    large = render(scene, 2 * SIDE).astype(np.float32)
    return large.reshape(len(large), SIDE, 2, SIDE, 2, 3).mean((2, 4)).round().astype(np.uint8)


def truth(scene: Scene) -> np.ndarray:
    """[T, objects, 2] in pixels of 32."""
    return scene.positions() * SIDE - 0.5


def astray(videos: list[np.ndarray], told: list[Scene], frames: range | np.ndarray) -> list[float]:
    """Root mean square distance of the objects from where the law has them; NaN where they cannot be told."""
    found = []
    for video, law in zip(videos, told, strict=True):
        seen, true = trajectory(video), truth(law)
        best = float("nan")
        if seen.shape == true.shape:  # which object is which is not known
            each = [seen[:, list(order)] - true for order in permutations(range(true.shape[1]))]
            best = min(np.nanmean((away[list(frames)] ** 2).sum(-1)) ** 0.5 for away in each)
        found.append(float(best))
    return found


def latents(system: System, videos: list[np.ndarray]) -> torch.Tensor:
    """Normalised latents [B, C, T, h, w]."""
    x = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3)
    return system.mean(to_unit(x))


def summary(name: str, values: list[float], wide: float = 2.0) -> None:
    x = np.array(values)
    unread, within = np.isnan(x).mean(), (x <= wide).mean()
    print(
        f"{name:40} median {np.nanmedian(x):5.2f} px, within {wide:g} px {within:6.1%}, unreadable {unread:6.1%}"
    )


def extension(system: System, n: int, seed: int, context: int) -> None:
    told, drawn = scenes(n, 32, seed, step_of(system)), []
    true = [pictures(s) for s in told]
    for i in range(0, n, BATCH):
        condition = system.condition([s.attributes.caption() for s in told[i : i + BATCH]])
        first = latents(system, [v[:8] for v in true[i : i + BATCH]])
        longer = extend(system.draw(seed=seed + i), first, 32, 8, context, condition)
        drawn += list(system.decode(longer).numpy())
    print(f"8 true frames extended to 32, context {context}, {n} scenes")
    for start in (8, 16, 24):
        summary(f"  frames {start}–{start + 7}, from the law", astray(drawn, told, range(start, start + 8)))
    summary("  the reader on true frames", astray(true, told, range(8, 32)))
    held = [np.concatenate([v[:8], v[7:8].repeat(24, 0)]) for v in true]
    summary("  frame 7 held still instead", astray(held, told, range(8, 32)))
    straight = [velocity(trajectory(v))[1] for v in drawn]
    summary("  from the best straight line", [float(x.max()) if len(x) else float("nan") for x in straight])
    right = [judge(v, s.attributes.caption()) for v, s in zip(drawn, told, strict=True)]
    print(f"  attributes right over all 32 frames: {np.mean([list(r.values()) for r in right]):.1%}")


def interpolation(system: System, n: int, seed: int) -> None:
    told, drawn = scenes(n, 17, seed, step_of(system)), []
    true = [pictures(s) for s in told]
    for i in range(0, n, BATCH):
        condition = system.condition([s.attributes.caption() for s in told[i : i + BATCH]])
        keys = latents(system, [v[::4] for v in true[i : i + BATCH]])
        drawn += list(system.decode(interpolate(system.draw(seed=seed + i), keys, 4, 8, condition)).numpy())
    print(f"5 key frames → 17, {n} scenes")
    between = np.flatnonzero(np.arange(17) % 4)
    summary("  frames between, from the law", astray(drawn, told, between))
    summary("  the reader on true frames", astray(true, told, between))
    nearest = (np.arange(17) + 1) // 4 * 4
    summary("  nearest key frame instead", astray([v[nearest] for v in true], told, between))


def join(system: System, n: int, seed: int) -> None:
    told = [s for s in scenes(2 * n, 8, seed, step_of(system)) if s.attributes.direction != "still"][:n]
    true = [pictures(s) for s in told]
    print(f"4 true frames → 8 by a model that is never told frames, {n} moving scenes, by their captions")
    ways = {"  replacement": 0.0} | {f"  reconstruction guidance {w:g}": w for w in (0.5, 1.0, 2.0, 4.0)}
    for name, weight in ways.items():
        drawn, jumps = [], []
        for i in range(0, n, BATCH):
            x = latents(system, true[i : i + BATCH])
            condition = system.condition([s.attributes.caption() for s in told[i : i + BATCH]])
            given = with_known(condition, x[:, :, :4], range(4), 8)
            z = system.draw(seed=seed + i, reconstruct=weight)(tuple(x.shape), given)  # type: ignore[arg-type]
            jumps += ((z[:, :, 4] - x[:, :, 4]) ** 2).flatten(1).mean(1).sqrt().tolist()
            drawn += list(system.decode(z).numpy())
        summary(name, astray(drawn, told, range(4, 8)))
        print(f"{'':40} first new frame: {np.mean(jumps):.3f} root mean square of latents from the true one")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["extend", "interpolate", "join"])
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--context", type=int, default=4, help="of extend: frames given to each block (default: 4)"
    )
    parser.add_argument("--guidance", type=float, help="by the caption (default: the recipe's)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tasks = {"extend": partial(extension, context=args.context), "interpolate": interpolation, "join": join}
    system = load_trained(args.model, None, "cpu")
    run = system.recipe.run.but(guidance=args.guidance)
    system.recipe = system.recipe.model_copy(update={"run": run})
    tasks[args.what](system, args.n, args.seed)


if __name__ == "__main__":
    main()
