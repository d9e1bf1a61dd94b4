"""--help on one screen: examples, themes of flags, and how to list each."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Sequence

from harness import SCRIPT
from harness.cli.command_line import print_help
from harness.cli.fields import ConfigGroup, UserError
from harness.cli.flags import asks_for_help, to_flag
from harness.cli.output import tolerate_closed_stream

EXAMPLES = {
    "": "10 clients, 5 rounds: a minute or two",
    "--dataset digits --model mlp": "small images: a run of seconds",
    "--partition shards --rounds 50": "McMahan's non-IID split",
    "--compare fedavg,scaffold --seeds 3": "one plot, one table, a significance test",
    "--resume runs/NAME": "continue a stopped run",
}
WIDTH = 80


def themes(config: ConfigGroup) -> dict[str, ConfigGroup]:
    """Return name -> group of flags."""
    return {name: value for name, value in vars(config).items() if isinstance(value, ConfigGroup)}


def answer_help(config: ConfigGroup, words: Sequence[str]) -> None:
    """Print the help that a command line asks for, and exit; without such words return.

    --help has one screen, --help THEME the flags of a group, --help FLAG those of its group, of
    several if several are named, and --help-all every flag. Raises UserError for what is neither.
    """
    if "--help-all" in words:
        print_help(type(config), ["--help"])
    asked = [place for place, word in enumerate(words) if asks_for_help(word)]
    if not asked:
        return
    groups = themes(config)
    of_field = {field: name for name, group in groups.items() for field in group.to_dict()}
    chosen = []
    for word in named_behind(words, asked[0]):
        # A flag is shown in its theme: --help alpha, or --help --alpha.
        name = word.lstrip("-").replace("-", "_")
        if name in groups or name in of_field:
            chosen.append(name if name in groups else of_field[name])
        elif not word.startswith("-"):
            raise UserError(
                f"--help {word!r:.60}: neither a theme nor one of its flags; choose "
                f"{', '.join(groups)}, or see --help-all"
            )
    if not chosen:
        with tolerate_closed_stream(sys.stdout):
            print(one_screen(config), flush=True)
            sys.exit()
        sys.exit(1)  # the help could not be written
    codes = []
    for theme in dict.fromkeys(chosen):
        try:
            print_help(type(groups[theme]), ["--help"])
        except SystemExit as leaving:
            codes.append(leaving.code or 0)
    sys.exit(max(codes))


def named_behind(words: Sequence[str], place: int) -> list[str]:
    """Return the names that the --help at `place` is about: its own value, a flag, or words."""
    own = words[place].partition("=")[2]
    if own:
        return [own]
    following = list(words[place + 1 :])
    if following and following[0].startswith("-"):
        return following[:1]
    return list(itertools.takewhile(lambda word: not word.startswith("-"), following))


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a docstring; nothing where python -OO left none."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")


def one_screen(config: ConfigGroup) -> str:
    """Return the first help: usage, examples, themes."""
    lines = [
        f"usage: python {SCRIPT} [--FLAG VALUE]...",
        "",
        *textwrap.wrap(first_sentence(sys.modules[type(config).__module__].__doc__), WIDTH),
        "",
        f"examples (append to: python {SCRIPT})",
    ]
    width = max(map(len, EXAMPLES)) + 1
    lines += [f"  {flags or '(nothing)':{width}} {text}" for flags, text in EXAMPLES.items()]
    lines += ["", "themes (--help THEME lists their flags)"]
    for name, group in themes(config).items():
        flags = ", ".join(
            to_flag(field) for field in list(vars(type(group))["__annotations__"])[:3]
        )
        text = f"{first_sentence(type(group).__doc__)} ({flags}, ...)"
        indent = " " * 16
        wrapped = textwrap.wrap(
            text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        lines += [f"  {name:14}{wrapped[0].strip()}", *wrapped[1:]]
    own = [to_flag(field) for field in vars(config) if field not in themes(config)]
    lines += [
        "",
        f"all flags, {' and '.join(own)} too, with papers and defaults: --help-all",
        "the flags of a published experiment: --preset NAME --help",
        "without training: --list runs, --evaluate RUN, --predict RUN a.png, --version",
    ]
    return "\n".join(lines)
