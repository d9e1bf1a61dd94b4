"""What made a run's numbers: an edited program is another, and its runs and rounds are not taken
for ours."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import federated_learning as fl
from harness.cli.fields import UserError
from harness.storage import provenance
from harness.training import layers
from variants import choices
from variants.choices import AggregatorChoice

import numpy as np
import pytest
from reference import replace_choice
from runs import ROOT, SECONDS, call_script, configure, read_metrics

TINY = "--dataset digits --model mlp --rounds 2 --local-epochs 1 --num-clients 4 --figures none"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("x = 1", "x = (\n 1)  # one", True),
        ('"""Doc."""\nx = 1', "x = 1", True),
        ('def f(a):\n    """Doc."""\n    return a', "def f(a): return a", True),
        ('class A:\n    x: int = 1\n    """Help."""', "class A:\n    x: int = 1", True),
        ("x = 1", "x = 1.0", False),
        ("w + mu * (a - b)", "w + mu * (b - a)", False),
        ("def f(a): return a", "def f(a): return -a", False),
        ("x = 'text'", "x = 'other'", False),
    ],
)
def test_a_source_is_what_it_does(before, after, same):
    assert (provenance.hash_source(before) == provenance.hash_source(after)) == same


CELL = """
import dataclasses, functools, sys
from harness.storage import provenance

@dataclasses.dataclass(frozen=True)
class Scale:
    factor: float = {factor}
    names: tuple = ("a", "b")

    @staticmethod
    def change(x):
        return x * {factor}

    @property
    def doubled(self):
        return self.factor * 2

@functools.lru_cache
def cached(x):
    return x in {{"mean", "median", "krum"}} or x == {factor}

