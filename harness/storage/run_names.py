"""The name of a run's folder, how the folder is made, and the command that continues the run."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import SCRIPT
from harness.cli.fields import UserError, in_notebook
from harness.cli.own_files import short_name
from harness.cli.run_options import changed_fields, identity, show
from harness.storage.files import InUse, io_errors_as_user_errors, numbered, one_line, write_file
from harness.storage.provenance import ROOT

LONGEST_NAME = 120  # letters of a folder's name that is made of a run's fields
NAMED_FIRST = ("dataset", "partition", "algorithm", "model", "seed")  # in each folder's name


def default_name(config: Any, dataset: Any) -> str:
    """Return the name of a run's folder if the user gives none.

    It ends with the fields that are not as by default, such as "-alpha0.1".
    """
    data = config.data.dataset
    if data == "mnist" and not dataset.is_mnist:
        stem = Path(config.data.data).stem if config.data.data else "other"
        data = re.sub(r"[^\w.-]+", "-", stem)[:40]
    choices = (config.partition_name, config.optimization.algorithm, config.training.model)
    names = [short_name(choice).replace(".py:", "-") for choice in choices]
    name = "-".join([data, *names, f"seed{config.seed}"])
    for field, value in changed_fields(identity(config), type(config)()).items():
        if field in NAMED_FIRST:
            continue
        longer = f"{name}-{name_value(field, value)}"
        if len(longer) > LONGEST_NAME:
            return f"{name}-and-more"
        name = longer
    return name


def name_value(field: str, value: Any) -> str:
    """Return a field and its value in a folder's name: "alpha0.1", "aggregator-median"."""
    if isinstance(value, bool):
        return field if value else f"no-{field}"
    shown = short_name(value) if isinstance(value, str) else show(value)
    text = re.sub(r"[^\w.-]+", "-", shown)[:40]
    return f"{field}-{text}" if isinstance(value, str) else f"{field}{text}"


def make_resume_hint(path: Path, given: str = "") -> str:
    """Return how to continue a stopped run: a command, or for custom arrays a Python call."""
    if given or in_notebook():
        call = f"fl.run(config.replace(resume={os.fsdecode(path)!r}){given})"
        return one_line(f"to continue: {call}")
    return one_line(f"to continue: {script_command()} --resume {shlex.quote(str(path))}")


def script_command() -> str:
    """Return how the script is started from here, by this Python: "python federated_learning.py".

    A Python of a virtual environment that the shell has not entered is named by its path.
    """
    found = shutil.which("python")
    is_found = found is not None and os.path.samefile(found, sys.executable)
    same_environment = is_found and Path(found).parent == Path(sys.executable).parent
    python = "python" if same_environment else from_here(Path(sys.executable))
    script = ROOT / SCRIPT
    return f"{shlex.quote(python)} {shlex.quote(from_here(script))}"


def from_here(path: Path) -> str:
    """Return the path, relative to the working folder if it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def make_run_folder(
    runs: Path, name: str, files: dict[str, str], is_only_one: bool = False
) -> Path:
    """Make a new folder in `runs` with these files in it, all at once.

    A name that is taken gets -2, -3, ...; if `is_only_one`, it raises InUse.
    """
    with io_errors_as_user_errors(runs, "--runs"):
        runs.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=runs))
    try:
        with io_errors_as_user_errors(made, "--runs"):
            made.chmod(0o777 & ~current_umask())
        for file, text in files.items():
            write_file(made / file, text, flag="--runs")
        for folder in [runs / name] if is_only_one else numbered(runs / name):
            try:
                # with all files in it, or not at all where the name is taken
                return made.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise UserError(
                        f"cannot make {folder}: {error.strerror}; choose another folder with --runs"
                    ) from error
        raise InUse(f"{runs / name} was made by another process at this moment")
    finally:
        shutil.rmtree(made, ignore_errors=True)  # where it has not become the folder


def current_umask() -> int:
    """Return the umask, as Linux tells it without changing it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)
