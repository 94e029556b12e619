"""clipmill inspect: look at a run in the browser: every clip with all its captions; vote, edit and compare."""

from __future__ import annotations

import argparse
import socket
import sys

EPILOG = """
Opens a page on this machine that shows RUN as it lies, also on s3:// or gs://: nothing is unpacked or copied. Stop it
with Ctrl-C. Votes and edits are kept in RUN/votes, line by line as they are made.

examples
  clipmill inspect run/
  clipmill inspect s3://bucket/run --port 9000
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
    parser.add_argument("--port", type=int, default=8765, help="default: 8765, or the next that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--token", help="what others must know to look (default: made, with --host)")
    args = parser.parse_args(argv)

    import secrets

    from pipeline.faults import StoreError
    from pipeline.inspector.guard import is_here
    from pipeline.inspector.index import Index
    from pipeline.inspector.server import Inspector, application
    from pipeline.io.store import Store

    token = args.token or (None if is_here(args.host) else secrets.token_urlsafe(18))
    try:
        listening = listen(args.host, args.port)
        inspector = Inspector(Index(Store(args.dir)))
    except (StoreError, OSError) as e:
        print(f"clipmill inspect: {e}", file=sys.stderr)
        return 2
    inspector.start()
    port = listening.getsockname()[1]
    shown = "localhost" if is_here(args.host) else args.host
    print(
        f"{len(inspector.index):,} clips: http://{shown}:{port}/" + (f"?token={token}" if token else ""),
        flush=True,
    )

    import uvicorn

    config = uvicorn.Config(
        application(inspector, token), log_level="warning", server_header=False, ws="none"
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


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
