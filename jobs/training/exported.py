"""What training leaves to be used without the run: plain files of its weights and of their averages.

OUT/model.safetensors, OUT/model.json, OUT/model.pt   the newest weights, what they were trained with
OUT/ema/00001000.safetensors    averages of the weights, from which `load_model` makes any length
OUT/frozen.safetensors          what is not trained, written once, but for what published files give again
OUT/adapter/                    of `lora`: the adapters in peft's layout, averaged over the longest length that is kept
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from jobs.training.paths import found_again
from jobs.training.recipe import KINDS
from jobs.training.recipe_core import LoRA
from jobs.training.task import Phase
from models.ema import Profile, combination
from pipeline.faults import one_line
from pipeline.io.store import fsync

AT_ONCE = 1 << 29  # bytes of a checkpoint that are in memory while plain files are made of it
FROZEN = "frozen.safetensors"
_CODES = {  # of types in safetensors' header
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; one sentence with the fix."""


# ---------------------------------------------------------------- files that are whole or not there


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


def write_safetensors(
    final: Path, shapes: Mapping[str, Tensor], read: Callable[[list[str]], Mapping[str, Tensor]], step: int
) -> None:
    """Tensors of these shapes and types, read a few at a time (`AT_ONCE`), as one file.

    The format's own library takes all of them in memory at once. A header of JSON, 8 bytes of its length before it,
    then the tensors one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"step": str(step)}}
    end = 0
    for name, x in shapes.items():
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": _CODES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".partial")
    with partial.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for names in _portions(shapes):
            found = read(names)
            for name in names:
                f.write(_bytes(found[name]))
    publish(partial, final)


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _portions(shapes: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, x in shapes.items():
        more = x.numel() * x.element_size()
        if names and size + more > AT_ONCE:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    if names:
        yield names


def stored_shapes(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint as shapes and types, without data."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: torch.empty(item.size, dtype=item.properties.dtype, device="meta")
        for key, item in metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def read_meta(folder: Path) -> dict[str, Any]:
    """{'step', 'recipe', 'loader', 'ranks', 'frozen', 'out'} of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return found


@contextlib.contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Inside, a plain file that training left is read. Raises CheckpointError where it is damaged or gone."""
    try:
        yield file
    except (
        OSError,
        EOFError,
        RuntimeError,
        SafetensorError,
        json.JSONDecodeError,
        pickle.UnpicklingError,
    ) as e:
        raise CheckpointError(
            f"{file} cannot be read ({one_line(e)}): copy it again from where it was trained"
        ) from e


# ---------------------------------------------------------------- what is not trained


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters that are not trained, by name."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def digest(x: Tensor) -> str:
    """Of shape, type and values."""
    found = blake2b(f"{list(x.shape)} {x.dtype} ".encode(), digest_size=16)
    found.update(_bytes(x))
    return found.hexdigest()


def digests(phases: Iterable[Phase]) -> dict[str, dict[str, str]]:
    """Phase → name → digest, of what is frozen."""
    return {phase.name: {n: digest(p) for n, p in frozen(phase.module).items()} for phase in phases}


def write_frozen(out: Path, phases: Iterable[Phase]) -> None:
    """Keep what is frozen and no published files give again."""
    own = {
        f"{phase.name}/{name}": p
        for phase in phases
        for name, p in frozen(phase.module).items()
        if not any(name.startswith(beginning) for beginning in phase.published)
    }
    if own:
        write_safetensors(out / FROZEN, own, lambda names: own, 0)
    else:
        (out / FROZEN).unlink(missing_ok=True)


@torch.no_grad()
def restore_frozen(out: Path, phases: Iterable[Phase], expected: Mapping[str, Mapping[str, str]]) -> None:
    """Give phases, not yet sharded, what was frozen in them when their training began; not those on the meta device.

    Args:
        expected: `digests` of then.

    Raises CheckpointError where that is gone, or published files give something else.
    """
    kept = read_frozen(out)
    for phase in phases:
        mine = frozen(phase.module)
        if any(p.is_meta for p in mine.values()):
            continue
        for name, p in mine.items():
            x = kept.get(f"{phase.name}/{name}")
            if x is not None and x.shape == p.shape:
                p.copy_(x)
        check_frozen(out, mine, expected.get(phase.name, {}))


def check_frozen(out: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    """Raises CheckpointError where a tensor is not what it was."""
    for name, x in tensors.items():
        if digest(x) != expected.get(name):
            raise CheckpointError(
                f"{out}: {name}, which is frozen, is not what it was in training: give back {FROZEN} there, and the "
                "files that the recipe's paths named"
            )


def read_frozen(out: Path) -> dict[str, Tensor]:
    if not (out / FROZEN).is_file():
        return {}
    with reading(out / FROZEN) as file:
        return load_file(file)


# ---------------------------------------------------------------- models to use


@dataclass(frozen=True)
class Trained:
    """What training left, on the CPU.

    recipe: as it was trained with, plain data, with the paths of today. step: optimizer steps. weights: by phase;
    without what published files give. state: `Task.state()`. frozen: phase → name → digest of what was not trained.
    was: the folder that training wrote into.
    """

    folder: Path
    recipe: dict[str, Any]
    step: int
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    frozen: dict[str, dict[str, str]]
    was: str = ""

    def load_into(self, module: nn.Module, phase: str) -> None:
        """Give a module, made from the recipe, the weights of a phase.

        Raises CheckpointError where what published files gave the module is not what it was trained with.
        """
        found = module.load_state_dict(self.weights[phase], strict=False)
        own, was = dict(module.named_parameters()), self.frozen.get(phase, {})
        wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if name not in was)]
        if wrong:
            raise CheckpointError(
                f"{self.folder} does not fit its recipe's network, at {wrong[0]}: use the same code"
            )
        check_frozen(self.folder, {name: own[name] for name in found.missing_keys}, was)


def export(checkpoint: Path, out: Path) -> None:
    """Plain files of a checkpoint: its weights, and a snapshot of the averages. Read back from the disk, bit by bit.

    Raises OSError.
    """
    stored = stored_shapes(checkpoint)
    meta = read_meta(checkpoint)

    def write(kind: str, final: Path) -> None:
        shapes = {key.removeprefix(kind): x for key, x in stored.items() if key.startswith(kind)}

        def read(names: list[str]) -> Mapping[str, Tensor]:
            state = {kind + name: torch.empty_like(shapes[name], device="cpu") for name in names}
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
            return {key.removeprefix(kind): x for key, x in state.items()}

        if shapes:
            write_safetensors(final, shapes, read, meta["step"])

    write("ema/", out / f"ema/{meta['step']:08d}.safetensors")
    write("model/", out / "model.safetensors")
    for name, source in (("model.json", "meta.json"), ("model.pt", "task.pt")):
        aside = out / f"{name}.partial"
        shutil.copyfile(checkpoint / source, aside)
        publish(aside, out / name)
    if lora := meta["recipe"].get("lora"):
        export_adapter(out, meta["recipe"]["trains"], LoRA.model_validate(lora))


def export_adapter(out: Path, phase: str, lora: LoRA) -> None:
    """The network's adapters, as peft loads them: `PeftModel.from_pretrained(network, OUT/adapter)`."""
    from jobs.training.lora import config, layers, peft_name

    length = longest_average(out)
    file = list(snapshots_of(out).values())[-1] if length else out / "model.safetensors"
    before = f"{phase}/{length}/" if length else f"{phase}/"
    weights = {k.removeprefix(before): x for k, x in load_file(file).items() if k.startswith(before)}
    own = {name: x for key, x in weights.items() if (name := peft_name(key))}
    partial = out / "adapter.new.partial"  # a folder that is replaced is called adapter.partial meanwhile
    shutil.rmtree(partial, ignore_errors=True)
    config(lora, layers(weights)).save_pretrained(partial)
    write_safetensors(partial / "adapter_model.safetensors", own, lambda names: own, 0)
    publish(partial, out / "adapter")


