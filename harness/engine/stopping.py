"""Ctrl-C, SIGTERM and similar signals: requests to stop that no library can swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a library's callback it
may get lost, or become another error, and the run would continue. So nothing is raised in a
signal handler. As long as there is nothing to save, the process ends what it has started, and
then itself, at once. From a run's first round on, the handler notes the wish and ends the worker,
so that the call that waits for it returns; whoever does so asks `raise_if_requested`. A second
signal, unless it has the same cause, ends the process at once: files are whole at any moment.
"""

import contextlib
import os
import signal
import sys
import time

# SIGUSR1 and SIGXCPU are how job schedulers such as Slurm announce the end of a job's time.
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
requested = 0  # the signal by which the user asked for the end, if any
_requested_at = 0.0  # when, as time.monotonic() has it
_last_words = b""  # printed if the process ends at once
_enders: list = []  # functions that end what the main thread may wait for


def listen():
    """End the process at once on a signal, unless it is ignored, as under nohup or a shell's &."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, exit_at_once)


def end_what_was_started():
    """End what the main thread may wait for, and what would outlive it."""
    for end in list(_enders):
        with contextlib.suppress(Exception):  # the next one ends all the same
            end()


def exit_at_once(number, _):
    """Handle a signal while there is nothing to save."""
    end_what_was_started()
    remove_generated_files()
    over_progress_display = b"\r\x1b[K" if os.isatty(2) else b""
    with contextlib.suppress(OSError):
        os.write(2, over_progress_display + _last_words)
    os._exit(128 + number)


def remove_generated_files():
    """Remove the files in TMPDIR that TensorFlow's AutoGraph would remove at a usual exit."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            with contextlib.suppress(OSError):
                os.unlink(module.__file__)


@contextlib.contextmanager
def last_words(text):
    """Print the line `text` if a signal ends the process at once inside."""
    global _last_words
    _last_words = f"{text}\n".encode(errors="replace")
    try:
        yield
    finally:
        _last_words = b""
        if any(signal.getsignal(number) is note_request for number in SIGNALS):
            listen()


def save_first():
    """From now on there is something to save: a signal no longer ends the process at once."""
    for number in SIGNALS:
        if signal.getsignal(number) is exit_at_once:
            signal.signal(number, note_request)


def note_request(number, frame):
    """Handle a signal while there is something to save; a second one ends the process at once.

    Two different signals within a second have one cause: a terminal, or a job, that ends.
    """
    global requested, _requested_at
    is_another = number == requested or time.monotonic() - _requested_at > 1
    if requested and is_another:
        exit_at_once(number, frame)
    elif not requested:
        _requested_at = time.monotonic()  # first: the second signal may come right now
        requested = number
        end_what_was_started()


@contextlib.contextmanager
def ended_by_request(end):
    """Call end() on a signal inside. It must be quick, and safe in a signal's handler."""
    _enders.append(end)
    try:
        yield
    finally:
        _enders.remove(end)


def raise_if_requested():
    """Raise KeyboardInterrupt if the user has asked for the end."""
    if requested:
        raise KeyboardInterrupt
