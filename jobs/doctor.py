"""clipmill doctor: what is installed, which models a recipe needs and where they come from, GPUs, the cluster."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from jobs.training.recipe_core import TrainRecipe
    from pipeline.recipe import Recipe

EPILOG = """
Every line is something a run needs: ok, 'look' (works, but worth knowing) or 'missing' with the fix.
The exit status is 1 when something is missing.

examples
  clipmill doctor
  clipmill doctor --recipe panda70m --out /data/run
  clipmill doctor --recipe dit-xl
  clipmill doctor --recipe embedded --set cut.codec=h264_nvenc
  clipmill doctor --address auto
"""

OK, LOOK, MISSING = "ok", "look", "missing"
FOR_DEVELOPERS = ("test", "dev")  # extras that no run needs

# Asked of a process of its own: importing torch takes seconds, and a broken driver can take the process along.
GPUS = """
import json, torch
cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
found = [torch.cuda.get_device_properties(i) for i in cuda]
print(json.dumps([[p.name, p.total_memory, torch.version.cuda] for p in found]))
"""
CLUSTER = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
print(json.dumps([sum(n["Alive"] for n in ray.nodes()), ray.cluster_resources()]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    group: str
    name: str
    state: str  # OK, LOOK or MISSING
    found: str
    fix: str = ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill doctor",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        default="embedded",
        metavar="NAME|FILE",
        help="whose models to look for; a training recipe, too (default: embedded)",
    )
    parser.add_argument(
        "--training", action="store_true", help="the training recipe of a name that both kinds have (toy)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key of the recipe"
    )
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="where a run is to be written (default: here)"
    )
    parser.add_argument(
        "--address", metavar="ADDR", help="a Ray cluster to look at: auto, host:port, ray://host:port"
    )
    args = parser.parse_args(argv)

    checks = [python(), *packages()]
    recipe: Recipe | TrainRecipe | None = None
    try:
        from jobs.training.recipe import load_either
        from pipeline.recipe import RecipeError
    except ImportError as e:  # pydantic or yaml: their lines say how to get them
        checks.append(Check("models", args.recipe, MISSING, f"the recipe cannot be read: {e}"))
    else:
        try:
            recipe = load_either(args.recipe, args.set, args.training)
        except RecipeError as e:
            print(f"clipmill doctor: {e}", file=sys.stderr)
            return 2
    checks += machine(args.out)
    checks.append(confinement())
    checks.append(gpus(recipe, args.address))
    if recipe is not None:
        checks += [video_encoder(recipe), *models(recipe)]
    if args.address:
        checks.append(cluster(args.address))

    if sys.stdout.isatty():
        show(checks)
    else:
        print("\n".join(plain(checks)))
    missing = sum(c.state == MISSING for c in checks)
    if missing:
        print(f"\n{missing} missing: mend the lines above, then run clipmill doctor again")
        return 1
    task = f"train {recipe.trains} RUN" if trains(recipe) else "curate SOURCE"
    out = "run/" if args.out == "." else args.out  # a run wants a new or empty folder
    options = ["--recipe", args.recipe, *(word for item in args.set for word in ("--set", item))]
    print(f"\nready: clipmill {task} {shlex.join([*options, '--out', out])}")
    return 0


def trains(recipe: Recipe | TrainRecipe | None) -> TypeIs[TrainRecipe]:
    """It is one for training; told without importing what a broken installation may lack."""
    return hasattr(recipe, "trains")


# ---------------------------------------------------------------- what is looked at


def python() -> Check:
    """The interpreter against the versions that clipmill is made for."""
    found = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Check(
        "python",
        "python",
        OK if fits else MISSING,
        f"{found}, {sys.executable}",
        "" if fits else "make the environment with Python 3.11 or 3.12",
    )


def packages() -> Iterator[Check]:
    """Everything clipmill depends on, as its own metadata has it; nothing is imported."""
    try:
        wanted = metadata.requires("clipmill") or []
    except metadata.PackageNotFoundError:
        fix = "pip install -e . in its folder"
        yield Check("packages", "clipmill", MISSING, "is not installed, so its needs are unknown", fix)
        return
    for line in wanted:
        needed = re.match(r"(([\w.-]+)(?:\[[\w,-]*\])?)\s*(?:>=\s*([\d.]+))?", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", line)
        assert needed is not None
        if extra is not None and extra[1] in FOR_DEVELOPERS:
            continue
        asked, name, least = needed[1], needed[2], needed[3] or ""
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            if extra is None:
                fix = f"pip install '{asked}{'>=' + least if least else ''}'"
                yield Check("packages", name, MISSING, "not installed", fix)
            else:
                fix = f"if wanted: pip install -e '.[{extra[1]}]' in the clone of clipmill"
                yield Check("packages", name, LOOK, f"not installed, only for {extra[1]}", fix)
            continue
        if numbers(found) < numbers(least):
            fix = f"pip install -U '{asked}>={least}'"
            yield Check("packages", name, MISSING, f"{found} is older than {least}", fix)
        else:
            yield Check("packages", name, OK, found)


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version: '2.13.0+cpu' is (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def machine(out: str) -> Iterator[Check]:
    """Processors, memory, and room on the disks that a run writes to."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("machine", "processors", OK, f"{cpus}")
    gib = memory() / 2**30
    low = gib < 2 * cpus
    fix = "limit the workers of a pool: clipmill curate --workers 1" if low else ""
    yield Check("machine", "memory", LOOK if low else OK, f"{gib:.1f} GiB", fix)
    yield disk("temporary files", tempfile.gettempdir(), "set TMPDIR to a disk with more room")
    if "://" not in out:
        yield disk("output", out, "give another --out")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free / 2**30
        fix = "" if free >= 1 else "in a container: start it with --shm-size=4g, or Ray is slow"
        yield Check("machine", "shared memory", LOOK if fix else OK, f"{free:.1f} GiB free in {shm}", fix)


