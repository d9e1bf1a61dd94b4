"""The house keeps its order: three rooms, imports one way, a script that is read in a sitting,
tables as told."""

import ast
import statistics

import federated_learning as fl
from harness.fields import Theme, UserError, hints
from variants.adversity import ATTACKS
from variants.options import USES
from variants.presets import ROWS as PRESETS

import pytest
from runs import ROOT, SCRIPT, configure

ROOMS = {name: sorted((ROOT / name).glob("*.py")) for name in ("harness", "variants")}
TREE = ast.parse(SCRIPT.read_text())


def imported(path):
    """The names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    """tests, benchmarks, notebook -> script -> variants -> harness."""
    for room, paths in ROOMS.items():
        for path in paths:
            names = set(imported(path))
            assert "federated_learning" not in names, path
            assert room == "variants" or not any(
                name.partition(".")[0] == "variants" for name in names
            ), path
    assert not any(name.partition(".")[0] in ("tests", "benchmarks") for name in imported(SCRIPT))


def test_the_script_is_read_in_one_sitting():
    functions = [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(functions) <= 75 and statistics.median(functions) <= 10
    assert sum(isinstance(node, ast.Lambda) for node in ast.walk(TREE)) <= 12
    for word in ("LazyLoader", "getsource", "object.__setattr__", "fmt: skip", "noqa"):
        assert word not in SCRIPT.read_text(), word


def test_the_round_stands_in_one_place():
    """Local training, the client, the group, the process, the loop: one after the other, nothing
    between them."""
    names = [node.name for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = names.index("build_local_training")
    chain = ["build_local_training", "build_client", "build_group", "build_process", "run_rounds"]
    assert names[first : first + 5] == chain


def test_each_line_of_the_pseudo_code_is_named_beside_its_code():
    body = SCRIPT.read_text().partition('"""')[2].partition('"""')[2]
    for line in range(1, 7):
        assert f"line {line}" in body.lower() or f"lines 4 to {line}" in body, line


def test_choices_are_the_tables_rows():
    config = fl.Config()
    tables = {
        "algorithm": fl.ALGORITHMS,
        "aggregator": fl.AGGREGATORS,
        "partition": fl.PARTITIONERS,
    }
    tables |= {
        "client_optimizer": fl.CLIENT_OPTIMIZERS,
        "model": fl.MODELS,
        "dataset": fl.DATASETS,
        "attack": ATTACKS,
    }
    tables |= {"preset": {"none", *PRESETS}}
    for field, table in tables.items():
        assert set(config.choices(field)) == set(table), field


def test_field_names_are_unique_over_all_themes():
    names = [field for hint in hints(fl.Config).values() if is_theme(hint) for field in hints(hint)]
    assert len(set(names)) == len(names) == len(fl.Config().flat()) - 2  # and seed and preset


def test_the_table_of_uses_is_what_the_rows_say():
    """Who uses a field: options.USES, which needs no TensorFlow, against the flags of the rows
    themselves."""
    tables = {
        "partition": fl.PARTITIONERS,
        "algorithm": fl.ALGORITHMS,
        "aggregator": fl.AGGREGATORS,
    }
    for deciding, table in tables.items():
        users = {}
        for name, row in table.items():
            for field in {*row.flags, *getattr(row, "shift_flags", ())} - {"partition_file"}:
                users.setdefault(field, set()).add(name)
        told = {
            field: set(uses[0].values)
            for field, uses in USES.items()
            if uses[0].deciding == (deciding,)
        }
        assert users == {
            field: names for field, names in told.items() if field not in ("delta", *NOT_OF_A_ROW)
        }


NOT_OF_A_ROW = ("epsilon_budget", "public_cohorts")  # of the ledger, which every private row has


def is_theme(hint):
    return isinstance(hint, type) and issubclass(hint, Theme)


def test_but_replaces_fields_by_their_flat_names():
    config = configure(alpha=0.1, seed=3, rounds=7)
    assert (config.partitioning.alpha, config.seed, config.training.rounds) == (0.1, 3, 7)
    assert config.but(alpha=0.5, seed=0, rounds=5) == fl.Config()
    assert isinstance(configure(alpha=1).flat()["alpha"], float)  # 1 and 1.0 are one configuration
    with pytest.raises(
        UserError,
        match="'alpah' is no field of the configuration; choose from seed, preset, dataset",
    ):
        configure(alpah=1)


def test_public_functions_say_what_they_do():
    for path in [SCRIPT, *ROOMS["harness"], *ROOMS["variants"]]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
