"""Checkpoints: written beside training, whole or not at all, read back on any number of ranks.

    OUT/checkpoints/step-00001000/          torch.distributed.checkpoint, meta.json, task.pt
    OUT/checkpoints/step-00002000.partial/  being written, or left by a killed run: never read
    OUT/model.safetensors, OUT/model.json   the newest weights, to use without the run
    OUT/ema/00001000.safetensors            averages of the weights, from which `load_model` makes any length

A folder gets its name when everything in it is on disk, so the last good checkpoint is the last by name.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from jobs.training.distributed import World
from jobs.training.task import Phase
from models.ema import PowerEMA, Profile, combination
from pipeline.io.store import fsync

SNAPSHOTS = 32  # averages kept on disk at most, about evenly spread over training
FREE = (  # what a resumed run may have otherwise: how long, and how the same numbers are computed
    "name",
    "run.",
    "data.workers",
    "optimizer.decay_until",
    "compute.activation_checkpointing",
    "compute.compile",
    "compute.parallel",
    "compute.attention",
)
_NAME = re.compile(r"step-(\d{8,})")

# Training in one process has no process group, which is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; one sentence with the fix."""


# ---------------------------------------------------------------- which there are


def checkpoints(out: Path) -> dict[int, Path]:
    """The whole ones, step → folder, oldest first."""
    found = {}
    for folder in (out / "checkpoints").glob("step-*"):
        if match := _NAME.fullmatch(folder.name):
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def read_meta(folder: Path) -> dict[str, Any]:
    """{'step', 'micro', 'recipe', 'loader', 'ranks'} of a checkpoint."""
    return json.loads((folder / "meta.json").read_text())