def memory() -> int:
    """Bytes this process may use: the machine's, or its container's if that is less."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(whole, int(text)) if text.isdigit() else whole


def disk(name: str, folder: str, fix: str) -> Check:
    """A folder that is there or can be made, may be written, and has room."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Check("machine", name, MISSING, f"{there} cannot be written", fix)
    free = shutil.disk_usage(there).free / 1e9
    few = free < 5
    return Check("machine", name, LOOK if few else OK, f"{free:,.1f} GB free in {there}", fix if few else "")


def confinement() -> Check:
    """What the process that decodes strangers' files can do that it should not; it tries."""
    from pipeline.io.isolate import Child, ChildError

    name = "decoding process"
    try:
        with Child() as child:
            escapes = child.call(
                "pipeline.io.sandbox:escapes", os.getpid(), tempfile.gettempdir(), stall_s=30
            )
    except ChildError as e:
        return Check("machine", name, MISSING, f"does not start: {e}")
    if not escapes:
        return Check("machine", name, OK, "confined: no network, no writing, no programs, no other processes")
    return Check(
        "machine",
        name,
        LOOK,
        f"this kernel lets it {', '.join(escapes)}",
        "for sources nobody vouches for use Linux 5.13 or newer, and let its container use seccomp and Landlock",
    )


def gpus(recipe: Recipe | TrainRecipe | None, address: str | None) -> Check:
    """CUDA devices that torch can use, against what the recipe asks of this machine."""
    asked, fix = False, ""
    if recipe is not None and not address:
        without = on_cpu(recipe)
        asked = bool(without) and not trains(recipe)
        elsewhere = "" if trains(recipe) else ", or on a cluster: --address"
        fix = f"on this machine: {' '.join(without)}{elsewhere}" if without else ""
    if find_spec("torch") is None:
        return Check("machine", "GPUs", MISSING if asked else LOOK, "torch is not installed", fix)
    said = ask(GPUS)
    if isinstance(said, str):
        return Check("machine", "GPUs", MISSING, f"torch does not work: {said}", "pip install -U torch")
    if not said:
        state = MISSING if asked else LOOK if fix else OK
        return Check("machine", "GPUs", state, "none that torch can use: models run on the CPU", fix)
    listed = ", ".join(f"{name} {size / 2**30:.0f} GiB" for name, size, _ in said)
    return Check("machine", "GPUs", OK, f"{listed} (CUDA {said[0][2]})")


