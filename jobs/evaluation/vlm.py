"""clipmill eval vlm: what a vision–language or world model says of videos, against what people or the run say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.benchmarks.formats import FORMATS
from jobs.evaluation.told import told

if TYPE_CHECKING:
    from jobs.benchmarks.items import Found, Item
    from jobs.evaluation.answers import Answers
    from jobs.evaluation.needle import Trial
    from jobs.evaluation.numbers import Number
    from jobs.speaking import Speaking

AskedT = TypeVar("AskedT", bound="Item | Trial")

_EPILOG = """
examples
  clipmill eval vlm captioner/ captions --against run/ --n 500
  clipmill eval vlm captioner/ captions --against MSR-VTT/ --format msr-vtt
  clipmill eval vlm captioner/ probability --against run/
  clipmill eval vlm captioner/ retrieval --against MSR-VTT/ --format msr-vtt
  clipmill eval vlm selector.pt retrieval --against MSR-VTT/ --format msr-vtt
  clipmill eval vlm captioner/ questions --against NExT-QA/ --format next-qa --by likelihood
  clipmill eval vlm captioner/ questions --against toy/questions --format questions --blind
  clipmill eval vlm captioner/ needle --against run/ --lengths 4,16,64
  clipmill eval vlm world/ captions --against run/
  clipmill eval vlm world/ needle --against run/ --by words

MODEL is a folder that 'clipmill train vlm', 'clipmill train world' or 'clipmill export' wrote. --against is a run of
'clipmill curate', or a folder with a benchmark's own files and videos, as it is published:

{formats}

what is measured
  captions      CIDEr-D, BLEU, ROUGE-L, METEOR (where METEOR_JAR says its program is), the share that is word for word
  probability   of the captions that are there: nats each, bits a token; how often a video's own beats another's
  retrieval     R@1, R@5, R@10 both ways, by likelihood (N videos cost N × N likelihoods: see --n), or by a selector
                of 'clipmill train selector' that is named as MODEL
  questions     multiple choice by what it says (letter), by the likeliest letter (likelihood), or by the likeliest
                words of an option after the bare question (words); open ones by exact match and, but for case,
                punctuation and articles, normalised accuracy (no WUPS). --blind shows no video: what can be guessed.
                --subtitles tells those at the frames that are shown, as Video-MME asks
  needle        one clip among many in a long video, and which of --options captions is one of its

A world model that was trained on conversations (documents.chat) is asked in their layout, USER: … ASSISTANT: …; any
other writes its caption after a clip without a prompt, and has captions, probability and needle --by words; eval.json
says which. Its pixels become codes of its VQ autoencoder: --locate says where that is, if it was moved.

