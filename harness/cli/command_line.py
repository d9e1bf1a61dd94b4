"""The command line: from words to a configuration, from errors to one line."""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import os
import platform
import random
import shutil
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from harness import SCRIPT
from harness.cli.fields import ConfigGroup, UserError, cached, choice_lines, hints, render_as_line
from harness.cli.flags import find_field, read_values, wants_help
from harness.cli.output import print_line, tolerate_closed_stream, warn
from harness.cli.run_options import FORM, OF_FINISHED
from harness.engine import stopping
from harness.storage.files import briefly, read_bytes
from harness.storage.provenance import ROOT, describe_provenance

import tyro

Answer = TypeVar("Answer")
NARROWEST = 60  # columns
# Fields that ask for training, which --evaluate refuses.
TRAINING = ("compare", "seeds", "tune", "jobs", "resume", "baselines")
# Fields that --predict, --compare of finished runs and --evaluate use, the last with those of the
# data, or refuse.
PREDICTING = ("predict", "pictures", "config", "quiet", "json")
COMPARING = (
    *("compare", "tune", "jobs", "target_accuracy", "runs", "name", "config", "quiet", "json"),
    *("figures", *OF_FINISHED),
)
EVALUATING = (
    *("evaluate", "model", "metrics", "config", "runs", "name", "quiet", "json", "figures"),
    *FORM,
    *TRAINING,
)


class RunFailed(Exception):
    """A failure that is not the user's mistake; printed as one line, exit code 1. The run can be
    resumed."""

    _render_traceback_ = render_as_line


class Stopped(KeyboardInterrupt):
    """The user's Ctrl-C in a run, after what is done was saved."""

    _render_traceback_ = render_as_line


RUNNING = threading.RLock()  # held by the run that uses TensorFlow's and Keras' global settings


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread of this process is inside; use as a context manager or decorator.

    Restores the state of Python's random numbers at the end.
    """
    if not RUNNING.acquire(blocking=False):
        warn("another run is in progress in this process; waiting for it to finish")
        RUNNING.acquire()
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
        RUNNING.release()


def read_flags(kind: Any, words: Sequence[str] | None, default: ConfigGroup | None = None) -> Any:
    """Return a configuration of class `kind` from `words`; None reads sys.argv.

    Fields without a flag are as in `default`. Raises UserError for an unknown flag or an invalid
    value.
    """
    words = list(sys.argv[1:] if words is None else words)
    if wants_help(words):
        print_help(kind, words)
    values = read_values(words, kind.types())
    # not kind's own `replace`: what a flag implies, `words` say already
    return ConfigGroup.replace(default or kind(), **values)


def check_use(config: Any, words: Sequence[str], has_finished_runs: bool) -> None:
    """Warn of flags among `words` that --evaluate and the like, which train nothing, do not use.

    `has_finished_runs` is whether --compare names folders of such.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    given = {flag: find_field(flag, config.types()) for flag in flags}
    run = config.run
    commands: dict[str, tuple[bool, set[str]]] = {  # whether it is asked for, the fields it uses
        "--version": (run.version, {"version"}),
        "--list": (bool(run.list), {"list", "json", "quiet"}),
        "--predict": (bool(run.predict), {*PREDICTING}),
        "--evaluate": (bool(run.evaluate), {*config.data.to_dict(), *EVALUATING}),
        "--compare of finished runs": (has_finished_runs, {*COMPARING}),
    }
    command = next((name for name, (is_asked_for, _) in commands.items() if is_asked_for), "")
    if not command:
        return
    unused = [flag for flag, field in given.items() if field not in commands[command][1]]
    verb = "has" if len(unused) == 1 else "have"
    if unused:
        warn(f"{', '.join(unused)} {verb} no effect with {command}, which trains nothing")


