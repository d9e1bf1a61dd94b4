"""Networks other than the default one, and custom ones.

A row is a function that returns new Keras layers, those before the logits. They get images
float32[n,H,W,channels] in 0..1; the numbers of parameters are those for MNIST.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import is_main, trust
from harness.fields import UserError
from harness.files import briefly, expand_path, read_bytes
from harness.layers import conv, dense

import tensorflow as tf

OWN_MODULES = "model_file"  # what the modules of users' files are called, with a hash behind


def build_logreg() -> list[Any]:
    """Softmax regression on the pixels, 7,850 parameters."""
    return dense()


def build_mlp() -> list[Any]:
    """One hidden layer."""
    return dense(128)


def build_2nn() -> list[Any]:
    """McMahan et al. 2017, section 3: the 2NN, 199,210 parameters."""
    return dense(200, 200)


def build_cnn() -> list[Any]:
    """McMahan et al. 2017, section 3: the CNN, 1,663,370 parameters."""
    return [*conv(32), *conv(64), *dense(512)]


def build_small_cnn() -> list[Any]:
    """The CNN with a half of its filters and a quarter of its units, 215,370 parameters."""
    return [*conv(16), *conv(32), *dense(128)]


def build_lenet() -> list[Any]:
    """Li et al. 2022, section V: LeNet-5 with max-pooling and ReLU, 44,426 parameters."""
    return [*conv(6, padding="valid"), *conv(16, padding="valid"), *dense(120, 84)]


def load_own(name: str) -> Callable[[], list[Any]]:
    """Return the function that FILE.py:FUNCTION names. Raises UserError if there is none.

    The file is run as an import would run it, with its own folder on Python's path; its text is
    part of what the run is.
    """
    file, _, function_name = name.rpartition(":")
    source = f"model={name!r:.200}"
    path = expand_path(file).absolute()
    try:
        text = read_bytes(path)
    except OSError as error:
        raise UserError(
            f"{source} cannot be read ({error.strerror}); give an existing file"
        ) from error
    digest = hashlib.sha256(text).hexdigest()
    trust.remember(digest)
    # Dataclasses and pickle look a class's module up by its name.
    module = types.ModuleType(f"{OWN_MODULES}_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: its names hide no installed package
    with errors_of_own_code(f"{source}: its file", path):
        exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
    function = vars(module).get(function_name)
    if not callable(function):
        raise UserError(
            f"{source}: the file has no function {function_name}; give the name of one it has"
        )
    # A run is the same wherever this file lies: a path is no part of a row's hash, its digest is.
    return partial(call_own, function, Path(f"{path}:{function_name}"), digest)


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
        raise UserError(
            f"{what} raised {type(error).__name__} ({briefly(error)}); fix it"
        ) from error
    finally:
        sys.argv = words


def call_own(function: Callable, path: Path, digest: str) -> list[Any]:
    """Return the layers that a user's function makes. Raises UserError if it makes others.

    `path` is FILE.py:FUNCTION, `digest` the SHA-256 of the file.
    """
    source = f"model={str(path)!r:.200}"
    with errors_of_own_code(source, path):
        made = function()
    layers = list(made.layers) if isinstance(made, tf.keras.Sequential) else made
    is_layers = isinstance(layers, list | tuple) and all(
        isinstance(layer, tf.keras.layers.Layer) for layer in layers
    )
    if not is_layers or not layers:
        raise UserError(
            f"{source} returns {type(made).__name__}; return a list of Keras layers, without the "
            "logits layer"
        )
    return list(layers)
