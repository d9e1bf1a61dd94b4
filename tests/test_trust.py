"""Files that came from elsewhere are data: nothing in them is run, and no text of theirs is one of
ours."""

import csv
import hashlib
import html.parser
import io
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import federated_learning as fl
from harness.cli import own_files, trust
from harness.cli.fields import UserError
from harness.comparing import tables
from harness.reporting import report
from harness.reporting.results import weights_sha256
from harness.storage.files import csv_table

import h5py
import numpy as np
import pytest
from reference import weights_of
from runs import NO_FIGURES, call_script, configure, read_metrics

SMALL = {"dataset": "digits", "model": "logreg", "num_clients": 2, "rounds": 1, "local_epochs": 1}
NET = """
import tensorflow as tf

open({mark!r}, "w").close()

class Twice(tf.keras.layers.Layer):
    def call(self, x):
        return 2 * x

def build():
    layers = tf.keras.layers
    return [layers.Flatten(), layers.Lambda(lambda x: x / 2), Twice(), layers.Dense(8, "relu")]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def run(**flags):
    return fl.run(configure(**SMALL | {"figures": "none"} | flags))


def add_command(path, command):
    """Makes a .keras file whose configuration calls os.system (CVE-2025-1550)."""
    call = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "registered_name": None,
        "config": {
            "name": "call",
            "function": {
                "module": "os",
                "class_name": "function",
                "config": "system",
                "registered_name": "system",
            },
            "arguments": {},
        },
        "build_config": {"input_shape": [None, 8]},
        "inbound_nodes": [
            {"args": [{"class_name": "_CONSTANT_VALUE", "config": command}], "kwargs": {}}
        ],
    }
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"].append(call)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_no_configuration_of_a_keras_file_is_read(here):
    """Its weights are taken, and the command in it is not run; nor is it by --evaluate."""
    end = run(name="theirs")
    add_command(end.folder / "global_model.keras", f"touch {here}/ran")
    begun = fl.build_experiment(
        configure(**SMALL, initial_model=str(end.folder / "global_model.keras"))
    )
    assert weights_sha256(begun.initial_weights) == weights_sha256(weights_of(end.state))
    fl.main(fl.parse("--evaluate runs/theirs --figures none"))
    assert not (here / "ran").exists()


def rewrite_weights(path, change):
    """Calls change(h5py.File) on the weights in a .keras file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = io.BytesIO(members["model.weights.h5"])
    with h5py.File(content, "r+") as stored:
        change(stored)
    members["model.weights.h5"] = content.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, kept in members.items():
            archive.writestr(name, kept)


FIRST = "_layer_checkpoint_dependencies/dense/vars/0"


def replace_by_huge(stored):
    del stored[FIRST]
    stored.create_dataset(FIRST, (2**40,), "f4", chunks=(1024,))


def replace_by_link(stored):
    del stored[FIRST]
    stored[FIRST] = h5py.ExternalLink("/etc/passwd", "/x")


def replace_by_file(stored):
    shape = stored[FIRST].shape
    del stored[FIRST]
    stored.create_dataset(FIRST, shape, "f4", external=[("/dev/zero", 0, 4 * int(np.prod(shape)))])


@pytest.mark.parametrize("change", [replace_by_huge, replace_by_link, replace_by_file])
def test_weights_that_are_not_in_the_file_are_refused(here, change):
    end = run(name="theirs")
    rewrite_weights(end.folder / "global_model.keras", change)
    with pytest.raises(UserError, match="has weights of shapes|cannot be read as a Keras model"):
        fl.build_experiment(
            configure(**SMALL, initial_model=str(end.folder / "global_model.keras"))
        )


def test_a_custom_model_is_evaluated_and_begun_from(here):
    """With a Lambda and a Layer subclass; --evaluate gives the accuracy of the last round."""
    (here / "net.py").write_text(NET.format(mark=str(here / "ran")))
    end = run(name="own", model="net.py:build")
    saved = str(end.folder / "global_model.keras")
    begun = fl.build_experiment(configure(**SMALL | {"model": "net.py:build"}, initial_model=saved))
    assert weights_sha256(begun.initial_weights) == weights_sha256(weights_of(end.state))
    fl.main(fl.parse("--evaluate runs/own --figures none --name ev"))
    metrics = read_metrics(here / "runs" / "ev")
    assert metrics["test_accuracy"] == end.records[-1].test_accuracy


