"""clipmill train --ray N: the training loop as Ray Train's worker function, here or on a cluster.

Ray starts the workers, joins them in a process group and starts them anew where one dies; the loop then
goes on from its last checkpoint. OUT must be a folder that all workers see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.training.loop import Outcome
from jobs.training.recipe import recipe_of
from jobs.training.recipe_core import TrainRecipe
from jobs.training.world.stages import stages_of, train_all
from pipeline.faults import StoreError, one_line

RESTARTS = 3  # of the workers, after a death that is no fault of recipe or data


def train_on_ray(
    recipe: TrainRecipe, data: str, out: Path, workers: int, device: str | None
) -> tuple[Outcome, Path]:
    """`jobs.training.world.stages.train_all` on so many workers, a GPU each unless device is 'cpu'.

    Raises ValueError with one sentence, as that does.
    """
    import ray
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if workers < 1:
        raise ValueError(f"--ray {workers}: give the number of workers, 1 or more")
    if not ray.is_initialized():
        ray.init(log_to_driver=True, configure_logging=False)
    gpu = device != "cpu" and (torch.cuda.is_available() or ray.cluster_resources().get("GPU", 0) > 0)
    there = ray.cluster_resources().get("GPU" if gpu else "CPU", 0)
    if workers > there:
        raise ValueError(
            f"--ray {workers}: there are {there:g} {'GPUs' if gpu else 'CPUs'}; give at most that"
        )
    out = out.absolute()
    work = {
        "recipe": recipe.model_dump(mode="json"),
        "data": data if "://" in data else str(Path(data).absolute()),
        "out": str(out),
        "device": "cuda" if gpu else "cpu",
    }
    said = out / "ray" / "refused.txt"
    said.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config=work,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name="train", storage_path=str(out / "ray"), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    trainer.fit()
    if said.is_file():
        raise ValueError(said.read_text())
    last, folder = list(stages_of(recipe, out))[-1]
    return Outcome(last.run.steps), folder


def _work(work: dict[str, Any]) -> None:
    """What each worker runs. A refusal is no death: it is left for the driver to say, not tried again."""
    try:
        device = None if work["device"] == "cuda" else "cpu"
        train_all(recipe_of(work["recipe"]), work["data"], Path(work["out"]), device=device)
    except (StoreError, ValueError) as e:
        said = Path(work["out"]) / "ray" / "refused.txt"
        said.parent.mkdir(parents=True, exist_ok=True)
        said.write_text(one_line(e))
