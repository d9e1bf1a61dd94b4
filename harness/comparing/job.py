"""A process of a comparison with --jobs: it makes runs as the script would, one after another.

Their configurations come as a line of JSON on standard input. That input ends with the comparison.
"""

import json
import os
import signal
import sys
import threading

from harness.cli.command_line import run_or_exit
from harness.comparing.completing import Single, complete
from harness.storage.files import InUse


def end_with_parent():
    """Stop as on Ctrl-C when the comparison's process has ended, however it did."""
    os.read(sys.stdin.fileno(), 1)  # a buffered read would hold a lock when Python ends
    os.kill(os.getpid(), signal.SIGTERM)


def make_runs(default, run):
    """Make each run that nobody else has made or is making.

    `default` is the default configuration, `run` the script's function.
    """
    all_fields = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    for fields in all_fields:
        try:
            complete(Single(None, default.replace(**fields), None), run)
        except InUse:
            continue


def work(default, run):
    """Make the runs; end the process as the script ends."""
    run_or_exit(make_runs, default, run)