Scale.rules = {{cached, Scale.change, len}}
Scale.groups = {{frozenset("ab"), frozenset("cd")}}
print(provenance.hash_rows({{"own": (Scale, cached, {{"one": {{"b", "a", "c"}}}})}})["own"])
"""


def test_a_notebooks_own_row_has_one_hash_in_every_process():
    """Sets have no order that is the same in two processes, and objects have addresses."""

    def hash_in_process(seed, factor):
        done = subprocess.run(
            [sys.executable, "-c", CELL.format(factor=factor)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert hash_in_process("1", "0.5") == hash_in_process("2", "0.5")
    assert hash_in_process("1", "0.5") != hash_in_process("1", "0.25")


@pytest.mark.parametrize(
    "decorator", ["staticmethod", "classmethod", "property", "functools.cache"]
)
def test_a_decorated_function_of_a_notebook_is_looked_into(decorator):
    def hash_of(body):
        names = {"functools": functools, "__name__": "cell"}
        source = f"class Own:\n    @{decorator}\n    def change(x):\n        return {body}\n"
        exec(compile(source, "<cell>", "exec"), names)
        return provenance.hash_rows({"own": names["Own"]})

    assert hash_of("x + 1") == hash_of("x + 1")
    assert hash_of("x + 1") != hash_of("x + 2")


SOURCES_OF_ROWS = [  # (a row, the same row edited)
    ("{'a': (1, 2)}", "('a', 1, 2)"),
    ("((1, 2), 3)", "(1, (2, 3))"),
    ("functools.partial(min, default=3)", "functools.partial(min, key=3)"),
    ("functools.partial(min, 1, 2)", "functools.partial(min, 1, x=2)"),
    ("np.float32(0.1)", "np.float32(0.2)"),
    ("np.int64(1)", "np.int64(2)"),
    ("np.arange(3)", "np.arange(4)"),
    ("field(default_factory=lambda: [1])", "field(default_factory=lambda: [2])"),
    ("functools.cached_property(lambda own: 1)", "functools.cached_property(lambda own: 2)"),
    ("functools.partialmethod(min, 1)", "functools.partialmethod(min, 2)"),
    ("functools.singledispatchmethod(lambda x: 1)", "functools.singledispatchmethod(lambda x: 2)"),
    ("property(None, lambda own, x: x)", "property(None, lambda own, x: -x)"),
]


@pytest.mark.parametrize(("row", "edited"), SOURCES_OF_ROWS, ids=str)
def test_an_edit_of_a_notebooks_row_is_seen(row, edited):
    """In a tuple, and as a member of a class."""

    def hashes(source):
        names = {
            "functools": functools,
            "np": np,
            "field": dataclasses.field,
            "__name__": "cell",
        }
        value = eval(compile(source, "<cell>", "eval"), names)
        members = {"__module__": "cell", "__annotations__": {"member": list}, "member": value}
        kind = type("Own", (), members)
        if isinstance(value, dataclasses.Field):
            kind = dataclasses.dataclass(kind)
        return provenance.hash_rows({"class": kind, "tuple": (value,)})

    assert hashes(row) == hashes(row)
    assert all(hashes(row)[place] != hashes(edited)[place] for place in ("class", "tuple"))


def test_hooks_of_a_notebooks_class_are_seen():
    def hash_of(body):
        names = {"__name__": "cell"}
        source = f"class Own:\n    def __init_subclass__(cls):\n        {body}\n"
        exec(compile(source, "<cell>", "exec"), names)
        return provenance.hash_rows({"own": names["Own"]})

    assert hash_of("cls.x = 1") == hash_of("cls.x = 1") != hash_of("cls.x = 2")


def test_a_row_that_contains_itself_has_a_hash():
    kind = type("Own", (), {"__module__": "cell", "registry": []})
    kind.registry.append(kind)
    around = {"rate": 0.1}
    around["self"] = around
    for row in (kind, around, mock.Mock()):
        provenance.hash_rows({"own": row})


def test_all_constants_of_a_row_count():
    def hash_of(**members):
        return provenance.hash_rows({"own": type("Own", (), {"__module__": "cell", **members})})

    values = [None, b"12", b"13", 0, False, "", 1.0, 1, (1, 2), [2, 1], {"a": 1}, {"a": 2}]
    assert len({hash_of(k=value)["own"] for value in values}) == len(values)
    defaults = {"__name__": "cell"}
    exec("def one(x, k=3): return x\ndef two(x, k=4): return x", defaults)
    one, two = (provenance.hash_rows({"own": defaults[name]}) for name in ("one", "two"))
    assert one != two


def test_every_file_that_numbers_follow_from_is_looked_at():
    names = set(provenance.program()["files"])
    assert {
        "federated_learning.py",
        "harness/engine/worker.py",
        "harness/engine/multi_host.py",
        "harness/engine/supervisor.py",
    } <= names
    assert {f"variants/{path.name}" for path in (ROOT / "variants").glob("*.py")} <= names
    assert set(provenance.program()["versions"]) == {
        "numpy",
        "scipy",
        "tensorflow",
        "tensorflow-federated",
    }


def test_a_row_that_a_notebook_puts_into_a_table_is_part_of_the_program(monkeypatch):
    """The script's own rows stand in its files; these stand nowhere but here, as in a notebook's
    cell."""

    def slower(parts, experiment):
        return parts._replace(server_optimizer=0.1)

    def faster(parts, experiment):
        return parts._replace(server_optimizer=0.3)

    def rows(**changed):
        rows_in_use = {
            "model": choices.MODELS["mlp"],
            "algorithm": choices.ALGORITHMS["fedavg"],
            "client_optimizer": choices.CLIENT_OPTIMIZERS["sgd"],
            "aggregator": choices.AGGREGATORS["mean"],
        }
        return provenance.hash_rows(rows_in_use | changed)

    usual = rows()
    experiment = fl.build_experiment(configure(dataset="digits", model="mlp"))
    assert usual.items() <= experiment.choice_hashes.items()
    assert rows(algorithm=slower) != rows(algorithm=faster) != usual
    assert {field for field, value in rows(algorithm=slower).items() if usual[field] != value} == {
        "algorithm"
    }
    assert rows(client_optimizer=lambda learning_rate, options: None) != usual
    assert (
        rows(model=lambda: layers.dense(3))
        == rows(model=lambda: layers.dense(3))
        != rows(model=lambda: layers.dense(4))
    )
    wide, narrow = (functools.partial(lambda cohort, width: width, width=width) for width in (1, 2))
    assert rows(aggregator=AggregatorChoice("", wide)) != rows(
        aggregator=AggregatorChoice("", narrow)
    )


def test_a_file_edited_after_loading_is_neither_program(monkeypatch):
    """As in a notebook that goes on, or loads it again: whatever it then runs, no earlier run is
    taken for it."""
    before = provenance.program()["files"]
    name = "variants/choices.py"
    edited = provenance.SOURCES[name].replace(
        b"client_lr: float = 0.2 ", b"client_lr: float = 0.3 "
    )
    now = {**provenance.SOURCES, name: edited}
    assert provenance.edited_notices() == [] and now[name] != provenance.SOURCES[name]
    monkeypatch.setattr(provenance, "read_sources", lambda: now)
    after = provenance.program()["files"]
    assert [file for file in before if before[file] != after[file]] == [name]
    assert after[name] != provenance.hash_source(now[name])
    assert f"{name} changed on disk after loading" in provenance.edited_notices()[0]
    monkeypatch.setattr(provenance, "read_sources", lambda: {**now, name: b"def ("})
    assert provenance.program()["files"][name] not in (before[name], after[name])


@pytest.fixture
def copy(tmp_path):
    """A copy of the project that may be edited, and what its script does with flags."""
    for name in ("federated_learning.py", "harness", "variants", "data"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)

    def call(flags):
        words = [sys.executable, "federated_learning.py", *flags.split()]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)

    return tmp_path, call


def accuracies(done):
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(fed\w+) +test accuracy ([\d.]+)%", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("where", ["table", pytest.param("file", marks=pytest.mark.thorough)])
def test_an_edited_program_gets_its_own_numbers(copy, monkeypatch, where):
    """Edited in the file, or in this process as in a notebook's cell."""
    folder, call = copy
    compared = f"{TINY} --rounds 1 --compare fedavg,fedprox --prox-mu 0.1"
    first = accuracies(call_script(folder, *compared.split()))  # the same program, in this process
    if where == "file":
        script = folder / "variants" / "models.py"
        script.write_text(
            script.read_text().replace("    return dense(128)", "    return dense(64, 64)")
        )
        edited = call(compared)
    replace_choice(monkeypatch, choices.MODELS, "mlp", lambda: layers.dense(64, 64))
    if where == "table":
        edited = call_script(folder, *compared.split())
    changed = {"file": "variants/models.py changed", "table": "model changed"}[where]
    assert edited.stdout.count(f"by another version of the program ({changed}): re-running it") == 2
    fresh = call_script(folder, *TINY.split(), "--rounds", "1", "--runs", "fresh").stdout
    (accuracy,) = re.findall(r"^final test accuracy ([\d.]+)%", fresh, re.MULTILINE)
    assert accuracies(edited)["fedavg"] == accuracy != first["fedavg"]
    assert accuracies(edited)["fedprox"] != first["fedprox"]


