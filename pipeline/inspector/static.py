"""A sample of a run as one HTML file that needs no server: the same page, with its data and stills inside.

The page's modules come as `data:` addresses of an import map, its answers as JSON in an element that is never run.
Nothing is loaded from anywhere, and the file's own policy forbids it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from pipeline.inspector.answers import WEB, Inspector
from pipeline.inspector.media import Gone
from pipeline.inspector.query import Filters
from pipeline.report.data import evenly

SAMPLE = 60  # clips
STILLS = 4  # a clip
SIDE = 360  # pixels, the longer one
_IMPORT = re.compile(r"""(\bfrom\s*|\bimport\s*\(?\s*)(["'])\./([\w.-]+\.js)\2""")
_SCRIPT = re.compile(r"""<script[^>]*\bsrc=["']/?(?:\./)?([\w.-]+)["'][^>]*>\s*</script>""")
_STYLE = re.compile(r"""<link[^>]*\bhref=["']/?(?:\./)?([\w.-]+\.css)["'][^>]*>""")


def page(inspector: Inspector, view: Filters | None = None, most: int = SAMPLE) -> str:
    """The file's text. Raises Wrong for filters that cannot be answered, StoreError.

    Args:
        view: the first clips of it, in its order; none: clips spread evenly over the run.
    """
    every = inspector.query.found(view or Filters()).rows.tolist()
    rows = every[:most] if view is not None else evenly(every, most)
    inspector.near.wait()
    clips = []
    for row in rows:
        count = max(inspector.index.still_count(row), 1)
        stills = [_still(inspector, row, k) for k in evenly(range(count), STILLS)]
        clips.append(inspector.clip(row) | {"images": [s for s in stills if s]})
    data = {"run": inspector.run(), "clips": clips, "of": len(every), "rules": inspector.index.rules}
    return _assembled(data)


def _still(inspector: Inspector, row: int, k: int) -> str:
    """A small JPEG as a data: address; '' where there is none."""
    import cv2
    import numpy as np

    try:
        jpeg = inspector.media.still(row, k)
    except Gone:
        return ""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        return ""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 72])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _assembled(data: dict[str, Any]) -> str:
    """index.html with its styles, modules and data inside."""
    files = {p.name: p for p in WEB.glob("*") if p.is_file()}
    text = files["index.html"].read_text(encoding="utf-8")
    entry = ""

    def script(found: re.Match[str]) -> str:
        nonlocal entry
        entry = found[1]
        return ""

    def style(found: re.Match[str]) -> str:
        return f"<style>{_read(files[found[1]])}</style>" if found[1] in files else ""

    text = _STYLE.sub(style, _SCRIPT.sub(script, text))
    modules = {f"clipmill/{n}": _module(files[n]) for n in sorted(files) if n.endswith(".js")}
    scripts = {
        'type="importmap"': json.dumps({"imports": modules}),
        'type="module"': f'import "clipmill/{entry}";',
    }
    allowed = " ".join(f"'sha256-{_sha256(s)}'" for s in scripts.values())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    policy += f"script-src {allowed} data:"
    head = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
    at = text.lower().find("<head>")
    text = text[: at + 6] + head + text[at + 6 :] if at >= 0 else head + text
    body = f'<script type="application/json" id="static-data">{_json(data)}</script>'
    body += "".join(f"<script {kind}>{code}</script>" for kind, code in scripts.items())
    end = text.lower().rfind("</body>")
    return text[:end] + body + text[end:] if end >= 0 else text + body


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _module(path: Path) -> str:
    """A module as a data: address; what it imports beside itself is found by the import map."""
    text = _IMPORT.sub(r"\1\2clipmill/\3\2", _read(path))
    return f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"


def _json(data: Any) -> str:
    """JSON that ends no element and begins none: in it, '<' is written \\u003c."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
