"""clipmill chat: a conversation with a vision–language model about videos and pictures, in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.training.vlm.speaker import Speaker

EPILOG = """
examples
  clipmill chat model/ --video ball.mp4
  clipmill chat model/ --video ball.mp4 --ask "What moves?" --ask "Which way?"
  clipmill chat model/ --image a.png --image b.png --ask "What is new in the second?"
  echo "What moves?" | clipmill chat model/ --video ball.mp4

MODEL is a folder that 'clipmill train vlm' or 'clipmill export' wrote, or a published LLaVA or Qwen-VL. With --ask,
or where the input is no terminal, answers alone are printed, a line each. To serve many at once, export the model
and start 'transformers serve' or vLLM on the folder.
"""

HELP = """Type a question, or
  /video FILE    show a clip with the next question
  /image FILE    show a picture with it
  /new           forget what was said; what was shown at the start stays
  /help          these lines
  /quit          leave (Ctrl-D, too)"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill chat",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a trained, exported or published model")
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="a clip; may be repeated"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    parser.add_argument(
        "--ask", action="append", default=[], metavar="TEXT", help="ask this and leave; likewise"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="of a clip, at most (default: as it was trained)"
    )
    parser.add_argument("--fps", type=float, metavar="X", help="frames a second (default: as it was trained)")
    parser.add_argument(
        "--most", type=int, metavar="N", help="tokens of an answer (default: as it was trained)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    args = parser.parse_args(argv)

    try:
        talk = begin(args)
        if args.ask:
            answer_all(talk, args.ask)
        elif not sys.stdin.isatty():
            answer_all(talk, (line for line in sys.stdin if line.strip()))
        else:
            converse(talk)
    except (ValueError, OSError) as e:
        print(f"clipmill chat: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def begin(args: argparse.Namespace) -> Talk:
    """Raises ValueError, one sentence with the fix."""
    import torch

    from jobs.evaluation.looking import with_frames
    from jobs.training.vlm.speaker import load_speaker

    for name, least in (("frames", 1), ("most", 1), ("seed", 0), ("temperature", 0)):
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} {given:g}: give {least} or more")
    if args.fps is not None and args.fps <= 0:
        raise ValueError(f"--fps {args.fps:g}: give a rate above 0")
    for path in [*args.video, *args.image]:
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file: give a video or picture")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speaker = with_frames(load_speaker(args.model, device), args.frames, args.fps)
    talk = Talk(speaker, args.most, args.temperature, args.seed)
    for kind, paths in (("video", args.video), ("image", args.image)):
        for path in paths:
            talk.show(kind, path)
    talk.first = list(talk.waiting)
    return talk


@dataclass
class Talk:
    """A conversation, whose pictures stand where they were shown.

    waiting: what is shown with the next question, as (mark, visual). first: what every conversation begins with.
    """

    speaker: Speaker
    most: int | None = None
    temperature: float = 0.0
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    visuals: list[Any] = field(default_factory=list)
    waiting: list[tuple[str, Any]] = field(default_factory=list)
    first: list[tuple[str, Any]] = field(default_factory=list)

    def show(self, kind: str, path: str) -> str:
        """Show a video or an image with the next question; says what is looked at. Raises ValueError."""
        from models.language.exported import IMAGE, VIDEO
        from pipeline.shards.pixels import BrokenSample

        try:
            visual = self.speaker.frames(path) if kind == "video" else self.speaker.image(path)
        except BrokenSample as e:
            raise ValueError(f"{path} is no {kind} that can be read ({e}): give another") from e
        self.waiting.append((VIDEO if kind == "video" else IMAGE, visual))
        n = len(visual.frames)
        return (
            f"{path}: {n} frame{'s' if n > 1 else ''} of {visual.duration:.1f} s" if kind == "video" else path
        )

    def ask(self, question: str) -> str:
        """What the model answers. Raises ValueError where it is too much for it; then the question is taken back."""
        from models.language.chat import MARKS

        text = MARKS.sub(" ", question).strip()  # what is typed shows nothing
        marks = "".join(f"{mark}\n" for mark, _ in self.waiting)
        messages = [*self.messages, {"role": "user", "content": marks + text}]
        visuals = [*self.visuals, *(visual for _, visual in self.waiting)]
        turn = sum(m["role"] == "user" for m in messages)
        (said,) = self.speaker.answer(
            [messages], [visuals], most=self.most, temperature=self.temperature, seed=self.seed + turn
        )
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self.visuals, self.waiting = visuals, []
        return said

    def anew(self) -> None:
        self.messages, self.visuals, self.waiting = [], [], list(self.first)


def answer_all(talk: Talk, questions: Iterable[str]) -> None:
    for question in questions:
        print(talk.ask(question), flush=True)


def typed() -> Iterator[str]:
    """Lines of the terminal, until its end."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (what was typed before comes back with the arrow keys)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(talk: Talk, lines: Iterable[str] | None = None) -> None:
    """Until the person leaves; what goes wrong is said, and the conversation goes on."""
    print("/help says what can be typed")
    for line in typed() if lines is None else lines:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/help":
                print(HELP)
            elif command == "/new":
                talk.anew()
            elif command in ("/video", "/image"):
                if not Path(rest).expanduser().is_file():
                    raise ValueError(f"{rest or 'no file'}: give a file, {command} FILE")
                print(talk.show(command[1:], str(Path(rest).expanduser())))
            elif command.startswith("/"):
                print(f"{command} is no command; /help lists them")
            elif line:
                print(talk.ask(line), flush=True)
        except (ValueError, OSError) as e:
            print(" ".join(str(e).split()))


if __name__ == "__main__":
    raise SystemExit(main())
