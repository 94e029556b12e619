"""How an evaluation ends: what it found is kept in a file and shown, or one sentence says why there is nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def told(evaluate: Callable[[], tuple[Result, Path]], shown: Callable[[Result], str]) -> int:
    """The exit status.

    Args:
        evaluate: everything that is printed and written, and the file; raises what is caught here, a sentence each.
        shown: what a reader of the terminal sees.
    """
    from models.hub import MissingModel
    from pipeline.faults import StoreError
    from pipeline.shards.reader import BrokenSample

    try:
        result, out = evaluate()
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except (ValueError, StoreError, MissingModel, BrokenSample, OSError) as e:
        print(f"clipmill eval: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    print(shown(result))
    print(f"written to {out}")
    return 0
