"""Checkpoints: written beside training, whole or not at all, read back on any number of ranks.

    OUT/checkpoints/step-00001000/          torch.distributed.checkpoint, meta.json, task.pt
    OUT/checkpoints/step-00002000.partial/  being written, or left by a killed run: never read
    OUT/checkpoints/step-00003000.broken/   found damaged by a later start: never read
    OUT/lock                                held by the training that writes here

A folder gets its name when everything in it is on disk, so the last good checkpoint is the last by name. It holds
what is trained; what is frozen is kept beside it once (exported.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from jobs.training.distributed import World
from jobs.training.exported import (
    CheckpointError,
    export,
    publish,
    read_meta,
    remove,
    snapshots_of,
    stored_shapes,
)
from jobs.training.task import Phase
from models.ema import PowerEMA
from pipeline.faults import one_line

SNAPSHOTS = 32  # averages kept on disk at most, about evenly spread over training
FREE = (  # what a resumed run may have otherwise: how long, how the same numbers are computed, what it began with
    "name",
    "start",
    "model.weights",
    "vae.image",
    "run.",
    "data.workers",
    "optimizer.decay_until",
    "compute.activation_checkpointing",
    "compute.compile",
    "compute.parallel",
    "compute.attention",
)
MOVED = (
    "autoencoder.path",
    "text.model",
    "model.spatial",
    "data.cache",
    "vq.path",
    "text.tokenizer",
    "documents.chat",
    "data.mixture.data",
    "data.mixture.cache",
)  # that may lie elsewhere: contents are checked
_NAME = re.compile(r"step-(\d{8,})")

# Training in one process has no process group, which is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


# ---------------------------------------------------------------- which there are


def checkpoints(out: Path) -> dict[int, Path]:
    """The whole ones, step → folder, oldest first."""
    found = {}
    for folder in (out / "checkpoints").glob("step-*"):
        if match := _NAME.fullmatch(folder.name):
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def read_task(folder: Path) -> dict[str, Any]:
    """`Task.state()` of a checkpoint."""
    found: dict[str, Any] = torch.load(folder / "task.pt", weights_only=True)
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, cut off or unreadable; None where it is whole."""
    try:
        meta = read_meta(folder)
        if missing := {"step", "recipe", "loader"} - meta.keys():
            return f"meta.json is without {', '.join(sorted(missing))}"
        read_task(folder)
        metadata = dcp.FileSystemReader(folder).read_metadata()
        ends: dict[str, int] = {}
        for place in (metadata.storage_data or {}).values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            if (size := (folder / name).stat().st_size) < end:
                return f"{name} has {size:,} of {end:,} bytes"
    except FileNotFoundError as e:
        return f"{Path(str(e.filename)).name} is missing"
    except (OSError, ValueError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as e:
        return one_line(e)
    return None


def newest(out: Path) -> int | None:
    """Step of the last checkpoint that is whole; damaged ones get another name, with a sentence on stderr.

    Raises CheckpointError where all are damaged.
    """
    found, said = checkpoints(out), ""
    for step, folder in reversed(found.items()):
        what = damage(folder)
        if what is None:
            if said:
                print(f"clipmill train: {said}; going on from step {step}", file=sys.stderr, flush=True)
            return step
        said = f"{said}; {folder} is damaged: {what}".removeprefix("; ")
    if found:
        raise CheckpointError(f"{said}; none before it is whole: give another --out, or bring one back")
    return None


def set_aside(out: Path, step: int) -> None:
    """Give the checkpoints after a step, which are damaged, a name that is never read."""
    for at, folder in checkpoints(out).items():
        if at > step:
            aside = folder.with_name(folder.name + ".broken")
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)