def on_cpu(recipe: Recipe | TrainRecipe) -> list[str]:
    """The options, ready to be pasted, that take from a recipe what only GPUs can give."""
    from pipeline.recipe_file import setting

    if not trains(recipe):
        return [setting(["resources", n, "gpus"], 0) for n, r in recipe.resources.items() if r.gpus]
    cpu = {"precision": "fp32", "compile": "false", "activation_checkpointing": "none", "parallel": "ddp"}
    had = recipe.compute.model_dump(mode="json")
    return [setting(["compute", k], v) for k, v in cpu.items() if str(had[k]).lower() != v]


def video_encoder(recipe: Recipe | TrainRecipe) -> Check:
    """ffmpeg, and whether it can write what the recipe asks for; it is tried."""
    from pipeline.recipe import Cut, RecipeError

    cut = Cut() if trains(recipe) else recipe.cut  # a trainer writes its samples

    try:
        from pipeline.split.cut import CutStage

        stage = CutStage(cut, tempfile.gettempdir())
        stage.setup()
    except (RecipeError, ImportError) as e:
        return Check("programs", "ffmpeg", MISSING, str(e))
    release = ".".join(map(str, stage.version))
    return Check("programs", "ffmpeg", OK, f"{release}, encodes {cut.codec}, {stage.exe}")


def models(recipe: Recipe | TrainRecipe) -> Iterator[Check]:
    """Every model the recipe names and where it comes from; no weights are loaded or fetched."""
    from jobs.training import needs as for_training
    from pipeline.recipe import RecipeError
    from pipeline.run import needs

    for name, where in for_training.models(recipe) if trains(recipe) else needs.models(recipe):
        try:
            yield Check("models", name, OK, where())
        except RecipeError as e:
            yield Check("models", name, MISSING, str(e))
        except ImportError as e:
            yield Check("models", name, MISSING, f"{e}", "install the missing packages above")


def cluster(address: str) -> Check:
    """What a Ray cluster has to give."""
    said = ask(CLUSTER, address)
    if isinstance(said, str):
        fix = "start one: ray start --head, or correct --address; versions of Ray and Python must be the cluster's"
        return Check("cluster", address, MISSING, said, fix)
    nodes, has = said
    amounts = (
        f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, {has.get('memory', 0) / 2**30:.1f} GiB"
    )
    return Check("cluster", address, OK, f"{nodes} nodes: {amounts}")


def ask(code: str, *args: str) -> list | str:
    """What a Python of its own prints as JSON; or, as text, why it could not."""
    try:
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return "no answer within 90 s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- how it is shown


def plain(checks: list[Check]) -> Iterator[str]:
    """Lines with fixed columns, for files and pipes."""
    for c in checks:
        yield f"{c.state:8}{c.group:10}{c.name:32} {c.found}" + (f" -> {c.fix}" if c.fix else "")


def show(checks: list[Check]) -> None:
    """A table in colour, for a terminal; plain lines where rich is what is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("\n".join(plain(checks)))
        return
    colour = {OK: "green", LOOK: "yellow", MISSING: "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for overflow in ("fold", "ignore", "fold"):
        table.add_column(overflow=overflow)
    before = ""
    for c in checks:
        if c.group != before:
            table.add_row(Text(f"\n{c.group}", style="bold"), "", "")
            before = c.group
        said = Text(c.found)
        if c.fix:
            said.append(f"\n{c.fix}", style="bold")
        table.add_row(Text(f"  {c.name}"), Text(c.state, style=colour[c.state]), said)
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
