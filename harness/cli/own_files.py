"""Parts of an experiment in a file of the user's own: FILE.py:NAME in place of a choice's name."""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import is_main
from harness.cli import trust
from harness.cli.fields import UserError
from harness.storage import provenance
from harness.storage.files import expand_path, reason_of

import numpy as np

# In place of a choice's name: a file and a function in it, or one given in Python.
OWN = r".+\.py:\w+|python:\w+"
GIVEN: dict[str, Callable] = {}  # python:NAME -> the function
# Fields that may name one.
OWN_FIELDS = ("partition", "model", "algorithm", "aggregator", "loss", "metrics")
PLACE = re.compile(r'File "(.+)", line (\d+)')  # in a traceback
OWN_MODULES = "own_file"  # what the modules of users' files are called, with a hash behind
# Of a folder with users' files: the names of modules and packages there that they import, the
# modules themselves, and the hashes of their texts as they were imported.
NEARBY: dict[Path, set[str]] = {}
IMPORTED: dict[Path, dict[str, types.ModuleType]] = {}
TEXTS: dict[Path, dict[Path, int]] = {}


def is_own(name: str) -> bool:
    """Return whether a choice's name is FILE.py:NAME, or python:NAME."""
    return ".py:" in name or name.startswith("python:")


def own_fields(fields: dict[str, Any]) -> dict[str, str]:
    """Return field -> FILE.py:NAME, of the fields of a configuration that name one."""
    return {field: fields[field] for field in OWN_FIELDS if ".py:" in fields[field]}


def give(function: Callable) -> str:
    """Return a name for a function that is given in Python, python:NAME, and remember it."""
    is_model = hasattr(function, "trainable_weights")  # and so callable, but made already
    if is_model or not callable(function):
        raise UserError(
            f"model={function!r:.60} is not a function; give one that returns new Keras layers or "
            "a new Keras model on each call"
        )
    own_name = re.sub(r"\W", "", getattr(function, "__name__", "")) or "model"
    GIVEN[f"python:{own_name}"] = function
    return f"python:{own_name}"


def short_name(name: str) -> str:
    """Return a choice's name for captions and tables: of FILE.py:NAME without the folder."""
    return name.rpartition("/")[2].removeprefix("python:") if is_own(name) else name


def load_function(name: str, field: str) -> partial:
    """Return call_function with what FILE.py:NAME names bound: it takes that function's arguments.

    The file is run as an import would run it, with its own folder on Python's path; the hash of its
    text, and of the files there that it imports, is part of what is returned. Raises UserError,
    which blames the flag `field`.
    """
    file, _, function_name = name.rpartition(":")
    source = f"{field}={name!r:.200}"
    if name in GIVEN and field == "model":
        return partial(call_function, GIVEN[name], Path(name), "", field)
    if name.startswith("python:") and field != "model":
        raise UserError(f"{source} is not a file; give FILE.py:FUNCTION")
    if name.startswith("python:"):
        raise UserError(
            f"{source} was given in another Python session; give a file, or the function again "
            "with fl.run(config, model=function)"
        )
    path = expand_path(file).absolute()
    try:
        contents = trust.read_with_imports(path)
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror}); give an existing file"
        ) from error
    digest = trust.hash_files(contents)
    trust.remember(digest)
    module = load_module(path, contents, digest, source)
    function = vars(module).get(function_name)
    if not callable(function):
        raise UserError(
            f"{source}: the file has no function {function_name}; give the name of one it has"
        )
    # A run is the same wherever this file lies: a path is no part of a row's hash, its digest is.
    return partial(call_function, function, Path(f"{path}:{function_name}"), digest, field)


def load_module(
    path: Path, contents: dict[Path, bytes], digest: str, source: str
) -> types.ModuleType:
    """Return the module of a file, which is run once a process; `contents` has those it imports."""
    name = f"{OWN_MODULES}_{digest[:16]}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    # Dataclasses and pickle look a class's module up by its name.
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    note_imports(path, contents)
    try:
        with errors_of_own_code(f"{source}: its file", path), modules_of(path.parent):
            exec(compile(contents[path], str(path), "exec", dont_inherit=True), vars(module))
            check_imports(path.parent, source)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class FromText(importlib.machinery.SourceFileLoader):
    """Compiles a module's text. Python's cached bytecode may be of an earlier text, if both are of
    the same length and were written within a second."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Return the code of the file as it is now."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def find_text(place: str) -> importlib.machinery.FileFinder:
    """Return what finds modules in a folder on Python's path: in a user's own, as texts.

    Raises ImportError for other folders, which are left to Python's own finders.
    """
    if not is_imported_from(place):
        raise ImportError(f"{place} has no user's file")
    texts = FromText, importlib.machinery.SOURCE_SUFFIXES
    libraries = importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES
    return importlib.machinery.FileFinder(place, libraries, texts)


def is_imported_from(place: str) -> bool:
    """Return whether a folder has a user's file, or is in a package that such a file imports."""
    path = Path(place)
    return any(
        path == folder
        or (path.is_relative_to(folder) and path.relative_to(folder).parts[0] in names)
        for folder, names in NEARBY.items()
    )


