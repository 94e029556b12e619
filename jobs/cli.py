"""The `clipmill` command: one word picks the job; each job is a file here and imports only what it needs."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

JOBS = {
    "curate": "raw videos in, captioned WebDataset shards out",
    "caption": "add captioners and judges to a finished run, from its own clips",
    "captions": "what a run's captioners did, what they cost, and which to keep",
    "shard": "decide again on a finished run and re-pack, without any model",
    "report": "one HTML page of a run: funnel, histograms, contact sheets, errors",
    "inspect": "look at a run in the browser, clip by clip: captions compared, votes, edits",
    "train": "video diffusion, autoencoders, VLMs, a world model, a selector, from a run's shards",
    "export": "a trained model as transformers reads it",
    "encode": "latents and text of a run, once, so that training decodes nothing",
    "sample": "videos from a trained diffusion or world model",
    "eval": "how good a model is: videos it makes, what it says of videos",
    "chat": "a conversation with a vision–language or world model about videos and pictures",
    "toy": "raw videos of a small world whose truth is known",
    "judge": "whether a model that learned that world draws what the captions say",
    "recipe": "show a recipe whole, explain its options, check a file of your own",
    "doctor": "what is installed, which models a recipe needs, GPUs, the cluster",
    "demo": "all of it on a minute of real footage",
    "completion": "TAB completes jobs, options and recipes in bash, zsh and fish",
}

MODULES = {"eval": "evaluate"}  # a name that Python has taken

HELP = """usage: clipmill JOB [options]     (-h: this text, -V: the version)

clipmill turns raw videos into captioned clips and trains models on them.

{jobs}

Start with:   clipmill demo
Your videos:  clipmill curate my_videos/ --recipe embedded --out run/
More:         clipmill JOB --help
"""


class WithoutPandas:
    """An import finder that says pandas is not installed.

    pyarrow imports it, where it is, just to see whether an array might be one of its own: half a second,
    a third of the work of `clipmill shard`, which has no use for it.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("not needed here")


def main(argv: list[str] | None = None) -> int:
    """Run a job. A reader of the output that goes away (`| head`) ends it without a word."""
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be flushed
        return 141  # as a shell reports SIGPIPE


def run(argv: list[str] | None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP.format(jobs="\n".join(f"  {name:10} {what}" for name, what in JOBS.items())))
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"clipmill {version('clipmill')}")
        return 0
    if args[0] not in JOBS:
        close = difflib.get_close_matches(args[0], JOBS, 1, 0.5)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        print(f"clipmill: no job named {args[0]!r}{meant}; the jobs are {', '.join(JOBS)}", file=sys.stderr)
        return 2
    if argv is None and args[0] == "shard":
        sys.meta_path.insert(0, WithoutPandas())
    return importlib.import_module(f"jobs.{MODULES.get(args[0], args[0])}").main(args[1:])


def leave(job: Callable[[], int] | None = None) -> NoReturn:
    """A job as a process: what it returns is the exit status.

    Once Ray was there, the process ends at once: taking down Ray's C++ side at exit now and then aborts (SIGABRT),
    which would turn a finished run into a failed one.
    """
    status = (job or main)()
    if "ray" in sys.modules:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


if __name__ == "__main__":
    leave()
