"""The command line: from words to a configuration, from errors to one line and an exit code, and
what a run says."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness import SCRIPT, stopping
from harness.fields import Theme, UserError, hints
from harness.files import place, read_json
from harness.options import identity
from harness.program import changed, read_programs

import tqdm
import tyro

Answer = TypeVar("Answer")


class RunFailed(Exception):
    """The run cannot go on, through no mistake of the user's: one line, exit code 1; it can be
    resumed."""


def read_flags(
    kind: type[Answer], words: Sequence[str] | None, default: Answer | None, about: str
) -> Answer:
    """Return the configuration of class `kind` that `words` ask for; what they do not name is that
    of `default`.

    Raises UserError for what is no flag, or no value of it, and for an empty text: what an unset
    variable leaves of `--data "$DATA"`.
    """
    words = list(sys.argv[1:] if words is None else words)
    for before, word in itertools.pairwise(["", *words]):
        if (flag := before if word == "" else word.removesuffix("=")) != word and flag.startswith(
            "--"
        ):
            raise UserError(
                f"{flag} '' is empty, as an unset variable leaves it; give a value, or drop the "
                "flag"
            )
    explain(kind)
    flat_names = (tyro.conf.OmitArgPrefixes,)  # --alpha, not --partitioning.alpha
    said = io.StringIO()
    with taking(sys.stdout):
        try:
            with contextlib.redirect_stderr(said):
                return tyro.cli(
                    kind,
                    args=words,
                    default=default,
                    prog=SCRIPT,
                    description=about,
                    config=flat_names,
                )
        except SystemExit as leaving:
            if leaving.code:
                raise UserError(in_a_line(said.getvalue())) from None
            raise  # after the help
        finally:
            sys.stdout.flush()
    sys.exit(1)  # the help could not be written


def in_a_line(framed: str) -> str:
    """Return tyro's message about a mistake, a title and sections in a frame, as one line: what is
    wrong, and the flags with their ranges that it shows as the cure."""
    lines = [line.strip("│╭╮╰╯─|+ ") for line in framed.splitlines()]
    # an output without Unicode has rules of -----
    lines = [line if line.strip("-") else "" for line in lines]
    first, *sections = [
        list(section) for filled, section in itertools.groupby(lines, bool) if filled
    ]
    wrong = " ".join(first[1:] or sections[0]).rstrip(".")
    flags = [line.split(" {")[0] for line in lines if line.startswith("--")]
    return f"{wrong}; {'choose ' + ', or '.join(flags) if flags else 'see --help'}"


def explain(theme: type[Theme]) -> None:
    """Give `--help` the docstring under each field as one paragraph; tyro itself breaks it where
    the source does."""
    module = ast.parse(Path(sys.modules[theme.__module__].__file__).read_bytes())
    (body,) = (
        node.body
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == theme.__name__
    )
    fields = theme.__dataclass_fields__
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            fields[node.target.id].metadata = {
                "help": " ".join(ast.literal_eval(below.value).split())
            }
    for inner in hints(theme).values():
        if isinstance(inner, type) and issubclass(inner, Theme):
            explain(inner)


def read_saved(folder: str, default: Theme) -> Any:
    """Return the configuration of the run in `folder`, checked as a new one is."""
    path = place(folder) / "config.json"
    fields = read_json(path)
    unknown = fields.keys() ^ default.flat().keys()
    if unknown:
        raise UserError(
            f"{path}: the field {min(unknown)!r:.60} is unknown or missing; restore the file"
        )
    split = path.with_name("partition.json")
    # as the run got it, wherever that file is now
    if fields["partition_file"] and "indices" in read_json(split):
        fields["partition_file"] = str(split)
    try:
        return default.but(**{**fields, "resume": folder})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_resumed(config: Theme, saved: Theme, rows: dict[str, str] | None = None) -> None:
    """Raise UserError where a run is to be resumed with another configuration than its own, or by
    another program.

    `rows` are the hashes of the rows in use; None before they are known.
    """
    ours = identity(config)
    theirs = identity(saved)
    folder = config.flat()["resume"]
    last = read_programs(place(folder))[-1]
    names = ", ".join(changed(last, last["rows"] if rows is None else rows))
    if names and not config.flat()["accept_changes"]:
        raise UserError(
            f"resume={folder!r:.200}: another program made this run ({names:.200} changed since); "
            "restore it, start a new run, or go on all the same with --accept-changes"
        )
    for field in sorted(ours):
        if ours[field] != theirs[field]:
            raise UserError(
                f"{field}={ours[field]!r} differs from {theirs[field]!r} of {folder}; drop the "
                "flag, or start a new run"
            )
    rounds = config.flat()["rounds"]
    done = saved.flat()["rounds"]
    if rounds < done:
        raise UserError(
            f"rounds={rounds} is fewer than the {done} of {folder}; choose more, or drop it"
        )


def attempt(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Return what `function` does; an error that is foreseen ends the process with one line.

    Exit code 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C and 143 on SIGTERM.
    """
    try:
        return function(*arguments)
    except (UserError, RunFailed) as error:
        say(f"{SCRIPT}: {' '.join(str(error).splitlines())}", sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except (KeyboardInterrupt, Exception):
        stopping.heard()
        if not stopping.asked:
            raise
        # all is written; Python's own way out meets TensorFlow's threads, and may abort
        os._exit(128 + stopping.asked)


def say(text: str, stream: Any = None) -> None:
    """Print a line above the progress display, on standard output or another stream."""
    stream = stream or sys.stdout
    with taking(stream):
        tqdm.tqdm.write(printable(text), file=stream)
        stream.flush()


@contextlib.contextmanager
def taking(stream: Any) -> Iterator[None]:
    """Go on without a stream that takes no more, as a run's files are what counts; a full disk is
    told on stderr."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno != errno.EPIPE and stream is sys.stdout:  # `| head` closes it as it likes
            notice(f"standard output takes no more ({error.strerror}); the rest goes nowhere")


def printable(text: str) -> str:
    """Return `text` with no character in it that would steer a terminal; names of files may have
    any."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def notice(text: str) -> None:
    """Print a line for the user on standard error."""
    say(f"notice: {' '.join(text.split(chr(10)))}", sys.stderr)


class Progress:
    """A live display of rounds done and seconds spent, on stderr; nothing where that is no
    terminal."""

    def __init__(self, rounds: int, done: int, timed: bool = True):
        """`rounds` in all, of which a resumed run has `done` some already; not `timed`, it shows no
        seconds."""
        self.bar = tqdm.tqdm(
            desc="rounds",
            unit="round",
            total=rounds,
            initial=done,
            leave=False,
            disable=None,
            dynamic_ncols=True,
            bar_format=None if timed else "{desc}: {n_fmt}/{total_fmt} |{bar}|",
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