def read_task(folder: Path) -> dict[str, Any]:
    """`Task.state()` of a checkpoint."""
    found: dict[str, Any] = torch.load(folder / "task.pt", weights_only=True)
    return found


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, outside of `FREE`, where two recipes differ, with both values."""
    a, b = (dict(_flat(x)) for x in (saved, now))
    for key in sorted(a.keys() | b.keys()):
        free = any(key == f or (f.endswith(".") and key.startswith(f)) for f in FREE)
        if not free and a.get(key) != b.get(key):
            return key, a.get(key), b.get(key)
    return None


def _flat(x: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in x.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


# ---------------------------------------------------------------- the state of training


def tensors(phases: Iterable[Phase], averages: Mapping[str, PowerEMA]) -> dict[str, Tensor]:
    """All of it by name: model/…, ema/…, optimizer/…; not copied. Phases may be sharded."""
    found: dict[str, Tensor] = {}
    for phase in phases:
        found |= {f"model/{phase.name}/{name}": x for name, x in phase.module.state_dict().items()}
        names = {id(p): name for name, p in phase.module.named_parameters()}
        for p, values in phase.optimizer.state.items():
            found |= {
                f"optimizer/{phase.name}/{names[id(p)]}/{key}": torch.as_tensor(x)
                for key, x in values.items()
            }
    for phase_name, ema in averages.items():
        for length, average in ema.averages.items():
            found |= {f"ema/{phase_name}/{length}/{name}": x for name, x in average.items()}
    return found


def restore(folder: Path, phases: Iterable[Phase], averages: Mapping[str, PowerEMA], world: World) -> None:
    """Read a checkpoint into phases and averages, made and spread as they will be used.

    Raises CheckpointError where the model is another one.
    """
    stored = _stored(folder)
    phases = list(phases)
    state = tensors(phases, averages)
    fresh: dict[str, dict[int, dict[str, Tensor]]] = {}  # phase → place in the optimizer → moments
    for phase in phases:
        names = {id(p): name for name, p in phase.module.named_parameters()}
        trained = [p for group in phase.optimizer.param_groups for p in group["params"]]
        for place, p in enumerate(trained):
            start = f"optimizer/{phase.name}/{names[id(p)]}/"
            for key in [k for k in stored if k.startswith(start)]:
                alike = stored[key].shape == p.shape  # and then sharded like it
                state[key] = torch.empty_like(
                    p.detach() if alike else stored[key], device=None if alike else "cpu"
                )
                moments = fresh.setdefault(phase.name, {}).setdefault(place, {})
                moments[key.removeprefix(start)] = state[key]
    for key, x in state.items():
        if key not in stored or stored[key].shape != x.shape:
            there = f"of shape {list(stored[key].shape)}" if key in stored else "missing"
            raise CheckpointError(
                f"{folder}: {key} is {there}, in this model of shape {list(x.shape)}; "
                "use the code it was trained with, or another --out"
            )
    dcp.load(state, checkpoint_id=folder, process_group=world.host, no_dist=world.size == 1)
    for phase in phases:
        groups = phase.optimizer.state_dict()["param_groups"]
        phase.optimizer.load_state_dict({"state": fresh.get(phase.name, {}), "param_groups": groups})


def _stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as shapes and types, without data."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for key, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


# ---------------------------------------------------------------- writing


class Saver:
    """Writes checkpoints in a thread while training goes on; one at a time.

    Args:
        out: the folder of the training run.
        keep: checkpoints to keep.
    """

    def __init__(self, out: Path, keep: int, world: World):
        self.out, self.keep, self.world = out, keep, world
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(
        self, meta: dict[str, Any], phases: Iterable[Phase], averages: Mapping[str, PowerEMA], task: Any
    ) -> None:
        """Copy the state to host memory and begin to write it; waits for the one before.

        Args:
            meta: JSON: step, micro, recipe, loader.
            task: `Task.state()`.

        Raises CheckpointError where the one before could not be written.
        """
        self.wait()
        copies = {key: _on_host(x) for key, x in tensors(phases, averages).items()}
        self.writing = self.thread.submit(self._write, meta | {"ranks": self.world.size}, copies, task)

    def wait(self) -> None:
        """Until what is being written is whole. Raises CheckpointError."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, dcp.CheckpointException) as e:
            why = str(e).strip().splitlines()[-1]
            raise CheckpointError(
                f"{self.out}: the checkpoint could not be written ({why}); the one before is whole: make room "
                "there and run the same command again"
            ) from e

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()

    def _write(self, meta: dict[str, Any], copies: dict[str, Tensor], task: Any) -> None:
        final = self.out / "checkpoints" / f"step-{meta['step']:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "meta.json").write_text(json.dumps(meta, indent=1))
            torch.save(_to_host(task), partial / "task.pt")
        alone = self.world.size == 1
        dcp.save(copies, checkpoint_id=partial, process_group=self.world.writing, no_dist=alone)
        if self.world.rank == 0:  # every rank's part is on disk: the coordinator has heard of all
            export(partial, self.out)
            publish(partial, final)
            prune(self.out, self.keep)


def publish(partial: Path, final: Path) -> None:
    """Give a folder or file its name, replacing what had it, once all of it is on disk."""
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    if final.is_dir():
        remove(final)
    partial.replace(final)
    fsync(final.parent)


def remove(folder: Path) -> None:
    """First by name: half of a checkpoint must never look like one."""
    gone = folder.with_name(folder.name + ".partial")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone)


def prune(out: Path, keep: int) -> None:
    """Old checkpoints go, and of more than `SNAPSHOTS` averages the ones nearest to their neighbours."""
    for folder in list(checkpoints(out).values())[:-keep]:
        remove(folder)
    snapshots = _snapshots(out)
    while len(snapshots) > SNAPSHOTS:
        steps = [0, *snapshots]
        gaps = {at: after - before for before, at, after in zip(steps, steps[1:], steps[2:], strict=False)}
        snapshots.pop(min(gaps, key=lambda at: gaps[at])).unlink()


