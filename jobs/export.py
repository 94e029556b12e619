"""clipmill export: a trained model as others read it, in the layout of transformers."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

EPILOG = """
MODEL is a folder that 'clipmill train' wrote; of its weights the longest average is taken. FOLDER is what
transformers loads, without clipmill: a vision-language model (trains: vlm) as LLaVA, LLaVA-OneVision or Qwen-VL with
its processor and chat template, adapters folded in; a world model as LLaMA, its visual embedding and head beside it.

examples
  clipmill export model/ --to student/
  clipmill caption run/ --set 'captions=[{kind: transformers, name: student, model: student/, frames: 8}]'
  transformers serve student/
"""

FOLDER = "FOLDER"  # in what is said: where it lies in the end
EXPORTS = {  # trains → the module whose `export(model, to, dtype)` writes it
    "vlm": "jobs.training.vlm.export",
    "world": "jobs.training.world.export",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill export",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder that 'clipmill train' wrote")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the weights (default: float32)",
    )
    args = parser.parse_args(argv)

    from pipeline.faults import StoreError

    try:
        print(export(args.model, args.to, args.dtype))
    except (StoreError, ValueError, OSError) as e:
        print(f"clipmill export: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def export(model: Path, to: Path, dtype: str = "float32") -> str:
    """Write the folder, all or nothing; returns what to say of it. Raises ValueError, StoreError, OSError."""
    import shutil

    from jobs.training.exported import publish
    from jobs.videos import taken

    if not (model / "model.json").is_file():
        raise ValueError(f"{model} holds no model.json: give a folder that clipmill train wrote")
    try:
        trains = json.loads((model / "model.json").read_text())["recipe"]["trains"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"{model}/model.json is broken: copy the folder again from where it was trained"
        ) from e
    if trains not in EXPORTS:
        raise ValueError(
            f"{model} is a {trains} model, which has no layout of transformers; {', '.join(EXPORTS)} have one"
        )
    if taken(to):
        raise ValueError(f"--to {to}: it is there already; give a new or empty folder")
    aside = to.with_name(f"{to.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        said: str = import_module(EXPORTS[trains]).export(model, aside, dtype)
        if to.is_dir():
            to.rmdir()
        publish(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{to}: {said}".replace(FOLDER, str(to))


if __name__ == "__main__":
    raise SystemExit(main())
