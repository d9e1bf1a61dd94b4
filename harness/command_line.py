"""The command line: from words to a configuration, from errors to one line and an exit code, and what a run says."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness import SCRIPT
from harness.fields import Theme, UserError, hints
from harness.files import read_json
from harness.options import identity

import tqdm
import tyro

Answer = TypeVar("Answer")


class RunFailed(Exception):
    """The run cannot go on, through no mistake of the user's: one line, exit code 1; it can be resumed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does."""


def read_flags(kind: type[Answer], words: Sequence[str] | None, default: Answer | None, about: str) -> Answer:
    """Return the configuration of class `kind` that `words` ask for; what they do not name is that of `default`."""
    explain(kind)
    flat_names = (tyro.conf.OmitArgPrefixes,)  # --alpha, not --partitioning.alpha
    return tyro.cli(kind, args=words, default=default, prog=SCRIPT, description=about, config=flat_names)


def explain(theme: type[Theme]) -> None:
    """Give `--help` the docstring under each field as one paragraph; tyro itself breaks it where the source does."""
    module = ast.parse(Path(sys.modules[theme.__module__].__file__).read_text())
    (body,) = (node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == theme.__name__)
    fields = theme.__dataclass_fields__
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            fields[node.target.id].metadata = {"help": " ".join(ast.literal_eval(below.value).split())}
    for inner in hints(theme).values():
        if isinstance(inner, type) and issubclass(inner, Theme):
            explain(inner)


def read_saved(folder: str, default: Theme) -> Any:
    """Return the configuration of the run in `folder`, checked as a new one is."""
    path = Path(folder).expanduser() / "config.json"
    fields = read_json(path)
    unknown = fields.keys() ^ default.flat().keys()
    if unknown:
        raise UserError(f"{path}: the field {min(unknown)!r} is unknown or missing; restore the file")
    try:
        return default.but(**{**fields, "resume": folder})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_resumed(config: Theme, saved: Theme) -> None:
    """Raise UserError where a run is to be resumed with another configuration than its own."""
    ours, theirs, folder = identity(config), identity(saved), config.flat()["resume"]
    for field in sorted(ours):
        if ours[field] != theirs[field]:
            raise UserError(
                f"{field}={ours[field]!r} differs from {theirs[field]!r} of {folder}; drop the flag, or start a new run"
            )
    rounds, done = config.flat()["rounds"], saved.flat()["rounds"]
    if rounds < done:
        raise UserError(f"rounds={rounds} is fewer than the {done} of {folder}; choose more, or drop it")


def attempt(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Return what `function` does; an error that is foreseen ends the process with one line.

    Exit code 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C and 143 on SIGTERM.
    """
    with contextlib.suppress(ValueError):  # signals are the main thread's
        signal.signal(signal.SIGTERM, terminate)
    try:
        return function(*arguments)
    except (UserError, RunFailed) as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt as error:
        sys.exit(143 if isinstance(error, Terminated) else 130)


def terminate(*_: Any) -> None:
    """Handle SIGTERM."""
    raise Terminated


def say(text: str) -> None:
    """Print a line above the progress display; whoever closes our output early (`| head`) does not end the run."""
    try:
        tqdm.tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def notice(text: str) -> None:
    """Print a line for the user on stderr, above the progress display."""
    tqdm.tqdm.write(f"notice: {text}", file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A live display of rounds done and seconds spent, on stderr; nothing where that is no terminal."""

    def __init__(self, rounds: int, done: int):
        """`rounds` in all, of which a resumed run has `done` some already."""
        self.bar = tqdm.tqdm(
            desc="rounds", unit="round", total=rounds, initial=done, leave=False, disable=None, dynamic_ncols=True
        )
        self.over = threading.Event()

    def refresh(self) -> None:
        """TFF's `next` says nothing until it is done; the clock goes on."""
        while not self.over.wait(0.2):
            self.bar.refresh()

    def follow(self, rounds: Iterator[Answer]) -> Iterator[Answer]:
        """Yield what `rounds` yields, a round of the display each."""
        threading.Thread(target=self.refresh, daemon=True).start()
        try:
            for result in rounds:
                self.bar.update()
                yield result
        finally:
            self.over.set()
            self.bar.close()