def test_a_folder_whose_name_begins_like_pythons_is_the_users_own(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/opt/py")
    assert provenance.is_known("/opt/py/lib/numpy.py")
    assert not provenance.is_known("/opt/pyproject/model.py")


@pytest.mark.thorough
def test_a_comment_makes_no_other_program(copy):
    folder, call = copy
    first = accuracies(call(f"{TINY} --compare fedavg,fedprox --prox-mu 0.1"))
    script = folder / "variants" / "models.py"
    script.write_text(script.read_text() + "\n# a notice\n")
    again = call(f"{TINY} --compare fedavg,fedprox --prox-mu 0.1")
    assert again.stdout.count("finished earlier, reused") == 2 and accuracies(again) == first


def test_a_run_does_not_go_on_by_an_edited_program_unless_told_to(copy):
    """The copy is edited and begins; this process, of the program as it was, goes on."""
    folder, call = copy
    path = folder / "variants" / "choices.py"
    path.write_text(path.read_text().replace("client_lr: float = 0.2 ", "client_lr: float = 0.02 "))
    assert call(f"{TINY} --name run").returncode == 0
    further = ("--resume", "runs/run", "--rounds", "4")
    refused = call_script(folder, *further)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert (
        "changed since that run (variants/choices.py); restore it, start a new run, or add"
        in refused.stderr
    )
    done = call_script(folder, *further, "--accept-changes")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(folder / "runs" / "run")
    made_by = [
        (one["from_round"], one["files"]["variants/choices.py"]) for one in metrics["programs"]
    ]
    assert [first for first, _ in made_by] == [1, 3] and made_by[0][1] != made_by[1][1]
    assert metrics["program_note"] == "program changed after round 2"


def test_what_program_json_must_hold(tmp_path):
    for content in ("[]", "{}", '{"programs": []}', '{"programs": [{"files": 3}]}'):
        (tmp_path / "program.json").write_text(content)
        with pytest.raises(UserError):
            provenance.read_programs(tmp_path)
