"""Ctrl-C and SIGTERM: a wish to stop that no library can swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a library's callback,
finalizer or import it may get lost, or become another error, and the run would go on to its end.
So, as long as there is nothing to save, the process ends at once, and the worker with it. From a
run's first round on the exception is raised, and again each second until it has been heard;
whatever error ends the run after that, it was the user who ended it.
"""

import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 1.0  # seconds
asked = 0  # the signal by which the user has asked for the run's end, if any
last_words = b""  # said where the process ends at once


def listen():
    """End the process at once on Ctrl-C and SIGTERM, but where they are ignored, as nohup and a
    shell's & have it."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def end(number, _):
    """Handle a signal while there is nothing to save: the kernel ends the worker with us."""
    with contextlib.suppress(OSError):
        # over the progress display
        os.write(2, (b"\r\x1b[K" if os.isatty(2) else b"") + last_words)
    os._exit(128 + number)


@contextlib.contextmanager
def saying(words):
    """Say the line `words` where a signal ends the process at once inside; after it, a signal does
    so silently."""
    global last_words
    last_words = f"{words}\n".encode(errors="replace")
    try:
        yield
    finally:
        last_words = b""
        heard()
        if signal.getsignal(signal.SIGINT) is ask or signal.getsignal(signal.SIGTERM) is ask:
            listen()


def save_first():
    """Raise KeyboardInterrupt from now on, where the process would else end at once: there is
    something to save."""
    for number in SIGNALS:
        if signal.getsignal(number) is end:
            signal.signal(number, ask)
            sys.unraisablehook = pass_over


def ask(number, _):
    """Raise what ends a run, and have it raised again unless somebody says `heard`."""
    global asked
    asked = number
    signal.signal(signal.SIGALRM, again)
    again()


def again(*_):
    """Raise once more what has not been heard yet."""
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    raise KeyboardInterrupt


def heard():
    """Call off the next time: the exception has reached somebody who ends the run."""
    if asked:
        signal.setitimer(signal.ITIMER_REAL, 0)


def pass_over(lost):
    """Say nothing of an exception of ours that got lost in a callback, as it is raised again."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
