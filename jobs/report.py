"""clipmill report: one HTML page of a run: funnel, histograms, contact sheets, errors, times."""

from __future__ import annotations

import argparse
import sys

EPILOG = """
The page is DIR/report.html, a single file that opens offline and can be sent to anyone. 'clipmill curate'
writes it at the end of a run; write it again after 'clipmill shard', or while a run is still going.

examples
  clipmill report run/
  clipmill report s3://bucket/run
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill report",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", metavar="DIR", help="output folder of a run, also s3:// or gs://")
    args = parser.parse_args(argv)

    from pipeline.faults import StoreError
    from pipeline.io.store import Store
    from pipeline.report import page as report

    try:
        print(report.write(Store(args.dir)))
    except (StoreError, OSError) as e:
        print(f"clipmill report: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
