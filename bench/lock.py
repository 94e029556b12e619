"""Write requirements.lock from pyproject.toml: what pip resolves today, every version pinned.

    .venv/bin/python bench/lock.py

rapidocr asks for opencv-python, which needs the system's libGL; opencv-python-headless is the same
module without it, so only the latter is pinned and the lock is installed with --no-deps.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = {"clipmill", "opencv-python"}
# torch and torchvision come in pairs; what the resolver takes alone may be newer than its partner.
PAIR = ["torch==2.14.1", "torchvision==0.29.1"]


def main() -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    report = json.loads(subprocess.check_output([*command, *PAIR, f"{ROOT}[demo,dev]"], text=True))
    pins = {i["metadata"]["name"].lower(): i["metadata"]["version"] for i in report["install"]}
    lines = [f"{name}=={pins[name].split('+')[0]}" for name in sorted(pins) if name not in LEFT_OUT]
    header = "# Written by bench/lock.py; install with: pip install --no-deps -r requirements.lock"
    (ROOT / "requirements.lock").write_text("\n".join([header, *lines]) + "\n")
    print(f"{len(lines)} packages pinned")


if __name__ == "__main__":
    main()
