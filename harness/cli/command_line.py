"""The command line: from words to a configuration, from errors to one line, and printed output."""

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
from typing import Any, TypeVar

from harness import SCRIPT
from harness.cli.fields import (
    ConfigGroup,
    UserError,
    cached,
    choice_lines,
    hints,
    name_fields,
    render_as_line,
)
from harness.cli.flags import check_flags, find_field, split_off, wants_help
from harness.cli.run_options import (
    BY_CONTENT,
    FIRST_FIELDS,
    MAY_GROW,
    SINCE_1_2,
    SINGLE,
    identity,
)
from harness.comparing.sweep import rows_to_text
from harness.engine import stopping
from harness.storage.files import briefly, expand_path, read_bytes, read_json
from harness.storage.provenance import ROOT, changed, describe_provenance, read_programs

import tqdm
import tyro

Answer = TypeVar("Answer")
# Fields of a run's config.json that a new run has not.
OF_ONE_COMMAND = (
    "config",
    "resume",
    "accept_changes",
    "time_limit",
    "quiet",
    "json",
    "predict",
    "pictures",
    "list",
    "version",
)
CANNOT_TAKE_MORE = (
    errno.EPIPE,
    errno.ENOSPC,
    errno.EIO,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EBADF,  # it was opened for reading
)
NARROWEST = 60  # columns
TYRO_LOCK = threading.Lock()  # it keeps settings of one call in global variables


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
    asks_for_help = wants_help(words)
    if not asks_for_help:
        check_flags(words, kind.types())
    add_help(kind)
    with tolerate_closed_stream(sys.stdout), TYRO_LOCK, wide_enough():
        try:
            return tyro.cli(
                kind,
                args=words,
                default=default,
                prog=SCRIPT,
                # python -OO leaves no docstring
                description=describe(kind),
                config=(tyro.conf.OmitArgPrefixes,),  # --alpha, not --partitioning.alpha
                console_outputs=asks_for_help,
            )
        except SystemExit as leaving:
            if leaving.code and not asks_for_help:
                raise UserError("cannot parse the flags; see --help") from None
            raise
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
            lines = [f"- {name}: {line}" for name, line in choice_lines(types[field]).items()]
            group.__dataclass_fields__[field].metadata = {"help": "\n".join([text, *lines])}
    for inner in types.values():
        if isinstance(inner, type) and issubclass(inner, ConfigGroup):
            add_help(inner)


