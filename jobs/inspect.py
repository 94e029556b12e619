"""clipmill inspect: look at a run in the browser: every clip with all its captions; vote, edit and compare."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.inspector.answers import Inspector

MOST_SAMPLE = 500  # clips: some 30 MB

EPILOG = """
Opens a page on this machine that shows RUN as it lies, also on s3:// or gs://: nothing is unpacked or copied. Stop it
with Ctrl-C. Votes and edits are kept in RUN/votes, line by line as they are made.

examples
  clipmill inspect run/
  clipmill inspect s3://bucket/run --port 9000
  clipmill inspect run/ other_run/             what differs, clip by clip
  clipmill inspect run/ --static sample.html   one file to mail, with a sample of 60 clips
  clipmill inspect run/ --static worst.html --view 'sort=agreement' --sample 100
  clipmill inspect run/ --host 0.0.0.0         others may look, too: with the token that is printed

exit status: 0 stopped; 2 the command or RUN is wrong
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill inspect",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="RUN", help="output folder of a run, also s3:// or gs://")
    parser.add_argument(
        "other", metavar="RUN2", nargs="?", help="another run, to compare it with clip by clip"
    )
    parser.add_argument("--port", type=int, default=8765, help="default: 8765, or the next that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--token", help="what others must know to look (default: made, with --host)")
    parser.add_argument("--static", metavar="FILE", help="write a sample as one HTML file, and serve nothing")
    parser.add_argument(
        "--sample", type=int, default=60, metavar="N", help="clips in that file (default: 60)"
    )
    parser.add_argument(
        "--view", metavar="FILTERS", help="which clips: what the page's address has behind '#'"
    )
    args = parser.parse_args(argv)

    import secrets

    from pipeline.faults import StoreError
    from pipeline.inspector.answers import Inspector
    from pipeline.inspector.guard import is_here
    from pipeline.inspector.index import Index
    from pipeline.inspector.query import Wrong
    from pipeline.io.store import Store

    if args.static:
        try:
            if not 1 <= args.sample <= MOST_SAMPLE:
                raise Wrong(f"--sample {args.sample}: from 1 to {MOST_SAMPLE} clips fit into one file")
            inspector = Inspector(Index(Store(args.dir)))
            print(write_static(inspector, args.static, args.view, args.sample))
        except (StoreError, OSError, Wrong) as e:
            print(f"clipmill inspect: {e}", file=sys.stderr)
            return 2
        return 0
    token = args.token or (None if is_here(args.host) else secrets.token_urlsafe(18))
    try:
        listening = listen(args.host, args.port)
        other = Inspector(Index(Store(args.other))) if args.other else None
        inspector = Inspector(Index(Store(args.dir)), other)
    except (StoreError, OSError) as e:
        print(f"clipmill inspect: {e}", file=sys.stderr)
        return 2
    inspector.start()
    port = listening.getsockname()[1]
    shown = "localhost" if is_here(args.host) else f"[{args.host}]" if ":" in args.host else args.host
    print(
        f"{len(inspector.index):,} clips: http://{shown}:{port}/" + (f"?token={token}" if token else ""),
        flush=True,
    )

    import uvicorn

    from pipeline.inspector.server import application

    config = uvicorn.Config(
        application(inspector, token),
        log_level="warning",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=1,  # a video that is being played must not keep it alive
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def write_static(inspector: Inspector, file: str, view: str | None, most: int) -> str:
    """A sample as one file; returns what to say of it. Raises Wrong, StoreError, OSError."""
    from pathlib import Path
    from urllib.parse import parse_qsl

    from pipeline.inspector.query import ONE, SEVERAL, Filters, Wrong
    from pipeline.inspector.static import page
    from pipeline.recipe_schema import nearest

    inspector.read()
    asked = parse_qsl((view or "").lstrip("#?"))
    known = ("range", *ONE, *SEVERAL)
    for name, _ in asked:  # an address holds other things too: which clip is open
        if name not in known and (meant := nearest(name, known)):
            raise Wrong(f"--view: there is no {name!r}{meant}; known here: {', '.join(known)}")
    filters = None if view is None else Filters.of(asked)
    text = page(inspector, filters, most)
    inspector.close()
    Path(file).write_text(text, encoding="utf-8")
    return f"{file}: {len(text.encode()) / 1e6:.1f} MB"


def listen(host: str, port: int) -> socket.socket:
    """A socket at that port, or at one of the next few where it is taken. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in range(port, port + 20):
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host.strip("[]"), number))
            listening.listen(128)
            return listening
        except OSError as e:
            listening.close()
            if number == port + 19 or e.errno != 98:
                raise OSError(
                    f"cannot listen at {host}:{port}: {e.strerror}; give another --port or --host"
                ) from e
    raise AssertionError


if __name__ == "__main__":
    raise SystemExit(main())
