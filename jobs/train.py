"""clipmill train: a diffusion model, an autoencoder, a VLM, a world model or a classifier, from a run's shards."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EPILOG = """
examples
  clipmill train vlm run/ --recipe small-vlm --out model/ --steps 100
  clipmill train diffusion run/ --recipe my.yaml --out model/ --set optimizer.lr=3e-4 --set data.tokens=16384
  clipmill train diffusion run/ --recipe my.yaml --out tuned/ --set start=model/ --set 'lora={rank: 16}'
  clipmill train selector run/ --recipe selector --out selector/
  torchrun --nproc-per-node 8 -m jobs.train diffusion run/ --recipe my.yaml --out model/
  clipmill train vlm run/ --recipe vlm --out model/ --set start=aligned/ --ray 4

OUT gets checkpoints/, metrics and a page to look at, and model.safetensors with averages in ema/ to sample
from. The same command goes on from the last checkpoint, on any number of GPUs that divides data.micro_batches,
and gives what an uninterrupted run would have given; so do more --steps, unless the learning rate decays until a
step of the recipe. Ctrl-C ends the step, saves and stops. `start` begins with another OUT, which need not be there
later; with `lora` adapters alone are trained, and OUT/adapter has them as peft loads them.

A recipe is a YAML file; the bundled ones lie in recipes/training. compute.precision=bf16,
compute.activation_checkpointing=selective (or full), compute.compile=true and compute.parallel=fsdp are for GPUs.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill train",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=["diffusion", "vae", "vq", "vlm", "vivit", "world", "selector"])
    parser.add_argument("dir", metavar="DIR", help="a run with shards, as 'clipmill curate' leaves it")
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="what is trained, and how")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for all it writes")
    parser.add_argument("--steps", type=int, metavar="N", help="train until step N (run.steps of the recipe)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument("--ray", type=int, metavar="N", help="train with N workers of Ray Train")
    args = parser.parse_args(argv)

    from pipeline.faults import StoreError

    try:
        return run(args)
    except (StoreError, ValueError) as e:
        rank = os.environ.get("RANK", "0")
        where = f" rank {rank}" if rank != "0" else ""
        print(f"clipmill train:{where} {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from jobs.training.recipe import load_training
    from pipeline.recipe import RecipeError

    if "://" not in args.dir and not Path(args.dir).is_dir():
        what = "is a file" if Path(args.dir).exists() else "is not there"
        raise RecipeError(f"{args.dir} {what}: give a run with shards, as 'clipmill curate' leaves it")
    steps = [f"run.steps={args.steps}"] if args.steps is not None else []
    recipe = load_training(args.recipe, [*args.set, *steps])
    if recipe.trains != args.model:
        raise RecipeError(f"recipe {args.recipe} trains {recipe.trains}: say so in place of {args.model}")
    if args.ray is not None:
        from jobs.train_ray import train_on_ray

        outcome, where = train_on_ray(recipe, args.dir, args.out, args.ray, args.device)
    else:
        from jobs.training.world.stages import train_all

        outcome, where = train_all(recipe, args.dir, args.out, device=args.device)
    if outcome.signal:
        print(f"stopped and saved at step {outcome.step}; the same command goes on", file=sys.stderr)
        return 128 + outcome.signal
    if os.environ.get("RANK", "0") == "0":
        print(f"step {outcome.step}: {where / 'model.safetensors'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
