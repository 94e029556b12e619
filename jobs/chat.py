"""clipmill chat: a conversation with a vision–language or world model about videos and pictures, in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.speaking import Speaking
    from jobs.training.data.media import Visual

EPILOG = """
examples
  clipmill chat model/ --video ball.mp4
  clipmill chat model/ --video ball.mp4 --ask "What moves?" --ask "Which way?"
  clipmill chat model/ --image a.png --image b.png --ask "What is new in the second?"
  echo "What moves?" | clipmill chat model/ --video ball.mp4
  clipmill chat world/ --video ball.mp4 --ask "What moves?" --ask "Show me what comes next."
  clipmill chat world/ --video ball.mp4 --ask ""

MODEL is a folder that 'clipmill train vlm', 'clipmill train world' or 'clipmill export' wrote, or a published LLaVA or
Qwen-VL. With --ask, or where the input is no terminal, answers alone are printed, a line each. To serve many at once,
export the model and start 'transformers serve' or vLLM on the folder.

A world model may answer with pictures and videos, too: they are written into --out, and their names stand where they do
in the answer. One that was trained on no conversations (documents.chat) goes on from what it is shown and told: from a
clip alone, --ask "" or an empty line, with its caption.
"""

HELP = """Type a question, or
  /video FILE    show a clip with the next question
  /image FILE    show a picture with it
  /new           forget what was said; what was shown at the start stays
  /help          these lines
  /quit          leave (Ctrl-D, too)"""


def main(argv: list[str] | None = None) -> int:
    from jobs.training.paths import add_locate

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
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="for what a world model shows (default: this folder)",
    )
    add_locate(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    args = parser.parse_args(argv)

    try:
        talk = begin(args)
        if args.ask:
            answer_all(talk, args.ask)
        elif not sys.stdin.isatty():
            answer_all(talk, filter(talk.asks, map(str.strip, sys.stdin)))
        else:
            converse(talk)
    except (ValueError, OSError) as e:
        print(f"clipmill chat: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def begin(args: argparse.Namespace) -> Talk:
    """Raises ValueError, one sentence with the fix."""
    import torch

    from jobs.speaking import load
    from jobs.training.paths import located

    for name, least in (("frames", 1), ("most", 1), ("seed", 0), ("temperature", 0)):
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} {given:g}: give {least} or more")
    if args.fps is not None and args.fps <= 0:
        raise ValueError(f"--fps {args.fps:g}: give a rate above 0")
    for path in [*args.video, *args.image]:
        if not Path(path).is_file():
            raise ValueError(f"{path} is no file: give a video or picture")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speaker = load(args.model, device, located(args.locate))
    speaker.look_at(args.frames, args.fps)
    if not speaker.converses:
        print(
            f"{args.model} was trained on no conversations (documents.chat): it goes on from what it is shown and told",
            file=sys.stderr,
        )
    talk = Talk(speaker, args.most, args.temperature, args.seed, args.out)
    for kind, paths in (("video", args.video), ("image", args.image)):
        for path in paths:
            talk.show(kind, path)
    talk.first = list(talk.waiting)
    return talk


@dataclass
class Talk:
    """A conversation, whose pictures stand where they were shown.

    waiting: what is shown with the next question, as (mark, visual). first: what every conversation begins with.
    out: for what the model shows.
    """

    speaker: Speaking
    most: int | None = None
    temperature: float = 0.0
    seed: int = 0
    out: Path = Path()
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

    def asks(self, line: str) -> bool:
        """Whether what was typed is a question: an empty one, too, where there is something to go on from."""
        return bool(line) or (bool(self.waiting) and not self.speaker.converses)

    def ask(self, question: str) -> str:
        """What the model answers, with the names of files of what it shows. Raises ValueError where it is too much for
        it; then the question is taken back."""
        from models.language.chat import MARKS
        from models.language.exported import IMAGE, VIDEO

        text = MARKS.sub(" ", question).strip()  # what is typed shows nothing
        marks = "".join(f"{mark}\n" for mark, _ in self.waiting)
        messages = [*self.messages, {"role": "user", "content": marks + text}]
        visuals = [*self.visuals, *(visual for _, visual in self.waiting)]
        turn = sum(m["role"] == "user" for m in messages)
        said = self.speaker.reply(
            messages, visuals, most=self.most, temperature=self.temperature, seed=self.seed + turn
        )
        content = printed = ""
        for part in said:
            if isinstance(part, str):
                content += MARKS.sub(" ", part)
                printed += part
            else:
                content += VIDEO if part.seconds else IMAGE
                printed += f" [{written(self.out, part)}] "
                visuals.append(part)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self.visuals, self.waiting = visuals, []
        return printed if len(said) == 1 and isinstance(said[0], str) else printed.strip()

    def anew(self) -> None:
        self.messages, self.visuals, self.waiting = [], [], list(self.first)


def written(folder: Path, visual: Visual) -> Path:
    """The file that it is written into, of the next name that is free."""
    from PIL import Image

    from jobs.videos import write_mp4

    folder.mkdir(parents=True, exist_ok=True)
    pictures = visual.frames.permute(0, 2, 3, 1).numpy()
    kind = ".mp4" if visual.seconds else ".png"
    path = next(p for i in count(1) if not (p := folder / f"said-{i}{kind}").exists())
    if visual.seconds:
        write_mp4(path, pictures, len(pictures) / visual.duration)
    else:
        Image.fromarray(pictures[0]).save(path)
    return path


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
            elif talk.asks(line):
                print(talk.ask(line), flush=True)
        except (ValueError, OSError) as e:
            print(" ".join(str(e).split()))


if __name__ == "__main__":
    raise SystemExit(main())