@contextlib.contextmanager
def lock(out: Path, world: World) -> Iterator[None]:
    """Inside, this training alone writes to `out`. The lock is the first rank's, and ends with its process.

    A folder that was made here and in which nothing was written is gone again afterwards.

    Raises CheckpointError, on all ranks, where another has it.
    """
    file, holder = None, None
    new = not out.exists()
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its children do not hold it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            holder = file.read() or "another process"
    holder = world.gather(holder)[0]
    try:
        if holder:
            raise CheckpointError(
                f"{out} is being trained into by {holder}: wait for it, end it, or give another --out"
            )
        yield
    finally:
        if file:
            if new and [p.name for p in out.iterdir()] == ["lock"]:
                (out / "lock").unlink()
                out.rmdir()
            file.close()


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key where two recipes differ, with both values; not of `FREE`, of `MOVED` only whether it is given."""
    a, b = (dict(_flat(x)) for x in (saved, now))
    for key in sorted(a.keys() | b.keys(), key=lambda key: (key != "trains", key)):  # what it is, before how
        free = any(key == f or (f.endswith(".") and key.startswith(f)) for f in FREE)
        free |= re.sub(r"\.\d+\.", ".", key) in MOVED and a.get(key) is not None and b.get(key) is not None
        if not free and a.get(key) != b.get(key):
            parts = key.split(".")
            above = (".".join(parts[:n]) for n in range(1, len(parts)))
            whole = next(
                (k for k in above if _at(saved, k) is None or _at(now, k) is None), key
            )  # a section is missing
            return whole, _at(saved, whole), _at(now, whole)
    return None


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None where there is nothing."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = dict(enumerate(tree)).get(int(part)) if part.isdecimal() else None
        else:
            tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _flat(x: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in x.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


# ---------------------------------------------------------------- the state of training


def tensors(phases: Iterable[Phase], averages: Mapping[str, PowerEMA]) -> dict[str, Tensor]:
    """All that is trained, by name: model/…, ema/…, optimizer/…; not copied. Phases may be sharded."""
    found: dict[str, Tensor] = {}
    trained = StateDictOptions(ignore_frozen_params=True)
    for phase in phases:
        weights: Any = get_model_state_dict(phase.module, options=trained)
        found |= {f"model/{phase.name}/{name}": x for name, x in weights.items()}
        if phase.optimizer.state:  # asked earlier, torch would make one up and count a step
            for name, values in moments(phase).items():
                found |= {f"optimizer/{phase.name}/{name}/{key}": x for key, x in values.items()}
    for phase_name, ema in averages.items():
        for length, average in ema.averages.items():
            found |= {f"ema/{phase_name}/{length}/{name}": x for name, x in average.items()}
    return found


def moments(phase: Phase) -> dict[str, dict[str, Tensor]]:
    """A parameter's name → what its optimizer knows of it; made up, as of no step, where it knows nothing."""
    found: Any = get_optimizer_state_dict(phase.module, phase.optimizer)["state"]
    return {n: {key: torch.as_tensor(x) for key, x in values.items()} for n, values in found.items()}


def restore(folder: Path, phases: Iterable[Phase], averages: Mapping[str, PowerEMA], world: World) -> None:
    """Read a checkpoint into phases and averages, made and parallelized as they will be used.

    Raises CheckpointError where the model is another one.
    """
    stored = stored_shapes(folder)
    phases = list(phases)
    known = {
        phase.name: moments(phase)
        for phase in phases
        if any(k.startswith(f"optimizer/{phase.name}/") for k in stored)
    }
    state = {
        key: x
        for key, x in tensors(phases, averages).items()
        if not key.startswith("optimizer/") or key in stored
    }
    for key, x in state.items():
        if key not in stored or stored[key].shape != x.shape:
            there = f"of shape {list(stored[key].shape)}" if key in stored else "missing"
            raise CheckpointError(
                f"{folder}: {key} is {there}, in this model of shape {list(x.shape)}; "
                "use the code it was trained with, or another --out"
            )
    dcp.load(state, checkpoint_id=folder, process_group=world.host, no_dist=world.size == 1)
    for phase in phases:
        read = {
            name: {
                key: state[at] for key in values if (at := f"optimizer/{phase.name}/{name}/{key}") in state
            }
            for name, values in known.get(phase.name, {}).items()
        }
        if phase.optimizer.state:
            groups = get_optimizer_state_dict(phase.module, phase.optimizer)["param_groups"]
            given: Any = {
                "state": {name: values for name, values in read.items() if values},
                "param_groups": groups,
            }
            options = StateDictOptions(strict=False)  # what took part in no step has no moments
            set_optimizer_state_dict(phase.module, phase.optimizer, given, options=options)


