"""Programs that run in addition to the worker, such as ssh and rsync.

They end with us, on a signal too. What they print may be anything, without end or never ending a
line: it is read with limits of time and of length.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from harness.engine import stopping

LONGEST_LINE = 4096  # bytes; of a longer one the end counts
WORDS_KEPT = 2000  # bytes of what a program has said last on its standard error


class LineReader:
    """Lines from a pipe. Nothing else may read from it."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.text = b""  # read, and given to nobody yet
        self.poll = select.poll()  # unlike select, it takes any file descriptor
        self.poll.register(stream, select.POLLIN)

    def read(self, seconds: float) -> bytes | None:
        """Return the next line without its end, or None after `seconds`.

        A carriage return also ends a line, as in a progress display. Raises EOFError at the end of
        the pipe; an unfinished last line is dropped.
        """
        deadline = time.monotonic() + seconds
        while True:
            line, end, rest = self.text.replace(b"\r", b"\n").partition(b"\n")
            if end:
                self.text = rest
                return line
            left = deadline - time.monotonic()
            if left <= 0 or not self.poll.poll(1000 * left):
                return None
            part = os.read(self.stream.fileno(), LONGEST_LINE)
            if not part:
                raise EOFError
            self.text = line[-LONGEST_LINE:] + part


running: set[Child] = set()


def end_all() -> None:
    """End all programs that run, from any thread."""
    for child in list(running):
        child.kill()


class Child:
    """A program in a session of its own, as a context manager: afterwards it has ended."""

    def __init__(self, command: Sequence[str], given: bytes = b""):
        """`given` is what its standard input gets. Raises FileNotFoundError without the program."""
        self.command = command
        self.given = given
        self.words = b""  # what it has said last on its standard error

    def __enter__(self) -> Child:
        self._exit_stack = contextlib.ExitStack()
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running.add(self)
        self._exit_stack.callback(running.discard, self)
        self._exit_stack.enter_context(stopping.ended_by_request(self.kill))
        self.lines = LineReader(self.process.stdout)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        try:
            self._listener.start()
            threading.Thread(target=self._give, daemon=True).start()
        except BaseException:  # no more threads are allowed
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.kill()
        self.process.wait()
        if self._listener.ident:
            self._listener.join(1)
        self.process.stdout.close()
        if not self._listener.is_alive():
            self.process.stderr.close()
        self._exit_stack.close()

    def kill(self) -> None:
        """End it and what it has started, at once, from any thread or signal handler."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def read_lines(self, seconds: float) -> Iterator[bytes]:
        """Yield the lines that it prints. Raises TimeoutError if it is silent for so long."""
        with contextlib.suppress(EOFError):
            while True:
                line = self.lines.read(seconds)
                if line is None:
                    raise TimeoutError
                yield line

    def wait(self, seconds: float) -> int:
        """Return its status once it has ended. Raises TimeoutError if that takes longer."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        self._listener.join(1)  # its last words may be on their way
        return status

    def _give(self) -> None:
        """Write its standard input, which it may never read."""
        with contextlib.suppress(OSError), self.process.stdin as pipe:
            pipe.write(self.given)

    def _listen(self) -> None:
        """Read its standard error to the end, so that it never waits for us."""
        with contextlib.suppress(OSError, ValueError):
            while part := os.read(self.process.stderr.fileno(), LONGEST_LINE):
                self.words = (self.words + part)[-WORDS_KEPT:]
