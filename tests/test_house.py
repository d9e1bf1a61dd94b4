"""The house keeps its order: rooms, imports one way, one statement one thing, tables as told."""

import ast
import cProfile
import re
import statistics
import tomllib
from pathlib import Path

import federated_learning as fl
from harness.cli.fields import ConfigGroup, UserError, hints
from harness.cli.loading import import_function
from variants import choices

import pytest
from runs import ROOT, SCRIPT, configure

ROOMS = {name: sorted((ROOT / name).rglob("*.py")) for name in ("harness", "variants")}
PROGRAM = [SCRIPT, *ROOMS["harness"], *ROOMS["variants"]]
OTHERS = [*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
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
    """tests, benchmarks -> script -> variants -> harness."""
    for room, paths in ROOMS.items():
        for path in paths:
            names = set(imported(path))
            assert "federated_learning" not in names, path
            assert room == "variants" or not any(n.partition(".")[0] == "variants" for n in names)
    assert not any(name.partition(".")[0] in ("tests", "benchmarks") for name in imported(SCRIPT))


@pytest.mark.parametrize("folder", ["cli", "engine", "reporting", "storage", "training"])
def test_a_single_run_imports_no_comparison(folder):
    for path in (ROOT / "harness" / folder).glob("*.py"):
        assert not any(name.startswith("harness.comparing") for name in imported(path)), path


def test_an_installation_has_every_folder_of_modules():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in PROGRAM if path != SCRIPT}
    assert sorted(setup["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    assert setup["py-modules"] == [SCRIPT.stem]


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in PROGRAM if path != SCRIPT}
    assert {name for name in modules if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    lengths = [
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(lengths, default=0) <= 75


def code_lines(function):
    """The lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    start = body[0].lineno if body else function.end_lineno
    return function.end_lineno - start + 1 + function.body[0].lineno - function.lineno


def test_the_scripts_functions_are_shorter():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert statistics.median(map(code_lines, functions)) <= 10
    assert sum(isinstance(node, ast.Lambda) for node in ast.walk(TREE)) <= 7
    for word in ("LazyLoader", "getsource", "object.__setattr__", "fmt: skip", "noqa"):
        assert word not in SCRIPT.read_text(), word


def unlike_assignments(tree):
    """The assignments of several things in one statement: `a, b = f(x), g(y)`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if any(isinstance(target, ast.Tuple) for target in node.targets):
            yield node.lineno


def test_unlike_assignments_are_found():
    assert list(unlike_assignments(ast.parse("a, b = f(x), g(y)"))) == [1]
    assert list(unlike_assignments(ast.parse("loss, accuracy = figure.axes\nc = 1, 2"))) == []


@pytest.mark.parametrize("path", [*PROGRAM, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_one_statement_binds_one_thing(path):
    assert list(unlike_assignments(ast.parse(path.read_text()))) == []


def test_the_round_stands_in_one_place():
    """From who trains to the loop over the rounds: one after the other, nothing else between."""
    names = [node.name for node in TREE.body if isinstance(node, ast.FunctionDef)]
    first = names.index("sample_clients")
    assert names[first : first + 11] == [
        "sample_clients",
        "make_chunks",
        "add_weighted",
        "average_updates",
        "build_steps",
        "fedavg_round",
        "train_cohort",
        "everyone",
        "only_global",
        "fedavg_parts",
        "build_process",
    ]


def test_each_line_of_the_pseudo_code_is_named_beside_its_code():
    body = SCRIPT.read_text().partition('"""')[2].partition('"""')[2]
    for line in range(1, 7):
        assert f"line {line}" in body.lower() or f"lines 4 to {line}" in body.lower(), line


def test_a_choice_stands_once_and_its_function_and_fields_are_there():
    """A choice without a function is FedAvg's own: one in each table, but for attacks."""
    for field, table in choices.TABLES.items():
        assert set(fl.Config().choices(field)) == set(table), field
        for name, chosen in table.items():
            assert set(chosen.fields) <= fl.Config.defaults().keys(), name
            values = chosen._asdict().values()
            functions = [value for value in values if re.fullmatch(r"[a-z]+:\w+", str(value))]
            assert all(callable(import_function(function)) for function in functions), name
    own = {
        field: [name for name, row in table.items() if not getattr(row, "function", "own")]
        for field, table in choices.TABLES.items()
    }
    defaults = fl.Config.defaults()
    names = {field: [defaults[field]] if field != "attack" else [] for field in choices.TABLES}
    names["client_schedule"] += ["warm-up"]  # within the round: see optimizers.warm_up
    assert own == names


def is_group(hint):
    return isinstance(hint, type) and issubclass(hint, ConfigGroup)


def test_field_names_are_unique_over_all_groups():
    names = [field for hint in hints(fl.Config).values() if is_group(hint) for field in hints(hint)]
    assert len(set(names)) == len(names) == len(fl.Config().to_dict()) - 2  # and seed and preset


def test_replace_finds_fields_by_their_names():
    config = configure(alpha=0.1, seed=3, rounds=7)
    assert (config.partitioning.alpha, config.seed, config.training.rounds) == (0.1, 3, 7)
    assert config.replace(alpha=0.5, seed=0, rounds=5) == fl.Config()
    assert isinstance(configure(alpha=1).to_dict()["alpha"], float)  # 1 and 1.0 are the same
    with pytest.raises(UserError, match="'alpah' is not a configuration field; choose alpha$"):
        configure(alpah=1)
    with pytest.raises(UserError, match=r"write Config\(\)\.replace\(rounds=\.\.\.\)$"):
        fl.Config(seed=2, training=fl.Training(), rounds=3)
    with pytest.raises(UserError, match="'alpah' is not a configuration field; choose alpha$"):
        fl.Config(alpah=1)


@pytest.mark.slow
def test_a_default_run_calls_no_function_of_the_variants(tmp_path, digits):
    """From its flags to its last file; digits, which make it a run of seconds, are not MNIST."""
    profile = cProfile.Profile(builtins=False)
    with profile:
        config = fl.parse("--rounds 1 --local-epochs 1").replace(
            runs=str(tmp_path), cache=str(tmp_path)
        )
        assert fl.load_dataset(config.data).is_mnist
        result = fl.run(config, dataset=digits)
    assert len(result.records) == 1
    codes = [entry.code for entry in profile.getstats() if not isinstance(entry.code, str)]
    assert any(code.co_filename == str(SCRIPT) for code in codes)
    called = [code for code in codes if Path(code.co_filename).parent == ROOT / "variants"]
    assert called == []