@pytest.mark.parametrize("flags", ["--evaluate", "--rounds 2 --resume", "--config"])
def test_somebody_elses_folder_runs_no_file(here, monkeypatch, flags):
    """Its config.json names a Python file in it: it runs once the user names it, and from then on,
    as long as it is the same."""
    mark = here / "ran"
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "others"))
    (here / "x.py").write_text(NET.format(mark=str(mark)))
    end = run(name="theirs", model="x.py:build")
    shutil.copy(here / "x.py", end.folder / "x.py")
    config = json.loads((end.folder / "config.json").read_text())
    config["model"] = str(end.folder.absolute() / "x.py:build")
    (end.folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    mark.unlink()
    named = str(end.folder / ("config.json" if flags == "--config" else ""))
    with pytest.raises(UserError, match="which you have not run before; read it"):
        fl.main(fl.parse(f"{flags} {named} --figures none"))
    assert not mark.exists()
    if flags == "--evaluate":
        fl.main(fl.parse(f"{flags} {named} --figures none --model {config['model']}"))
        assert mark.exists()
        fl.main(fl.parse(f"{flags} {named} --figures none"))  # now it is known
    (end.folder / "x.py").write_text("# another\n")
    with pytest.raises(UserError, match="which you have not run before"):
        trust.check_file("model", config["model"], "theirs")


LAZY = """
def metric(labels, predictions):
    import plain.tool
    return plain.tool.NUMBER
"""


def load_metric(path):
    return own_files.load_function(f"{path}:metric", "metrics")


def write_metric(folder, number):
    """A metric that is `number`, by a module and a package beside its file."""
    (folder / "pack").mkdir(parents=True)
    (folder / "pack" / "__init__.py").write_text("from . import inner\n")
    (folder / "pack" / "inner.py").write_text(f"NUMBER = {number}\n")
    (folder / "helpers.py").write_text("from pack import inner\nNUMBER = inner.NUMBER\n")
    lines = ["import numpy", "import federated_learning", "import helpers"]
    body = ["def metric(labels, predictions):", "    return helpers.NUMBER"]
    (folder / "own.py").write_text("\n".join([*lines, *body]))
    return f"{folder / 'own.py'}:metric"


def test_a_file_is_its_imports_too(here, monkeypatch):
    """Each gets the modules beside it, as they are now; other ones are not known.

    One is edited within the second in which it was imported, and as long as before: Python's
    bytecode of it would do for both.
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    one = write_metric(here / "one", 1)
    two = write_metric(here / "two", 2)
    session = types.ModuleType("helpers")  # of the user's own
    session.__file__ = str(here / "helpers.py")
    monkeypatch.setitem(sys.modules, "helpers", session)
    loaded = [own_files.load_function(name, "metrics") for name in (one, two, one)]
    assert [function([], []) for function in loaded] == [1, 2, 1]
    assert sys.modules["helpers"] is session
    digests = [function.args[2] for function in loaded]
    assert digests[0] == digests[2] != digests[1]
    trust.check_file("metrics", one, "theirs")
    shutil.copytree(here / "one", here / "elsewhere")
    trust.check_file("metrics", f"{here / 'elsewhere' / 'own.py'}:metric", "theirs")
    (here / "one" / "pack" / "inner.py").write_text("NUMBER = 3\n")
    with pytest.raises(UserError, match="which you have not run before; read it, and the files"):
        trust.check_file("metrics", one, "theirs")
    edited = own_files.load_function(one, "metrics")
    assert edited([], []) == 3 and edited.args[2] not in digests
    # a package without __init__.py, imported where it is used; what Python compiles is no text
    for folder, number in (("one", 1), ("two", 2)):
        (here / folder / "plain").mkdir()
        (here / folder / "plain" / "tool.py").write_text(f"NUMBER = {number}\n")
        (here / folder / "lazy.py").write_text(LAZY)
    lazy = [load_metric(here / folder / "lazy.py") for folder in ("one", "two", "one")]
    assert [function([], []) for function in lazy] == [1, 2, 1]
    again = load_metric(here / "one" / "lazy.py")
    assert again.args[2] == lazy[0].args[2] != lazy[1].args[2]
    # without other files it is the file's own hash, as of runs before
    (here / "alone.py").write_text("import os\ndef metric(labels, predictions):\n    return 4\n")
    alone = own_files.load_function(f"{here / 'alone.py'}:metric", "metrics")
    assert alone.args[2] == hashlib.sha256((here / "alone.py").read_bytes()).hexdigest()


def test_a_saved_configuration_asks_for_nothing_but_its_run(here):
    end = run(name="theirs")
    config = json.loads((end.folder / "config.json").read_text())
    asked = {"list": "runs", "version": True, "evaluate": "runs/x", "compare": "iid,shards"}
    (end.folder / "config.json").write_text(json.dumps(config | asked | {"seeds": 3}))
    resumed = fl.parse("--resume runs/theirs --rounds 2")
    assert (resumed.run.list, resumed.run.version, resumed.run.evaluate) == ("", False, "")
    assert (resumed.comparison.compare, resumed.comparison.seeds) == ("", 1)


EVIL = "a\n\\input{/etc/passwd}\r$x^2$ ~_%&#|`<b>[x](y)"


def table_of(name):
    row = dict.fromkeys([tables.ROW, *tables.COLUMNS])
    return [row | {tables.ROW: name, "seeds": 2, "mean": 90.0, "rounds": 5.0}]


def test_no_name_is_a_command_in_latex(here):
    text = tables.to_latex(table_of(EVIL), EVIL)
    assert len(text.splitlines()) == 12  # a table environment with one row
    row = text.splitlines()[8]
    assert row.startswith("a\ufffd\\textbackslash{}input\\{/etc/passwd\\}")
    for sign in ("\\$x\\textasciicircum{}2\\$", "\\textasciitilde{}\\_\\%\\&\\#"):
        assert sign in row
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex here: what it makes of the table is not tried")
    page = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}"
    plain = tables.to_latex(table_of(EVIL.replace("\n", "").replace("\r", "")), "caption")
    Path("page.tex").write_text(f"{page}\\begin{{document}}{plain}\\end{{document}}")
    done = subprocess.run(["pdflatex", "-halt-on-error", "page.tex"], capture_output=True)
    assert done.returncode == 0, done.stdout[-500:]


def test_no_name_makes_a_cell_in_markdown_or_a_formula_in_csv():
    lines = tables.to_markdown(table_of(EVIL)).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == lines[0].count("|")
    for text in ("=1+1", "+1", "-1", "@x", "\n=1"):
        (row,) = csv.DictReader(csv_table([{"compared": text, "mean": -1.5}]).splitlines())
        assert not row["compared"].startswith(("=", "+", "-", "@")) and row["mean"] == "-1.5"


class Elements(html.parser.HTMLParser):
    """Collects the elements and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.found |= {name for name, _ in attributes}


def test_no_name_is_an_element_of_a_page(here):
    end = run(name="own", figures="png")
    metrics = read_metrics(end.folder)
    partition = json.loads((end.folder / "partition.json").read_text())
    plain = Elements()
    plain.feed(report.to_html("x", metrics, partition, {"a.png": b""}, {"x": "y"}))
    bad = "'\"><script src=x onerror=y>&lt;<img>"
    for content in (metrics, metrics["config"], metrics["provenance"]):
        for name, value in content.items():
            if isinstance(value, str):
                content[name] = bad
    partition["classes"] = [bad] * 10
    page = report.to_html(bad, metrics, partition, {f"{bad}.png": b""}, {"x": bad})
    evil = Elements()
    evil.feed(page)
    assert evil.found == plain.found


def test_a_name_with_a_line_end_forges_no_line(here):
    digits = fl.load_dataset(configure(dataset="digits").data)
    name = "a\nround 1   test accuracy 100.00%.npz"
    with open(here / name, "wb") as file:
        np.savez(
            file,
            x_train=digits.train.images,
            y_train=digits.train.labels,
            x_test=digits.test.images,
            y_test=digits.test.labels,
        )
    folder = "r\nround 1 too"
    flags = ("--data", name, "--rounds", "1", "--num-clients", "2", "--local-epochs", "1")
    done = call_script(here, "--model", "mlp", *flags, *NO_FIGURES, "--runs", folder)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("round 1") for line in done.stdout.splitlines()) == 1
    assert sum(line.startswith("round 1") for line in done.stderr.splitlines()) == 0
    made = "r\nround 1 too"
    for flags in (("--list", made), ("--compare", f"{made}/{os.listdir(made)[0]}", *NO_FIGURES)):
        done = call_script(here, *flags)
        assert done.returncode == 0, done.stderr
        assert not any(line.startswith("round 1") for line in done.stdout.splitlines())
