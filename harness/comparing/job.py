"""A process of a comparison with --jobs: it makes runs as the script would, one after another.

Their configurations, and the time of perf_counter() until which they may take, come as a line of
JSON on standard input. That input ends with the comparison.
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
    work = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    for fields in work["configs"]:
        single = Single(None, default.replace(**fields), None)
        try:
            if complete(single, run, work["deadline"]) is None:
                return
        except InUse:
            continue


def work(default, run):
    """Make the runs; end the process as the script ends."""
    run_or_exit(make_runs, default, run)
