"""What keeps a run, and never changes its numbers: command line, files, plots, TFF's workers.

Nothing here imports the script: it is given objects whose attributes it uses. Where TensorFlow
Federated cannot run, whoever imports a module of this package first gets one line, no traceback.
"""

import importlib.util
import os
import sys

from harness.stopping import listen

SCRIPT = "federated_learning.py"
PACKAGES = (
    "numpy",
    "grpc",
    "tqdm",
    "tyro",
    "matplotlib",
    "sklearn",
    "tensorflow",
    "tensorflow_federated",
)


def refuse(reason):
    """End the script with one line and exit code 2; an import of it with an ImportError."""
    if not is_main():
        raise ImportError(reason)
    print(f"{SCRIPT}: {reason}", file=sys.stderr)
    sys.exit(2)


def is_main():
    """Return whether the script is what Python was started with; IPython's %run does not count."""
    started = os.path.basename(getattr(sys.modules["__main__"], "__file__", None) or "")
    return started == SCRIPT and "IPython" not in sys.modules


def check_environment():
    """Refuse another Python or system than TFF 0.87 has a wheel for, and missing packages."""
    import platform  # it takes ten milliseconds, in which nothing would listen to Ctrl-C

    if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or platform.machine() != "x86_64":
        refuse(
            f"Python {platform.python_version()} on {sys.platform} {platform.machine()} cannot run "
            "TensorFlow Federated 0.87, which needs Python 3.11 on Linux x86-64; there `uv run "
            f"{SCRIPT}`, or `make run`, sets everything up"
        )
    ours = importlib.util.find_spec("variants")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if ours is None or not os.path.abspath(ours.origin or "").startswith(os.path.join(root, "")):
        refuse(
            f"`import variants` finds {ours and ours.origin or 'nothing'}, not the folder variants "
            f"of {root}; rename it, or put {root} first in PYTHONPATH"
        )
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            refuse(f"{package} is not installed{where_it_is()}")


def where_it_is():
    """Return the cure for a package that is missing."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(python) and os.path.dirname(python) != os.path.dirname(sys.executable):
        python = os.path.relpath(python)
        return (
            f" for {sys.executable}, but for {python}: `{python} {SCRIPT}`, or first `source "
            f"{os.path.join(os.path.dirname(python), 'activate')}`"
        )
    return f"; `uv run {SCRIPT}`, or `make run`, sets everything up"


def open_streams():
    """Make the standard streams usable: closed ones become /dev/null, and no character fails."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


if is_main():
    listen()
    open_streams()
check_environment()
# read when TensorFlow and gRPC load, by us or by somebody else
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# TensorFlow uses oneDNN of its own accord only with AVX-512 VNNI; processors with AVX2 are 2.4
# times as fast by it.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"
if is_main():
    # NumPy's threads would spin beside the worker's
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # a notebook's `!` command inherits a backend that may not be installed here
    os.environ["MPLBACKEND"] = "agg"