def clean(out: Path, step: int) -> None:
    """Remove what a killed run left after its last good checkpoint, at `step`."""
    for partial in [*out.glob("*.partial"), *out.glob("*/*.partial")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for at, path in _snapshots(out).items():
        if at > step:
            path.unlink()


def _on_host(x: Tensor) -> Tensor:
    """A copy in host memory; a sharded tensor (DTensor) stays sharded."""
    return x.detach().to("cpu", copy=True)


def _to_host(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _on_host(x)
    if isinstance(x, dict):
        return {key: _to_host(value) for key, value in x.items()}
    return type(x)(_to_host(v) for v in x) if isinstance(x, list | tuple) else x


# ---------------------------------------------------------------- models to use


@dataclass(frozen=True)
class Trained:
    """What training left, on the CPU.

    recipe: as it was trained with, plain data. step: optimizer steps. weights: by phase, for
    `load_state_dict`. state: `Task.state()`.
    """

    recipe: dict[str, Any]
    step: int
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def export(checkpoint: Path, out: Path) -> None:
    """Plain files of a checkpoint: its weights, and a snapshot of the averages. Read back from the disk.

    Raises OSError.
    """
    from safetensors.torch import save_file

    stored = _stored(checkpoint)
    step = read_meta(checkpoint)["step"]

    def load(kind: str) -> dict[str, Tensor]:
        state = {key: torch.empty_like(x, device="cpu") for key, x in stored.items() if key.startswith(kind)}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        return {key.removeprefix(kind): x for key, x in state.items()}

    def write(x: dict[str, Tensor], name: str) -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".partial")
        save_file(x, aside, {"step": str(step)})
        publish(aside, path)

    if averages := load("ema/"):
        write(averages, f"ema/{step:08d}.safetensors")
    write(load("model/"), "model.safetensors")
    for name, source in (("model.json", "meta.json"), ("model.pt", "task.pt")):
        aside = out / f"{name}.partial"
        shutil.copyfile(checkpoint / source, aside)
        publish(aside, out / name)


def _snapshots(out: Path) -> dict[int, Path]:
    return {int(p.stem): p for p in sorted((out / "ema").glob("*.safetensors")) if p.stem.isdigit()}


def load_model(out: Path, ema: float | None = None) -> Trained:
    """The newest weights of a training run, or their average.

    Args:
        ema: σ_rel, the average's length as a share of training, any between 0 and 0.28: those that were
            kept are exact, others are made of the snapshots. None: the weights themselves.

    Frozen parameters, buffers and phases without averages are given as they are. Raises CheckpointError
    where nothing was saved, or no averages were.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    out = Path(out)
    if not (out / "model.safetensors").is_file() or not (out / "model.json").is_file():
        raise CheckpointError(f"{out} holds no model.safetensors: give a folder that clipmill train wrote")
    meta = json.loads((out / "model.json").read_text())
    with safe_open(out / "model.safetensors", "pt") as f:
        step = int(f.metadata()["step"])
    state = torch.load(out / "model.pt", weights_only=True)
    found = load_file(out / "model.safetensors")
    if ema is not None:
        stored: list[tuple[Profile, str, str]] = []  # what, phase, file
        for at, path in _snapshots(out).items():
            with safe_open(path, "pt") as f:
                kinds = {tuple(key.split("/")[:2]) for key in f.keys()}  # noqa: SIM118 (no mapping)
            stored += [(Profile(at, float(length)), phase, str(path)) for phase, length in sorted(kinds)]
        if not stored:
            raise CheckpointError(f"{out}: no averages were kept (ema.lengths is empty); leave --ema out")
        for phase in {phase for _, phase, _ in stored}:
            own = [(profile, path) for profile, of, path in stored if of == phase]
            x = combination([profile for profile, _ in own], Profile(step, ema))
            found |= _combine(own, x.tolist(), phase)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, value in found.items():
        phase, _, name = key.partition("/")
        weights.setdefault(phase, {})[name] = value
    return Trained(meta["recipe"], step, weights, state)


def _combine(stored: list[tuple[Profile, str]], x: list[float], phase: str) -> dict[str, Tensor]:
    """Σ x_i · average i, by phase/name; one snapshot in memory at a time."""
    from safetensors import safe_open

    total: dict[str, Tensor] = {}
    for (profile, path), weight in zip(stored, x, strict=True):
        if weight == 0:
            continue
        start = f"{phase}/{profile.length}/"
        with safe_open(path, "pt") as f:
            for key in [k for k in f.keys() if k.startswith(start)]:  # noqa: SIM118 (no mapping)
                name = f"{phase}/{key.removeprefix(start)}"
                part = weight * f.get_tensor(key).double()
                total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}
