"""What is printed: lines above a live display of the rounds, and notices on standard error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from harness.cli.fields import name_fields
from harness.engine import stopping
from harness.storage.files import one_line

import tqdm

Answer = TypeVar("Answer")

CANNOT_TAKE_MORE = (
    errno.EPIPE,
    errno.ENOSPC,
    errno.EIO,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EBADF,  # it was opened for reading
)


@contextlib.contextmanager
def quietly(is_quiet: bool) -> Iterator[None]:
    """Discard standard output inside, if asked to."""
    with contextlib.ExitStack() as stack:
        if is_quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def print_line(text: str, stream: Any = None) -> None:
    """Print a line above the progress display, on standard output or another stream."""
    stream = stream or sys.stdout
    with tolerate_closed_stream(stream):
        lines = map(one_line, text.split("\n"))  # names of files may have any character
        tqdm.tqdm.write("\n".join(lines), file=stream)
        stream.flush()


@contextlib.contextmanager
def tolerate_closed_stream(stream: Any) -> Iterator[None]:
    """Continue without a stream that cannot be written to; a full disk is reported on stderr."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_TAKE_MORE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno != errno.EPIPE and stream is sys.stdout:  # `| head` closes it as it likes
            warn(f"cannot write to standard output ({error.strerror}); further output is discarded")


def warn(text: str) -> None:
    """Print a notice for the user, a line on standard error."""
    print_line(name_fields(f"notice: {' '.join(text.splitlines())}"), sys.stderr)


def tell_loading() -> None:
    """Say on a terminal what the first seconds are for."""
    if sys.stderr.isatty():
        print_line("loading TensorFlow ...", sys.stderr)


class Progress:
    """A live display of rounds and seconds on stderr, if that is a terminal."""

    def __init__(self, rounds: int, done: int, timed: bool = True):
        """`done` of the `rounds` were done before. Without `timed` it shows no seconds."""
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
        self.closed = threading.Event()

    def refresh(self) -> None:
        """Update the clock while TFF's `next`, which reports nothing, trains a round."""
        while not self.closed.wait(0.2):
            self.bar.refresh()

    def follow(self, rounds: Iterator[Answer]) -> Iterator[Answer]:
        """Yield what `rounds` yields, and show each. Raises KeyboardInterrupt if asked to stop."""
        threading.Thread(target=self.refresh, daemon=True).start()
        try:
            for result in rounds:
                self.bar.update()
                yield result
                stopping.raise_if_requested()
        finally:
            self.closed.set()
            self.bar.close()


def show_progress(rounds: Iterator[Answer], config: Any, done: int) -> Iterator[Answer]:
    """Yield what `rounds` yields with a live display; `done` rounds were done before.

    A private run's shows no seconds.
    """
    return Progress(config.training.rounds, done, timed=not config.is_private).follow(rounds)