OUT has answers.jsonl, a line an item, written as it is said: the same command goes on where it was stopped. What
decides the numbers (frames, prompt, decoding, weights) is in eval.json; compare numbers of one protocol only.
"""

EPILOG = _EPILOG.format(
    formats="\n".join(f"  --format {name:12} {known.about}" for name, known in FORMATS.items())
)
WHAT = ("captions", "probability", "retrieval", "questions", "needle")
# Which options an evaluation looks at, beside those that say what is looked at and where answers go.
USES = {
    "captions": {"frames", "fps", "prompt", "most", "temperature", "batch"},
    "probability": {"frames", "fps", "prompt", "batch"},
    "retrieval": {"frames", "fps", "prompt"},
    "retrieval by a selector": set[str](),
    "questions": {"frames", "fps", "by", "blind", "subtitles", "most", "batch"},
    "needle": {"frames", "by", "lengths", "depths", "trials", "options"},
}
NEEDLE_BY = {"letter": {"most"}, "likelihood": set[str](), "words": {"prompt"}}
DEFAULTS = {"lengths": "4,16", "depths": 5, "trials": 20, "options": 4, "temperature": 0.0, "batch": 8}
PLENTY = 1000  # videos from which retrieval by likelihood needs --n


def add(parser: argparse.ArgumentParser) -> None:
    """The options of `clipmill eval vlm`."""
    from jobs.training.paths import add_locate

    parser.add_argument("model", metavar="MODEL", help="folder of a trained or exported model")
    parser.add_argument("what", choices=WHAT, metavar="WHAT", help=f"{', '.join(WHAT)}: see below")
    parser.add_argument(
        "--against", required=True, metavar="DIR", help="a run, its shards, or a benchmark's folder"
    )
    parser.add_argument(
        "--format", choices=FORMATS, metavar="NAME", help="of a benchmark's folder: see below"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="of the benchmark (default: the one that papers report)"
    )
    parser.add_argument("--n", type=int, metavar="N", help="so many items, drawn by --seed (default: all)")
    parser.add_argument(
        "--frames", type=int, metavar="N", help="of a video, at most (default: as it was trained)"
    )
    parser.add_argument("--fps", type=float, metavar="X", help="frames a second (default: as it was trained)")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="for captions, and wherever these are weighed (default: the first it was trained with)",
    )
    parser.add_argument(
        "--by", choices=["letter", "likelihood", "words"], help="how options are chosen (default: letter)"
    )
    parser.add_argument(
        "--blind", action="store_true", default=None, help="show no video: what can be guessed"
    )
    parser.add_argument(
        "--subtitles",
        action="store_true",
        default=None,
        help="tell what the video's .srt has at the frames that are shown",
    )
    parser.add_argument("--lengths", metavar="N,N", help="needle: clips of a video (default: 4,16)")
    parser.add_argument("--depths", type=int, metavar="N", help="needle: places of it (default: 5)")
    parser.add_argument("--trials", type=int, metavar="N", help="needle: of each place (default: 20)")
    parser.add_argument(
        "--options", type=int, metavar="N", help="needle: captions to choose from (default: 4)"
    )
    parser.add_argument(
        "--most", type=int, metavar="N", help="tokens of an answer (default: as it was trained)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--batch", type=int, metavar="N", help="items at a time (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    add_locate(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="(MODEL/eval-WHAT-NAME)")


def run(args: argparse.Namespace) -> int:
    def kept() -> tuple[dict[str, Any], Path]:
        check(args)
        result, out = evaluate(args)
        return result, out / "eval.json"

    return told(kept, shown)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that mean nothing, before anything is loaded."""
    from jobs.evaluation.by_selector import file_of

    if file_of(args.model) is not None and args.what != "retrieval":
        raise ValueError(f"{args.model} is a selector, which is measured by retrieval alone")
    if not Path(args.model).is_dir() and file_of(args.model) is None:
        raise ValueError(
            f"{args.model} is no folder: give what 'clipmill train vlm', 'clipmill train world' or 'clipmill export' "
            "wrote"
        )
    useful(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"n": 1, "frames": 1, "depths": 1, "trials": 1, "options": 2, "most": 1, "batch": 1, "seed": 0}
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and given < value:
            raise ValueError(f"--{name} {given}: give {value} or more")
    if args.fps is not None and args.fps <= 0:
        raise ValueError(f"--fps {args.fps:g}: give a rate above 0")
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature:g}: give 0 or more")
    lengths(args.lengths)
    if args.what == "questions" and args.format is None:
        raise ValueError("questions: a run has none; give --format and its folder")
    if args.split is not None and args.format is None:
        raise ValueError("--split is of a benchmark: name it with --format")