def note_imports(path: Path, contents: dict[Path, bytes]) -> None:
    """Remember what a user's file imports from its folder; modules of other texts are forgotten."""
    folder = path.parent
    others = [file for file in contents if file != path]
    names = {file.relative_to(folder).parts[0].partition(".")[0] for file in others}
    texts = {file: hash(contents[file]) for file in others}
    before = TEXTS.setdefault(folder, {})
    if any(before.get(file, text) != text for file, text in texts.items()):
        IMPORTED[folder] = {}
        before.clear()
    before.update(texts)
    NEARBY.setdefault(folder, set()).update(names)
    if find_text not in sys.path_hooks:
        sys.path_hooks.insert(0, find_text)
    for place in filter(is_imported_from, list(sys.path_importer_cache)):
        del sys.path_importer_cache[place]


def check_imports(folder: Path, source: str) -> None:
    """Raise UserError if Python found a module of a name in `folder` elsewhere, as in a notebook's
    own folder: the run would not know its text."""
    for name, module in find_modules(NEARBY[folder]).items():
        file = getattr(module, "__file__", None)
        if file and not Path(file).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{source}: `import {name}` finds {file!r:.200}, not the file of this name in its "
                "own folder; rename one"
            )


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Have imports find the modules in the folder of a user's file, and no others by their names.

    Afterwards a module of such a name that the session had is back.
    """
    if folder not in NEARBY:  # of a function that was given in Python
        yield
        return
    names = NEARBY[folder]
    own = IMPORTED.setdefault(folder, {})
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: its names hide no installed package
    path = list(sys.path)
    before = find_modules(names)
    for name in before:
        del sys.modules[name]
    sys.modules.update(own)
    sys.path.sort(key=lambda place: is_own_folder(place) and place != str(folder))
    try:
        yield
    finally:
        own.update(find_modules(names))
        sys.modules.update(before)
        sys.path[:] = path


def is_own_folder(place: str) -> bool:
    """Return whether a place on Python's path is there for a user's file."""
    return Path(place) in IMPORTED


def find_modules(names: set[str]) -> dict[str, types.ModuleType]:
    """Return the modules in use of these names, and in packages of these names, that are not
    installed."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in names and not is_installed(module)
    }


def is_installed(module: types.ModuleType) -> bool:
    """Return whether a module is one of the program, of Python or of an installed package."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    files = [place for place in places if place]
    return not files or any(map(provenance.is_known, files))


def call_function(
    function: Callable, path: Path, digest: str, field: str, *arguments: Any, **named: Any
) -> Any:
    """Return function(*arguments, **named), a user's. Raises UserError for whatever it raises.

    `path` is FILE.py:NAME, `digest` the SHA-256 of the file. The function gets copies of arrays,
    which it may change; what it yields is returned as a list.
    """
    copies = [x.copy() if isinstance(x, np.ndarray) else x for x in arguments]
    with errors_of_own_code(f"{field}={str(path)!r:.200}", path), modules_of(path.parent):
        returned = function(*copies, **named)
        return list(returned) if isinstance(returned, types.GeneratorType) else returned


def change_function(called: Any, change: Callable) -> Any:
    """Return what load_function returned, with change(function) in the place of the function."""
    function, *place = called.args
    return partial(called.func, change(function), *place)


@contextlib.contextmanager
def errors_of_own_code(what: str, path: Path) -> Iterator[None]:
    """Turn whatever a user's code raises into one line, sys.exit too: it would end the run.

    The code sees a command line without flags, as ours are not its own.
    """
    words = sys.argv
    sys.argv = [str(path)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())  # in an error argparse prints its usage
    except UserError:
        raise
    except SystemExit as leaving:
        raise UserError(
            f"{what} calls sys.exit({leaving.code!r:.60}), as argparse does; move code that "
            'belongs to a script under `if __name__ == "__main__":`'
        ) from leaving
    except KeyboardInterrupt as error:
        if not is_main():  # the user's own Ctrl-C
            raise
        raise UserError(f"{what} raises KeyboardInterrupt; fix it") from error
    except BaseException as error:
        where = find_line(error, path)
        raise UserError(
            f"{what} raised {type(error).__name__} ({reason_of(error)}){where}; fix it"
        ) from error
    finally:
        sys.argv = words


def find_places(error: BaseException) -> list[tuple[str, str]]:
    """Return the (file, line number) that an error went through, from the outermost."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, str(frame.lineno)) for frame in frames]
    return places + PLACE.findall(str(error))  # AutoGraph runs a copy of a file, and names this one


def blame(error: BaseException) -> str:
    """Return a line on an error that a user's file raised in a run, such as its part of a round, or
    "" of another."""
    files = {
        module.__file__ for name, module in sys.modules.items() if name.startswith(OWN_MODULES)
    }
    own = [place for place in find_places(error) if place[0] in files]
    if not own:
        return ""
    place = ":".join(own[-1])
    return f"{place} raised {type(error).__name__} ({reason_of(error)}); fix it"


def find_line(error: BaseException, path: Path) -> str:
    """Return " in line 12", the last line of the user's file that an error went through."""
    file = str(path).rpartition(":")[0] if is_own(str(path)) else str(path)
    lines = [line for name, line in find_places(error) if name == file]
    return f" in line {lines[-1]}" if lines else ""
