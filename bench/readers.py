"""How many samples each reader of WebDataset shards finds, and whether Megatron-Energon opens them.

    python -m bench.readers DIR                    # DIR/shards as clipmill's own reader, webdataset, … see it
    python -m bench.readers DIR --energon PYTHON   # and Energon, in a virtual environment of its own

Energon pins its dependencies, so it gets its own environment:
`python -m venv energon && energon/bin/pip install megatron-energon`, then `--energon energon/bin/python`.
It wants its index beside the tars, which `energon prepare` makes; this works on a copy of the shards (hard
links) and leaves DIR as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

# Run by the other environment's Python: index the tars without questions, then read one epoch.
ENERGON = """
import subprocess, sys
from pathlib import Path
from megatron.energon import (
    Cooker, DefaultTaskEncoder, TextSample, WorkerConfig, basic_sample_keys, get_loader, get_val_dataset, stateless
)

folder = sys.argv[1]
options = "--non-interactive --split-ratio 1,0,0 --num-workers 2 --no-progress --sample-type CrudeWebdataset"
subprocess.run(
    [Path(sys.executable).parent / "energon", "prepare", *options.split(), folder], check=True, stdout=sys.stderr
)

@stateless
def cook(sample):
    assert sample["mp4"][4:8] == b"ftyp" and sample["json"]
    return TextSample(**basic_sample_keys(sample), text=sample["txt"].decode())

class Encoder(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_val_dataset(folder, split_part="train", worker_config=workers, batch_size=None, task_encoder=Encoder())
for sample in get_loader(dataset):
    print(sample.__key__)
"""


def own(shards: Path) -> set[str]:
    from pipeline.shards.reader import ShardReader

    return {s["key"] for s in ShardReader(str(shards), decode=False, shuffle=False)}


def webdataset(shards: Path) -> set[str]:
    import webdataset as wds

    return {s["__key__"] for s in wds.WebDataset(_tars(shards), shardshuffle=False)}


def wids(shards: Path) -> set[str]:
    import wids

    with tempfile.TemporaryDirectory() as cache:
        dataset = wids.ShardListDataset(
            str(shards / "wids.json"), cache_dir=cache, keep=True, transformations=[]
        )
        return {dataset[i]["__key__"] for i in range(len(dataset))}


def hugging_face(shards: Path) -> set[str]:
    import datasets

    dataset = datasets.load_dataset("webdataset", data_files=_tars(shards), split="train", streaming=True)
    return {s["__key__"] for s in dataset.select_columns(["__key__"])}


def _tars(shards: Path) -> list[str]:
    return sorted(str(p) for p in shards.rglob("*.tar"))


def energon(python: str) -> Callable[[Path], set[str]]:
    def read(shards: Path) -> set[str]:
        with tempfile.TemporaryDirectory(dir=shards.parent) as folder:
            for tar in shards.rglob("*.tar"):
                link = Path(folder) / tar.relative_to(shards)
                link.parent.mkdir(exist_ok=True)
                link.hardlink_to(tar)
            done = subprocess.run(
                [python, "-c", ENERGON, folder], capture_output=True, text=True, check=False
            )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return set(done.stdout.split())

    return read


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path, help="a finished run")
    parser.add_argument(
        "--energon", metavar="PYTHON", help="python of an environment that has megatron-energon"
    )
    args = parser.parse_args()
    readers: dict[str, Callable[[Path], set[str]]] = {
        "clipmill": own,
        "webdataset": webdataset,
        "wids": wids,
        "datasets": hugging_face,
    }
    if args.energon:
        readers["megatron-energon"] = energon(args.energon)
    expected: set[str] = set()
    agree = True
    for name, read in readers.items():
        try:
            found = read((args.dir / "shards").resolve())
        except ImportError as e:
            print(f"{name:18} skipped: {e}")
            continue
        expected = expected or found
        agree &= found == expected
        print(f"{name:18} {len(found):>9,} samples{'' if found == expected else '   NOT the same keys'}")
    if not args.energon:
        print("megatron-energon   skipped: give --energon PYTHON")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
