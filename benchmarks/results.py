# ruff: noqa: E402  the project has to be on the path
"""The files in results/: how they are read and written, and where results are from.

The machine, as the run saw it, and the program stand in every one.
"""

import argparse
import ast
import functools
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNUSED = ("variants/baselines.py", "variants/losses.py")
# A program, by its `identity` -> earlier ones that compute the same in every run of a table, and
# what has changed since, on which none of its numbers depends. A program that is not here has none.
EQUIVALENT = {
    "f60b807f27725cda": {
        "1fa56ae82230a135": "a round in which no update is finite; the memory of an algorithm "
        "under a robust aggregator; data without a test set; --evaluate with FL_DATA; owners as "
        "clients; a custom initializer; hosts and workers that are lost",
        "d036761f085aeae6": "fields of figures and tables that have no effect; what a private run "
        "refuses; the division of options, partitions and worker into modules; harness/config; "
        "statistics under FedNova; clients' models that diverge; the rate of baselines; data in "
        "pictures and tables; how soon a process is built; a shard's footer",
        "385527ef611382ff": "what Config() refuses",
        "2e06724788075d02": "what Grappler does to save memory; a notice; a user's own layers and "
        "modules; ReLU behind the pooling, by which convolutional networks compute the same in "
        "less time; whatever refuses or names a split; baselines with a time limit",
        "4d8d9ca76453208a": "which method says what fields a caption names",
        "95288918d55e3713": "the module of clients' accuracies",
        "392ba92fd6248cf3": "names; when a private run notes a round; a fall to chance; a clock's "
        "Poisson draws; lost clients of FedBuff, where none is at work",
        "b7abc74fa90de8a3": "data that are evaluated on; a worker's patience at its start",
        "b43649a6be7bc58c": "each draw of a custom split is checked; bytes of a norm beside a "
        "memory",
        "d67d8133001f5479": "where the name of digits is written",
    },
}
sys.path.insert(0, str(ROOT))
from harness.cli.fields import UserError
from harness.storage.provenance import SOURCES, commit, digest, meaning, processor, versions


class WithoutRefusals(ast.NodeTransformer):
    """Takes out of a syntax tree what only refuses or warns, as no number of a run depends on it.

    That is: functions named `check_` which return nothing, statements that call one, an `if` and an
    `except` that only raise, the text of what is raised, functions of notices, which return a list
    of texts, the line of a choice in --help, and imports that only these use.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func).endswith("Choice") and node.args:
            node.args[0] = ast.Constant("")
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        returns = any(isinstance(inner, ast.Return) and inner.value for inner in ast.walk(node))
        is_check = node.name.startswith("check_") and not returns
        annotation = ast.unparse(node.returns) if node.returns else ""
        warns = "notices" in node.name and annotation == "list[str]"
        return None if is_check or warns else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_call = isinstance(node.value, ast.Call)
        return None if is_call and "check_" in ast.unparse(node.value.func) else node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if only_raises(node.body) else node

    def visit_Try(self, node: ast.Try) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        others = node.orelse or node.finalbody
        refuses = all(only_raises(handler.body) for handler in node.handlers)
        return node.body if refuses and not others else node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        self.generic_visit(node)
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        for statement in node.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                names = [(name, name.asname or name.name) for name in statement.names]
                statement.names = [name for name, own in names if own.partition(".")[0] in used]
        node.body = [statement for statement in node.body if getattr(statement, "names", True)]
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise() if only_raises([node]) else node


def only_raises(body: list[ast.stmt]) -> bool:
    """Whether these statements do nothing but raise an error; StopRun and the like are none."""
    return all(isinstance(statement, ast.Raise) and is_error(statement.exc) for statement in body)


def is_error(raised: ast.expr | None) -> bool:
    """Whether what is raised is an error, by its name; None is the one that is handled."""
    is_call = isinstance(raised, ast.Call)
    return raised is None or (is_call and ast.unparse(raised.func).endswith("Error"))


def arguments(doc: str, takes_data: bool = False) -> argparse.ArgumentParser:
    """A parser of the flags of a benchmark; with --data its table can be made on other data."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if takes_data:
        parser.add_argument("--data", type=Path, help="other data than MNIST, as of --data")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags as given. Sets FL_DATA, by which the program reads other data, to --data."""
    options = parser.parse_args()
    data = getattr(options, "data", None)
    os.environ.pop("FL_DATA", None)  # the user's own is no part of a table
    if data:
        os.environ["FL_DATA"] = str(data.expanduser().absolute())
        try:
            data_folder()
        except UserError as error:
            parser.error(str(error))
    return options


def data_name() -> str:
    """The name of other data than MNIST, by their file or folder; "" for MNIST."""
    path = Path(os.environ.get("FL_DATA", ""))
    return path.name if path.is_dir() else path.stem


def data_folder() -> str:
    """The name of other data and a hash of their content, as two files may have one name; "" for
    MNIST.
    """
    name = data_name()
    return f"{name}-{data_digest(os.environ['FL_DATA'])}" if name else ""


@functools.cache
def data_digest(path: str) -> str:
    """Eight digits of the hash that the program gives the data in `path`."""
    import federated_learning as fl  # TensorFlow takes seconds, and most need none of it here

    return fl.load_dataset(fl.Config().replace(data=path).data).digest[:8]


def runs_of(table: str) -> Path:
    """The folder of a table's runs, by the version of the program and the data."""
    return ROOT / "runs" / table / "-".join(filter(None, [identity(), data_folder()]))