def useful(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that is given and changes nothing of what is asked for."""
    from jobs.evaluation.by_selector import file_of

    what, used = args.what, USES[args.what]
    if what == "needle":
        by = args.by or "letter"
        what, used = f"needle by {by}", used | NEEDLE_BY[by]
    elif file_of(args.model) is not None:
        what = "retrieval by a selector"
        used = USES[what]
    for name in sorted({*(n for some in USES.values() for n in some)} - used):
        if getattr(args, name) is not None:
            able = [w for w, names in USES.items() if name in names]
            able += [f"needle by {by}" for by, names in NEEDLE_BY.items() if name in names]
            raise ValueError(
                f"--{name} changes nothing of {what}: leave it out (it is for {', '.join(able)})"
            )


def lengths(text: str) -> list[int]:
    """Raises ValueError."""
    parts = text.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"--lengths {text}: give numbers of clips, such as 4,16,64")
    return [int(p) for p in parts]


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Everything that is printed and written, and where to. Raises what `main` catches, one sentence each."""
    import torch

    from jobs.evaluation.by_selector import file_of
    from jobs.evaluation.looking import drawn, named, weights_of
    from jobs.speaking import load
    from jobs.training.paths import located
    from jobs.training.world.system import last_stage

    found, split = items_of(args)
    items = drawn(found.items, args.n, args.seed)
    notes = list(filter(None, [found.note()]))
    if file := file_of(args.model):
        return selected(args, file, items, split, notes)
    if args.what == "retrieval" and len(items) > PLENTY and args.n is None:
        raise ValueError(
            f"retrieval by likelihood of {len(items):,} videos takes {len(items) ** 2:,} likelihoods: give --n"
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    speaker = load(args.model, device, located(args.locate))
    by = args.by or "letter"
    if why := speaker.refuses(args.what, by):
        raise ValueError(f"{args.model}: {why}")
    speaker.look_at(args.frames, args.fps)
    prompt = args.prompt or speaker.prompts[0]
    most = args.most or speaker.most
    protocol: dict[str, Any] = {"what": args.what, "format": args.format or "run", "split": split}
    protocol |= {
        "items": named(items),
        "weights": weights_of(last_stage(Path(args.model))),
        **speaker.protocol(),
    }
    if args.what == "questions":
        protocol |= {"by": by, "blind": bool(args.blind)} | ({"subtitles": True} if args.subtitles else {})
        notes += about_questions(args, items)
    else:
        protocol |= {"prompt": prompt}
    if args.what == "needle":
        protocol |= {"by": by, "lengths": lengths(args.lengths), "depths": args.depths}
        protocol |= {"trials": args.trials, "options": args.options}
    if args.what in ("captions", "questions", "needle"):
        protocol |= {"temperature": args.temperature, "most": most}
    if args.n is not None or args.temperature or args.what == "needle":
        protocol |= {"seed": args.seed}
    numbers, out = measured(args, speaker, items, protocol, prompt, most, by, notes)
    told = {"model": args.model, "against": args.against, "protocol": protocol}
    return told | {"numbers": numbers, "notes": notes}, out


def about_questions(args: argparse.Namespace, items: Sequence[Item]) -> list[str]:
    """Notes on what is asked. Raises ValueError where subtitles are to be told and there are none."""
    notes = []
    if args.format == "next-qa" and any(not item.options for item in items):
        notes.append(
            "No WUPS, NExT-QA's own measure of open answers: it needs WordNet, a tagger and a list of stop words that "
            "no installed package has. Exact match and normalised accuracy do not compare with it."
        )
    if args.subtitles:
        without = {str(item.video) for item in items if item.subtitles is None}
        if all(item.subtitles is None for item in items):
            raise ValueError(
                f"--subtitles: {args.against} has no .srt file named as one of its videos; Video-MME's lie in subtitle/"
            )
        if without:
            notes.append(f"Asked without subtitles, as there are none: {len(without):,} videos.")
    return notes


def selected(
    args: argparse.Namespace, file: Path, items: Sequence[Item], split: str, notes: list[str]
) -> tuple[dict[str, Any], Path]:
    """Retrieval by a selector."""
    from hashlib import blake2b

    import torch

    from jobs.evaluation import by_selector
    from jobs.evaluation.answers import Answers
    from jobs.evaluation.looking import named, teller
    from models.choosing.chooser import Chooser

    chooser = Chooser.load(file, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    protocol: dict[str, Any] = {
        "what": "retrieval by selector",
        "format": args.format or "run",
        "split": split,
    }
    protocol |= {"items": named(items), "weights": blake2b(file.read_bytes(), digest_size=6).hexdigest()}
    protocol |= {"frames": chooser.frames} | ({"seed": args.seed} if args.n is not None else {})
    out = args.out or file.parent / f"eval-retrieval-{args.format or 'run'}"
    answers = Answers(out, protocol)
    by_selector.look(chooser, items, answers, teller("videos"))
    sound(items, answers, notes)
    numbers = by_selector.figures(chooser, items, answers)
    told = {"model": args.model, "against": args.against, "protocol": protocol}
    return told | {"numbers": numbers, "notes": notes}, out


def items_of(args: argparse.Namespace) -> tuple[Found, str]:
    """Raises BenchmarkError or StoreError."""
    from jobs.benchmarks.formats import read
    from jobs.benchmarks.own import clips

    if args.format is None:
        found = clips(args.against)
        found.items = [item for item in found.items if item.captions[0].strip()]
        if not found.items:
            raise ValueError(f"{args.against}: no clip has a caption")
        return found, "kept clips with a caption"
    wanted = {"questions": "questions", "retrieval": "retrieval"}.get(args.what, "captions")
    return read(args.format, Path(args.against), wanted, args.split)


def measured(
    args: argparse.Namespace,
    speaker: Speaking,
    items: Sequence[Item],
    protocol: dict[str, Any],
    prompt: str,
    most: int,
    by: Any,
    notes: list[str],
) -> tuple[list[Number], Path]:
    """Ask what is not answered yet, and count."""
    from jobs.evaluation import captions, needle, questions, retrieval
    from jobs.evaluation.answers import Answers
    from jobs.evaluation.looking import teller

    out = args.out or Path(args.model) / f"eval-{args.what}-{args.format or 'run'}"
    made = []
    if args.what == "needle":
        of = lengths(args.lengths)
        made = needle.trials(items, of, args.depths, args.trials, args.options, args.seed)
        frames = args.frames or speaker.most_frames
        if (every := frames * max(of)) > speaker.most_frames:
            speaker.look_at(every, None)
        notes += filter(None, [speaker.beyond(every)])
    answers = Answers(out, protocol)
    tell = teller(args.what)
    if args.what == "captions":
        captions.say(
            speaker,
            items,
            answers,
            prompt=prompt,
            most=most,
            temperature=args.temperature,
            seed=args.seed,
            batch=args.batch,
            tell=tell,
        )
        return captions.figures(sound(items, answers, notes)[1], notes), out
    if args.what == "probability":
        captions.weigh(speaker, items, answers, prompt=prompt, batch=args.batch, tell=tell)
        return captions.probability(sound(items, answers, notes)[1]), out
    if args.what == "retrieval":
        retrieval.weigh(speaker, items, answers, prompt=prompt, tell=tell)
        sound(items, answers, notes)
        return retrieval.figures(items, answers), out
    if args.what == "questions":
        questions.ask(
            speaker,
            items,
            answers,
            by=by,
            blind=bool(args.blind),
            most=most,
            batch=args.batch,
            tell=tell,
            subtitles=bool(args.subtitles),
        )
        return questions.figures(*sound(items, answers, notes)), out
    needle.ask(speaker, items, made, answers, by=by, frames=frames, prompt=prompt, most=most, tell=tell)
    return needle.figures(*sound(made, answers, notes), len(made), args.options), out


def sound(
    asked: Sequence[AskedT], answers: Answers, notes: list[str]
) -> tuple[list[AskedT], list[dict[str, Any]]]:
    """Items or trials whose video could be read, and their answers; of the others there is a note.

    Raises ValueError where there are none.
    """
    there = [one for one in asked if "broken" not in answers.told[one.id]]
    if gone := [one for one in asked if "broken" in answers.told[one.id]]:
        why = answers.told[gone[0].id]["broken"]
        notes.append(
            f"Left out, as their video cannot be read: {len(gone):,} of {len(asked):,}, the first {gone[0].id} ({why})."
        )
    if not there:
        raise ValueError(f"no video can be read, the first: {asked[0].id}: {why}")
    return there, answers.of(one.id for one in there)


def shown(result: dict[str, Any]) -> str:
    """What a reader of the terminal sees."""
    from jobs.evaluation.numbers import table

    protocol = ", ".join(f"{k} {'none' if v == '' else v}" for k, v in result["protocol"].items())
    lines = [f"{result['model']} against {result['against']}", protocol, "", table(result["numbers"])]
    return "\n".join([*lines, "", *result["notes"]]).rstrip()