def snapshots_of(out: Path) -> dict[int, Path]:
    return {int(p.stem): p for p in sorted((out / "ema").glob("*.safetensors")) if p.stem.isdigit()}


def load_model(out: Path, ema: float | None = None, located: Mapping[str, str] | None = None) -> Trained:
    """The newest weights of a training run, or their average.

    Args:
        ema: σ_rel, the average's length as a share of training, any between 0 and 0.28: those that were
            kept are exact, others are made of the snapshots. None: the weights themselves.
        located: key of the recipe → path, in place of what it says; see `paths.found_again`.

    Frozen parameters, buffers and phases without averages are given as they are. Raises CheckpointError
    where nothing was saved, or no averages were, or a file is damaged.
    """
    out = Path(out)
    if not (out / "model.safetensors").is_file() or not (out / "model.json").is_file():
        raise CheckpointError(f"{out} holds no model.safetensors: give a folder that clipmill train wrote")
    with reading(out / "model.json") as file:
        meta = json.loads(file.read_text())
    recipe = found_again(KINDS[meta["recipe"]["trains"]], meta["recipe"], meta.get("out", ""), out, located)
    with reading(out / "model.safetensors") as file, safe_open(file, "pt") as f:
        step, found = int(f.metadata()["step"]), load_file(file)
    with reading(out / "model.pt") as file:
        state = torch.load(file, weights_only=True)
    found |= read_frozen(out)
    if ema is not None:
        stored: list[tuple[Profile, str, str]] = []  # what, phase, file
        for at, path in snapshots_of(out).items():
            with reading(path), safe_open(path, "pt") as f:
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
    return Trained(out, recipe, step, weights, state, meta.get("frozen", {}), meta.get("out", ""))


def longest_average(out: Path) -> float:
    """σ_rel of the longest average that was kept; 0: none was."""
    for path in list(snapshots_of(out).values())[-1:]:
        with reading(path), safe_open(path, "pt") as f:
            return max(float(key.split("/")[1]) for key in f.keys())  # noqa: SIM118 (no mapping)
    return 0.0


def _combine(stored: list[tuple[Profile, str]], x: list[float], phase: str) -> dict[str, Tensor]:
    """Σ x_i · average i, by phase/name; one snapshot in memory at a time."""
    total: dict[str, Tensor] = {}
    for (profile, path), weight in zip(stored, x, strict=True):
        if weight == 0:
            continue
        start = f"{phase}/{profile.length}/"
        with reading(Path(path)), safe_open(path, "pt") as f:
            for key in [k for k in f.keys() if k.startswith(start)]:  # noqa: SIM118 (no mapping)
                name = f"{phase}/{key.removeprefix(start)}"
                part = weight * f.get_tensor(key).double()
                total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}