def path_of(name: str) -> Path:
    """The file of these results; those on other data are in a folder of their own."""
    return RESULTS / data_folder() / f"{name}.json"


def read(name: str) -> dict:
    """The results of this name; nothing where none are there yet."""
    path = path_of(name)
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, content: dict) -> None:
    """Write results: a file of JSON."""
    path_of(name).parent.mkdir(parents=True, exist_ok=True)
    path_of(name).write_text(json.dumps(content, indent=1) + "\n")


def machine() -> str:
    """What the seconds depend on, and the last bits of the weights: the processor, its vectors,
    cores and memory."""
    return f"{processor()}, {psutil.virtual_memory().total >> 30} GiB, Linux"


def made_by() -> dict[str, str | None]:
    """What a results file says of where it is from. `program` is `identity`."""
    return {"machine": machine(), "commit": commit(), "program": identity()}


def computing(source: bytes | str) -> list:
    """What a source computes, as nested lists: not its layout, what it refuses, or its notices."""
    return meaning(WithoutRefusals().visit(ast.parse(source)))


@functools.cache
def identity() -> str:
    """Hash of the program, by what its files mean, and of the packages that it computes with.

    A file that the runs of no table call is left out, as is what only refuses or warns.
    """
    files = {name: computing(SOURCES[name]) for name in SOURCES if name not in UNUSED}
    return digest({"files": files, "versions": versions()})


def is_current(origin: dict) -> bool:
    """Whether this program made something, or an equivalent one."""
    return origin.get("program") in (identity(), *EQUIVALENT.get(identity(), ()))


def current(rows: list[dict]) -> list[dict]:
    """Those rows that a benchmark need not make again."""
    return list(filter(is_current, rows))


def origins(content: object) -> Iterator[dict]:
    """The objects in a results file that say where they are from."""
    if isinstance(content, list):
        for item in content:
            yield from origins(item)
    elif isinstance(content, dict):
        if "machine" in content:
            yield content
        for item in content.values():
            yield from origins(item)


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The mean of float[seeds] ± the standard deviation, if there are several."""
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{sd}"


def faults(content: object) -> list[str]:
    """What is wrong with where a results file is from.

    It has to be this program or an equivalent one, without uncommitted changes, on one machine.
    """
    found = list(origins(content))
    checks = {
        "another version of the program": not all(map(is_current, found)),
        "uncommitted changes": any("-dirty" in (origin.get("commit") or "") for origin in found),
        "several machines": len({origin["machine"] for origin in found}) > 1,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def dagger(content: object) -> str:
    """The mark of a row, a cell or a figure that another version of the program made, or none."""
    return "" if set(faults(content)) <= {"several machines"} else " †"


def machines(rows: list[dict]) -> str:
    """What the rows were measured on, each machine once."""
    return "; ".join(sorted({row["machine"] for row in rows}))
