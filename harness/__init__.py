"""Infrastructure around a run: command line, files, figures, TFF's workers.

Nothing here imports the script, but for a process of --jobs: it is given objects whose attributes
it uses. Of its folders, numbers follow from `config`, `training` and `engine` alone. Where
TensorFlow Federated cannot run, whoever imports a module of this package first gets one line, no
traceback.
"""

import importlib.util
import os
import resource
import sys

from harness.engine.stopping import listen

FILES = 40  # open at once
SCRIPT = "federated_learning.py"
# The program of a process of --jobs, which makes runs as the script does.
JOB = (
    "import federated_learning as fl; from harness.comparing import job; "
    "job.work(fl.Config(), fl.run)"
)
PACKAGES = (
    "numpy",
    "grpc",
    "tqdm",
    "tyro",
    "jinja2",
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
    """Return whether Python was started with the script, or with a job of it.

    IPython's %run does not count.
    """
    if JOB in sys.orig_argv:
        return True
    started = os.path.basename(getattr(sys.modules["__main__"], "__file__", None) or "")
    return started == SCRIPT and "IPython" not in sys.modules


def check_environment():
    """Refuse another Python or system than TFF 0.87 has a wheel for, and missing packages."""
    import platform  # it takes ten milliseconds, in which nothing would listen to Ctrl-C

    if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or platform.machine() != "x86_64":
        refuse(
            f"Python {platform.python_version()} on {sys.platform} {platform.machine()} cannot "
            "run TensorFlow Federated 0.87, which needs Python 3.11 on Linux x86-64; on Linux "
            f"x86-64, `uv run {SCRIPT}` or `make run` installs everything"
        )
    try:
        os.getcwd()
    except OSError:
        refuse("the working folder no longer exists; change to an existing one (cd)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        root.encode()
    except UnicodeEncodeError:
        refuse(
            f"the name of the folder {root!r} is not valid UTF-8, which TensorFlow requires; "
            "rename it"
        )
    ours = importlib.util.find_spec("variants")
    if ours is None or not os.path.abspath(ours.origin or "").startswith(os.path.join(root, "")):
        refuse(
            f"`import variants` finds {ours and ours.origin or 'nothing'} instead of the folder "
            f"variants of {root}; rename it, or put {root} first in PYTHONPATH"
        )
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            refuse(f"{package} is not installed{where_it_is()}")
    foreign = find_foreign(os.path.dirname(os.path.dirname(find_origin("tensorflow"))))
    if foreign:
        refuse(
            f"{foreign} hides an installed package of the same name, which TensorFlow needs; "
            "rename it, or remove its folder from PYTHONPATH"
        )


def find_origin(package):
    """Return the file of an installed package."""
    return importlib.util.find_spec(package).origin


def find_foreign(installed):
    """Return a file or folder on Python's path that hides a package of the folder `installed`.

    That is the folder with TensorFlow. Returns nothing if there is none; a package that was
    installed elsewhere is left alone.
    """
    for folder in sys.path:
        if os.path.realpath(folder) == os.path.realpath(installed):
            return ""
        if folder.startswith(sys.base_prefix):  # Python's own
            continue
        try:
            names = set(os.listdir(folder or "."))
        except OSError:
            continue
        for name in sorted(names):
            module = name.removesuffix(".py")
            is_module = name.endswith(".py") or os.path.isfile(
                os.path.join(folder, name, "__init__.py")
            )
            there = [os.path.join(installed, module + end) for end in ("", ".py")]
            is_installed = any(other.startswith(f"{module}-") for other in names)
            if is_module and not is_installed and any(map(os.path.exists, there)):
                return os.path.join(folder, name)
    return ""


def raise_limits():
    """Raise the limit of open files to what a run needs, if allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES and hard >= FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    elif soft < FILES:
        refuse(
            f"only {soft} files may be open at once, but a run needs {FILES}; raise the limit "
            "(ulimit -n)"
        )


def where_it_is():
    """Return the cure for a package that is missing."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(root, ".venv", "bin", "python")
    if os.path.exists(python) and os.path.dirname(python) != os.path.dirname(sys.executable):
        python = os.path.relpath(python)
        return (
            f" for {sys.executable}, but it is for {python}: run `{python} {SCRIPT}`, or first "
            f"`source {os.path.join(os.path.dirname(python), 'activate')}`"
        )
    return f"; `uv run {SCRIPT}` or `make run` installs everything"


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
    raise_limits()
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
