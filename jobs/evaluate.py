"""clipmill eval: how good a trained model is, with the protocol of every number."""

from __future__ import annotations

import argparse

from jobs.evaluation import diffusion, vlm, vq

EPILOG = """
examples
  clipmill eval diffusion model/ --against run/shards --n 256
  clipmill eval vlm captioner/ captions --against run/ --n 500
  clipmill eval vq codes/ --against run/

clipmill eval KIND --help has the options of each.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill eval",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module, about in (
        ("diffusion", diffusion, "how far a model's videos are from real ones"),
        ("vlm", vlm, "captions, retrieval, questions and needles of a vision–language or world model"),
        ("vq", vq, "how well a VQ autoencoder gives clips back"),
    ):
        module.add(
            kinds.add_parser(
                name,
                help=about,
                description=module.__doc__,
                epilog=module.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    args = parser.parse_args(argv)
    run = {"diffusion": diffusion.run, "vlm": vlm.run, "vq": vq.run}[args.kind]
    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
