"""clipmill completion: TAB completes jobs, options and recipes in bash, zsh and fish."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

EPILOG = """
Put the line of your shell into its start file:

  eval "$(clipmill completion bash)"            # ~/.bashrc
  eval "$(clipmill completion zsh)"             # ~/.zshrc, after compinit
  clipmill completion fish | source             # ~/.config/fish/config.fish
"""

RECIPES = {
    "train": ("training",),
    "encode": ("training",),
    "doctor": ("", "training"),
    "recipe": ("", "training"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill completion",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])
    args = parser.parse_args(argv)
    found = list(commands())
    if args.shell == "fish":
        print("\n".join(fish(found)))
    else:
        print(("autoload -U +X bashcompinit && bashcompinit\n" if args.shell == "zsh" else "") + bash(found))
    return 0


# ---------------------------------------------------------------- what there is to complete


@dataclass
class Command:
    """A job, or one of its tasks: 'curate', 'recipe show'."""

    name: str
    about: str
    words: list[str] = field(default_factory=list)  # what may stand first; [KEYS]: asked when TAB is pressed
    options: dict[str, str] = field(default_factory=dict)  # '--out' → what it does
    values: dict[str, list[str]] = field(default_factory=dict)  # '--runner' → its choices; [] for any value


def commands() -> Iterator[Command]:
    """Every job as its own parser has it."""
    from jobs.cli import JOBS

    for job, about in JOBS.items():
        yield from _of_parser(job, about, parser_of(job))


def parser_of(job: str) -> argparse.ArgumentParser:
    """The parser that a job makes, taken when it is about to read the command line: before any work."""
    from jobs.cli import MODULES

    class Taken(Exception):
        pass

    def take(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise Taken(parser)

    module = importlib.import_module(f"jobs.{MODULES.get(job, job)}")
    with mock.patch.object(argparse.ArgumentParser, "parse_args", take):
        try:
            module.main([])
        except Taken as e:
            parser: argparse.ArgumentParser = e.args[0]
            return parser
    raise AssertionError(f"clipmill {job} reads no command line")


def _of_parser(name: str, about: str, parser: argparse.ArgumentParser) -> Iterator[Command]:
    command = Command(name, about)
    tasks: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {a.dest: a.help or "" for a in action._choices_actions}
            for task, inner in action.choices.items():
                tasks += _of_parser(f"{name} {task}", helps.get(task, ""), inner)
            command.words += list(action.choices)
        elif action.option_strings:
            command.options |= dict.fromkeys(action.option_strings, action.help or "")
            if action.nargs != 0:
                values = [str(c) for c in action.choices or []] or _known(name, action)
                command.values |= dict.fromkeys(action.option_strings, values)
        else:
            command.words += [str(c) for c in action.choices or []] or _known(name, action)
    yield command
    yield from tasks


def _known(command: str, action: argparse.Action) -> list[str]:
    """The bundled recipes, where one is asked for; the options of recipes, where a key is."""
    training = RECIPES.get(command.split()[0]) == ("training",)
    if action.dest == "set":
        return [TRAINING_SETTINGS if training else SETTINGS]
    if action.dest == "key":
        return [KEYS]
    if action.dest != "recipe":
        return []
    folder = Path(__file__).parent.parent / "recipes"
    kinds = RECIPES.get(command.split()[0], ("",))
    return sorted({p.stem for kind in kinds for p in (folder / kind).glob("*.yaml")})


# ---------------------------------------------------------------- as the shells want it

# Words that the shell asks for when TAB is pressed, so that starting it reads no recipe: keys of every option, as
# 'recipe explain' takes them, and with '=' behind, as --set does (of lists the first item, of mappings what comes
# before a name).
KEYS, SETTINGS, TRAINING_SETTINGS = "keys", "settings", "settings --training"
SED_KEYS = r"s/^  \([^ ]*\) = .*/\1/p"
SED_SETTINGS = r"s/^  \([^ ]*\.\)NAME\..* = .*/\1/p; t; s/\.N\./.0./g; s/^  \([^ ]*\) = .*/\1=/p"
ASKED = {
    KEYS: f"clipmill recipe explain 2>/dev/null | sed -n '{SED_KEYS}' | sort -u",
    SETTINGS: f"clipmill recipe explain 2>/dev/null | sed -n '{SED_SETTINGS}' | sort -u",
    TRAINING_SETTINGS: f"clipmill recipe explain --training 2>/dev/null | sed -n '{SED_SETTINGS}' | sort -u",
}
MANY = 20  # keys offered at once; of more the sections

BASH = """_clipmill() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} at=${{COMP_WORDS[1]-}} words= first=2
    case "$at ${{COMP_WORDS[2]-}}" in
        {tasks}) if [ "$COMP_CWORD" -gt 2 ]; then at="$at ${{COMP_WORDS[2]}}" first=3; fi ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words='{jobs} -h -V'; else
    case "$at:$prev" in
{values}
    *) case "$at" in
{options}
    esac ;;
    esac; fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [ ${{#COMPREPLY[@]}} -gt {many} ] && COMPREPLY=($(_clipmill_sections "$cur" "${{COMPREPLY[@]}}"))
    case "${{COMPREPLY[0]-}}" in *[=.]) compopt -o nospace 2>/dev/null ;; esac
}}
_clipmill_sections() {{
    local cur=$1 word rest; shift
    for word; do
        rest=${{word#"$cur"}}
        case $rest in ?*.*) word=$cur${{rest%%.*}}. ;; esac
        echo "$word"
    done | sort -u
}}
complete -o default -F _clipmill clipmill"""


def bash(found: list[Command]) -> str:
    """A completion function; where it has no words the shell completes file names."""
    values, options = [], []
    for command in found:
        for words in {tuple(v) for v in command.values.values()}:
            flags = [f for f, v in command.values.items() if tuple(v) == words]
            patterns = "|".join(f"'{command.name}:{f}'" for f in flags)
            values.append(f"    {patterns}) words={_bash_words(words)} ;;")
        first = (
            f'[ "$COMP_CWORD" -eq $first ] && words={_bash_words(command.words)}; ' if command.words else ""
        )
        rest = f"case \"$cur\" in -*) words='{' '.join(command.options)}' ;; esac"
        options.append(f"    '{command.name}') {first}{rest} ;;")
    return BASH.format(
        jobs=" ".join(c.name for c in found if " " not in c.name),
        many=MANY,
        tasks="|".join(f"'{c.name}'" for c in found if " " in c.name) or "''",
        values="\n".join(sorted(values)),
        options="\n".join(options),
    )


def _bash_words(words: Sequence[str]) -> str:
    asked = [ASKED[w] for w in words if w in ASKED]
    return f'"$({asked[0]})"' if asked else f"'{' '.join(words)}'"


def fish(found: list[Command]) -> Iterator[str]:
    """A line a job and an option."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").split("\n")[0] + "'"

    def offered(words: Sequence[str]) -> str:
        asked = [f"({ASKED[w]})" for w in words if w in ASKED]
        return quoted(asked[0] if asked else " ".join(words))

    for command in found:
        job, _, task = command.name.partition(" ")
        if not task:
            yield f"complete -c clipmill -f -n __fish_use_subcommand -a {job} -d {quoted(command.about)}"
        seen = f"__fish_seen_subcommand_from {job}" + (
            f"; and __fish_seen_subcommand_from {task}" if task else ""
        )
        if command.words:
            yield f"complete -c clipmill -n {quoted(seen)} -a {offered(command.words)}"
        for option, about in command.options.items():
            dash = "-l" if option.startswith("--") else "-s"
            values = command.values.get(option)
            takes = "" if values is None else f" -x -a {offered(values)}" if values else " -r"
            yield f"complete -c clipmill -n {quoted(seen)} {dash} {option.lstrip('-')}{takes} -d {quoted(about)}"


if __name__ == "__main__":
    raise SystemExit(main())