def read_saved(folder: str, default: ConfigGroup) -> Any:
    """Return the configuration of the run in `folder`, checked as a new one is."""
    path = expand_path(folder) / "config.json"
    if os.path.exists(path.with_name("comparison.json")):
        raise UserError(
            f"{str(path.parent)!r:.200} is a comparison, not a run; to continue it, run the "
            "command that made it"
        )
    fields = read_json(path)
    known = default.to_dict().keys()
    required = {*FIRST_FIELDS, *MAY_GROW, *BY_CONTENT, "compare", "seeds"} - {*SINCE_1_2}
    strange = (fields.keys() - known) | (required - fields.keys())
    if strange:
        raise UserError(
            f"{path}: the field {min(strange)!r:.60} is unknown or missing; restore the file"
        )
    split = path.with_name("partition.json")
    if fields["partition_file"] and "indices" in read_json(split):
        # The split is as the run got it, wherever that file is now.
        fields["partition_file"] = str(split)
    # A folder that came from elsewhere asks for nothing else than its own run.
    usual = default.defaults()
    asked = {field: usual[field] for field in (*OF_ONE_COMMAND, *SINGLE, "evaluate")}
    try:
        return default.replace(**{**fields, **asked, "resume": folder})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_config_file(words: Sequence[str], default: ConfigGroup) -> Any:
    """Return the configuration that --config names, as a default for flags; None without the flag.

    What belongs to one run alone, such as what it resumed, is left out. Raises UserError for a file
    that has something else.
    """
    names, others = split_off(words, "config")
    if not names:
        return None
    if split_off(others, "resume")[0]:
        raise UserError(
            f"--config {names[-1]!r:.200} cannot be combined with --resume, which takes all "
            "fields from the saved run; drop one of them"
        )
    path = expand_path(names[-1])
    fields = read_groups(path, default)
    own = {field: value for field, value in fields.items() if field not in OF_ONE_COMMAND}
    try:
        if isinstance(own.get("compare"), list):  # [[compare]], a table a row
            own["compare"] = rows_to_text(own["compare"])
        for field in own:
            find_field(f"--{field}", default.types())  # tells what it may be called here
        return default.replace(**own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_groups(path: Path, default: ConfigGroup) -> dict[str, Any]:
    """Return field -> value in a file whose tables are groups of fields, such as [training].

    Raises UserError for another table, a field in the table of another group, and one given twice.
    """
    groups = {name: g for name, g in vars(default).items() if isinstance(g, ConfigGroup)}
    fields: dict[str, Any] = {}
    for name, value in read_table(path).items():
        if not isinstance(value, dict):
            found = {name: value}
        elif name in groups:
            found = value
            strange = sorted(value.keys() & default.to_dict().keys() - groups[name].to_dict())
            if strange:
                raise UserError(
                    f"{path}: [{name}] has no field {strange[0]}; move it to its own table, or "
                    "above all tables"
                )
        else:
            raise UserError(
                f"{path}: [{name!s:.60}] is not a group of fields; choose {', '.join(groups)}, or "
                "remove the table heading"
            )
        twice = sorted(found.keys() & fields.keys())
        if twice:
            raise UserError(f"{path}: {twice[0]} is given twice; give it once")
        fields |= found
    return fields


def read_table(path: Path) -> dict[str, Any]:
    """Return what a TOML or JSON file holds. Raises UserError if it cannot be read."""
    if path.suffix != ".toml":
        return read_json(path)
    try:
        return tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give an existing file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise UserError(f"{path} is not valid TOML ({briefly(error)}); fix it") from error


def print_version() -> None:
    """Print what a bug report should contain."""
    about = describe_provenance(None)
    state = {True: "clean", False: "edited since", None: "no git repository"}[about["clean"]]
    project = tomllib.loads(read_bytes(ROOT / "pyproject.toml").decode())["project"]
    print_line(
        f"{SCRIPT} {project['version']}, commit {about['commit'] or 'unknown'} ({state})\n"
        f"Python {platform.python_version()}, {about['versions']}\n{about['processor']}"
    )


def check_resumed(
    config: ConfigGroup, saved: ConfigGroup, row_hashes: dict[str, str] | None = None
) -> None:
    """Raise UserError if a run would be resumed with another configuration, or by another program.

    `row_hashes` are those of the rows in use; None before they are known.
    """
    ours = identity(config)
    theirs = identity(saved)
    folder = config.to_dict()["resume"]
    last = read_programs(expand_path(folder))[-1]
    names = ", ".join(changed(last, last["rows"] if row_hashes is None else row_hashes))
    if names and not config.to_dict()["accept_changes"]:
        raise UserError(
            f"resume={folder!r:.200}: the program has changed since that run ({names:.200}); "
            "restore it, start a new run, or add --accept-changes to continue anyway"
        )
    usual = config.defaults()  # of fields that one of them leaves out
    for field in sorted(ours.keys() | theirs.keys()):
        wanted = ours.get(field, usual.get(field))
        used = theirs.get(field, usual.get(field))
        if wanted != used:
            raise UserError(
                f"{field}={wanted!r} differs from {used!r} of {folder}; drop the flag, or start a "
                "new run"
            )
    rounds = config.to_dict()["rounds"]
    done = saved.to_dict()["rounds"]
    if rounds < done:
        raise UserError(
            f"--rounds {rounds} is less than the {done} rounds of {folder}; give a larger number, "
            "or omit --rounds"
        )


def check_single(config: ConfigGroup) -> None:
    """Raise UserError for a configuration that asks for more or less than one run."""
    fields = config.to_dict()
    for field, usual in SINGLE.items():
        if fields[field] != usual:
            raise UserError(
                f"{field}={fields[field]!r:.60} asks for more than one run; call "
                "fl.compare(config), or fl.main(config) for folders of finished runs"
            )
    for field in ("list", "evaluate", "predict", "version"):
        if fields[field]:
            raise UserError(f"{field}={fields[field]!r:.60} does not train; call fl.main(config)")


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
            raise
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
        tqdm.tqdm.write(printable(text), file=stream)
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


def printable(text: str) -> str:
    """Return `text` without characters that steer a terminal; names of files may have any."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


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