def print_help(kind: Any, words: Sequence[str]) -> NoReturn:
    """Print every flag of class `kind`, or a shell's completion, as `words` ask for, and exit."""
    add_help(kind)
    with tolerate_closed_stream(sys.stdout), wide_enough():
        try:
            tyro.cli(
                kind,
                args=words,
                prog=SCRIPT,
                # python -OO leaves no docstring
                description=describe(kind),
                config=(tyro.conf.OmitArgPrefixes,),  # --alpha, not --partitioning.alpha
            )
        finally:
            sys.stdout.flush()
    sys.exit(1)  # the help could not be written


@contextlib.contextmanager
def wide_enough() -> Iterator[None]:
    """Let tyro believe in a terminal of at least NARROWEST columns; in fewer it never ends."""
    given = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if given is not None:
            os.environ["COLUMNS"] = given


def describe(kind: type) -> str:
    """Return the help's first line: of a group of flags its own docstring's, else the script's."""
    of_script = sys.modules[kind.__module__].__doc__
    has_groups = any(isinstance(value, ConfigGroup) for value in vars(kind).values())
    return ((of_script if has_groups else kind.__doc__) or "").partition("\n")[0]


@cached
def add_help(group: Any) -> None:
    """Give each field its text in --help: the docstring below it, and a line for each choice."""
    for base in group.__bases__:  # whose fields are the group's too
        if issubclass(base, ConfigGroup) and base is not ConfigGroup:
            add_help(base)
    module = ast.parse(Path(sys.modules[group.__module__].__file__).read_bytes())
    (body,) = (
        node.body
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == group.__name__
    )
    types = hints(group)
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr):
            field = ast.unparse(node.target)
            text = " ".join(ast.literal_eval(below.value).split())
            chosen = choice_lines(types[field]).items()
            lines = [f"- {name}: {line}" for name, line in chosen if name]
            group.__dataclass_fields__[field].metadata = {"help": "\n".join([text, *lines])}
    for inner in types.values():
        if isinstance(inner, type) and issubclass(inner, ConfigGroup):
            add_help(inner)


def print_version() -> None:
    """Print what a bug report should contain."""
    about = describe_provenance(None)
    state = {True: "clean", False: "edited since", None: "no git repository"}[about["clean"]]
    project = tomllib.loads(read_bytes(ROOT / "pyproject.toml").decode())["project"]
    print_line(
        f"{SCRIPT} {project['version']}, commit {about['commit'] or 'unknown'} ({state})\n"
        f"Python {platform.python_version()}, {about['versions']}\n{about['processor']}"
    )


def run_or_exit(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Return function(*arguments); an error that is foreseen ends the process with one line.

    The exit code is 2 for a user's mistake, 1 for a failure, 130 on Ctrl-C and 143 on SIGTERM.
    """
    try:
        answer = function(*arguments)
    except (UserError, RunFailed) as error:
        if not stopping.requested:
            print_line(f"{SCRIPT}: {' '.join(str(error).splitlines())}", sys.stderr)
            sys.exit(2 if isinstance(error, UserError) else 1)
    except (KeyboardInterrupt, Exception) as error:
        if not stopping.requested and is_process_limit(error):
            print_line(
                f"{SCRIPT}: cannot create another process, thread or file ({briefly(error)}); "
                "raise the limit (ulimit -u, ulimit -n, or the container's pids.max)",
                sys.stderr,
            )
            sys.exit(1)
        if not stopping.requested:
            from harness.cli import own_files  # it imports NumPy, which --help does without

            line = own_files.blame(error)
            if not line:
                raise
            print_line(f"{SCRIPT}: {line}", sys.stderr)
            sys.exit(2)
    else:
        if not stopping.requested:
            return answer
    # All is written. Python's own way out would meet TensorFlow's threads, and may abort.
    stopping.remove_generated_files()
    os._exit(128 + stopping.requested)


def is_process_limit(error: BaseException) -> bool:
    """Return whether an error says that no more processes, threads or open files are allowed."""
    if isinstance(error, OSError):
        return error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)