# ---------------------------------------------------------------- writing


class Saver:
    """Writes checkpoints while training goes on; one at a time, so that one copy of the state is in memory.

    The copy is in page-locked memory where there is a GPU, and is used again by the next checkpoint.

    Args:
        out: the folder of the training run.
        keep: checkpoints to keep.
    """

    def __init__(self, out: Path, keep: int, world: World):
        self.out, self.keep, self.world = out, keep, world
        cuda = world.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(
        self, meta: dict[str, Any], phases: Iterable[Phase], averages: Mapping[str, PowerEMA], task: Any
    ) -> None:
        """Copy the state to host memory and begin to write it; waits for the one before.

        Args:
            meta: JSON: step, recipe, loader, frozen.
            task: `Task.state()`.

        Raises CheckpointError, on all ranks, where the one before could not be written, or this one not begun.
        """
        final = self.out / "checkpoints" / f"step-{meta['step']:08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            self.world.agree(lambda: self._begin(partial, meta, task))
        except ValueError as e:  # another rank's
            raise CheckpointError(str(e)) from e
        begun = dcp.async_save(
            tensors(phases, averages),
            checkpoint_id=partial,
            process_group=self.world.writing,
            async_stager=self.stager,
            no_dist=self.world.size == 1,
        )
        assert isinstance(begun, Future)
        self.writing = self.thread.submit(self._finish, begun, partial, final)

    def _begin(self, partial: Path, meta: dict[str, Any], task: Any) -> None:
        self.wait()
        try:
            if self.world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / "meta.json").write_text(json.dumps(meta | {"ranks": self.world.size}, indent=1))
                torch.save(_to_host(task), partial / "task.pt")
        except OSError as e:
            raise self._failed(e) from e

    def wait(self) -> None:
        """Until what is being written is whole. Raises CheckpointError."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, dcp.CheckpointException) as e:
            raise self._failed(e) from e

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.stager.close()

    def _finish(self, begun: Future[Any], partial: Path, final: Path) -> None:
        begun.result()
        if self.world.rank == 0:  # every rank's part is on disk: the coordinator has heard of all
            export(partial, self.out)
            publish(partial, final)
            prune(self.out, self.keep)

    def _failed(self, e: BaseException) -> CheckpointError:
        why = str(e).strip().splitlines()[-1]
        return CheckpointError(
            f"{self.out}: the checkpoint could not be written ({why}); the one before is whole: make room "
            "there and run the same command again"
        )


def prune(out: Path, keep: int) -> None:
    """Old checkpoints go, and of more than `SNAPSHOTS` averages the ones nearest to their neighbours."""
    for folder in list(checkpoints(out).values())[:-keep]:
        remove(folder)
    snapshots = snapshots_of(out)
    while len(snapshots) > SNAPSHOTS:
        steps = [0, *snapshots]
        gaps = {at: after - before for before, at, after in zip(steps, steps[1:], steps[2:], strict=False)}
        snapshots.pop(min(gaps, key=lambda at: gaps[at])).unlink()


def clean(out: Path, step: int) -> None:
    """Remove what a killed run left after its last good checkpoint, at `step`."""
    for partial in [*out.glob("*.partial"), *out.glob("*/*.partial")]:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for at, path in snapshots_of(out).items():
        if at > step:
            path.unlink()


def _to_host(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: _to_host(value) for key, value in x.items()}
    return type(x)(_to_host(v) for v in x) if isinstance(x, list | tuple) else x
