"""README and docs prove themselves: their commands parse, their flags are the script's, their
links lead somewhere, and the recipes of CONTRIBUTING.md are done to the letter."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import federated_learning as fl

import numpy as np
import pytest
from runs import ROOT, SECONDS, read_csv, read_metrics, run_script

README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "CONTRIBUTING.md").read_text()
MEASURED = (ROOT / "benchmarks" / "README.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS += sorted((ROOT / "docs").glob("*.md"))
GUIDE = "\n".join(path.read_text() for path in DOCS)
TEXTS = GUIDE + MEASURED + fl.__doc__ + (ROOT / "Dockerfile").read_text()


def commands(start):
    """The lines of README's code blocks and of the script's docstring that start so, without
    comments."""
    whole_lines = re.sub(r"\\\n *", "", TEXTS)
    found = re.findall(rf"^(?:#  )? *({start}.*)$", whole_lines, re.MULTILINE)
    return sorted({" ".join(shlex.split(line, comments=True)) for line in found})


@pytest.mark.parametrize("line", commands(r"python federated_learning\.py"))
def test_every_command_of_the_script_parses(line, tmp_path, monkeypatch):
    """Beside the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("rounds = 3\n")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    flags = shlex.split(line.split("|")[0].split(">")[0])[2:]
    if "--help" in flags or any(flag.startswith("--tyro") for flag in flags):
        with pytest.raises(SystemExit) as end:
            fl.parse(flags)
        assert not end.value.code
    elif not {"--resume", "--evaluate"} & set(flags):  # whose folder is not there
        assert isinstance(fl.parse(flags), fl.Config)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name
)
def test_benchmarks_use_what_the_script_has(path):
    for name in set(re.findall(r"\bfl\.([A-Za-z_]+)", path.read_text())):
        assert hasattr(fl, name), name


@pytest.mark.parametrize("line", commands("make "))
def test_every_make_target_exists(line):
    subprocess.run(
        ["make", "--dry-run", *shlex.split(line)[1:]], cwd=ROOT, check=True, capture_output=True
    )


@pytest.mark.parametrize("line", commands("python benchmarks/"))
def test_every_benchmark_exists(line):
    assert (ROOT / shlex.split(line)[1]).is_file()


def test_every_named_flag_exists():
    named = set(re.findall(r"`--([a-z][a-z-]*)", GUIDE))
    flags = {field.replace("_", "-") for field in fl.Config().to_dict()}
    assert named - flags <= {
        "epochs",  # an example of an unknown one
        "help",
        "help-all",
        "install",
        "no-caption",
        "no-deps",
        "tyro-print-completion",
    }


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    def tables_of(text):
        """Without the notes on the program, as any change of it makes a table stale."""
        return re.sub(r"\n\n(† )?\*Made by .*\*| †", "", text)

    found = readme.tables()
    for path in readme.PAGES:
        filled = readme.fill(path.read_text(), found)
        assert tables_of(filled) == tables_of(path.read_text())  # else: python benchmarks/readme.py


def test_what_another_program_or_machine_made_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    ours = {"machine": "a", "commit": "1", "program": results.identity()}
    assert results.faults({"rows": [ours, {"runs": [ours]}]}) == []
    assert results.faults([ours | {"program": "0"}]) == ["another version of the program"]
    assert results.faults([ours | {"commit": "1-dirty"}]) == ["uncommitted changes"]
    assert results.faults({"rows": [ours, ours | {"machine": "b"}]}) == ["several machines"]
    assert results.current([ours, ours | {"program": "0"}]) == [ours]
    assert results.dagger([ours, ours | {"machine": "b"}]) == ""
    assert results.dagger({"runs": [ours, ours | {"program": "0"}]}) == " †"
    earlier = ours | {"program": "0"}
    monkeypatch.setattr(results, "EQUIVALENT", {results.identity(): {"0": "a cure"}})
    assert results.faults([earlier]) == [] and results.current([earlier]) == [earlier]
    monkeypatch.setattr(results, "EQUIVALENT", {"1": {"0": "a cure"}})  # of another program
    assert results.faults([earlier]) == ["another version of the program"]


def test_what_a_program_refuses_makes_no_results_stale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from results import computing

    plain = "def double(x):\n    return 2 * int(x)\nprint(double(1))\n"
    refusing = """
from checks import check_size

def check_sign(x):
    if x < 0:
        raise ValueError("negative")

def double(x):
    check_sign(x)
    if x > 10**6:
        raise ValueError(f"{x} is large")
    try:
        return 2 * int(x)
    except OverflowError:
        raise ValueError("no number") from None

print(double(1))
"""
    assert computing(refusing) == computing(plain)
    assert computing(refusing.replace("2 *", "3 *")) != computing(plain)
    handled = refusing.replace('raise ValueError("no number") from None', "return 0")
    assert computing(handled) != computing(plain)
    stopping = "if x:\n    raise StopRun\ny = 1\n"  # this is not an error
    assert computing(stopping) != computing("y = 1\n")
    branching = "if x:\n    raise ValueError('x')\nelse:\n    y = 1\n"
    assert computing(branching) == computing("y = 1\n") != computing("")
    warning = "def odd_notices(x) -> list[str]:\n    return [f'{x} is odd']\n"
    assert computing(f"{warning}y = 1\n") == computing("y = 1\n")
    assert computing(warning.replace("list[str]", "int")) != computing("")


def test_results_on_other_data_are_kept_apart(tmp_path, monkeypatch):
    """By their content: two files of one name are two data sets, and an edited one is another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    def of_data(path):
        monkeypatch.setattr(sys, "argv", ["skew.py", "--data", str(path)])
        results.parse(results.arguments("", takes_data=True))
        assert os.environ["FL_DATA"] == str(path)
        results.data_digest.cache_clear()
        return results.path_of("skew"), results.runs_of("tuning")

    monkeypatch.setenv("FL_DATA", "the user's own.npz")
    images = np.arange(40 * 784, dtype=np.uint8).reshape(40, 28, 28)
    arrays = {
        "x_train": images[:30],
        "y_train": np.arange(30) % 3,
        "x_test": images[30:],
        "y_test": np.arange(10) % 3,
    }
    first = tmp_path / "a" / "fashion.npz"
    second = tmp_path / "b" / "fashion.npz"
    for path in (first, second):
        path.parent.mkdir()
        np.savez(path, **arrays)
    assert of_data(first) == of_data(second)
    file, runs = of_data(first)
    assert file.parent.parent == results.RESULTS
    assert runs.name == f"{results.identity()}-{file.parent.name}"
    assert re.fullmatch("fashion-[0-9a-f]{8}", file.parent.name)
    arrays["x_train"][0] ^= 1
    np.savez(second, **arrays)
    assert of_data(second)[0] != file
    assert of_data(second)[1] != runs
    monkeypatch.setattr(sys, "argv", ["skew.py"])
    results.parse(results.arguments("", takes_data=True))
    assert results.path_of("skew") == results.RESULTS / "skew.json"


def test_a_kept_run_is_of_the_flags_that_are_asked_for(tmp_path, monkeypatch):
    """With an edited rate it is another run, and in another clone it is the same."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import niid_bench
    import once

    folder = once.folder_of("niid_bench", "iid-seed0", f"--data {ROOT}/x.npz --client-lr 0.1")
    assert folder == once.folder_of(
        "niid_bench", "iid-seed0", f"--data {once.ROOT}/x.npz --client-lr 0.1"
    )
    other = once.folder_of("niid_bench", "iid-seed0", f"--data {ROOT}/x.npz --client-lr 0.2")
    assert other != folder
    assert other.parent == folder.parent
    monkeypatch.setattr(once, "ROOT", tmp_path)
    moved = once.folder_of("niid_bench", "iid-seed0", f"--data {tmp_path}/x.npz --client-lr 0.1")
    assert moved.name == folder.name

    row = {
        "flags": "--partition iid --client-lr 0.1",
        "seed_of_split": 42,
        "machine": niid_bench.made_by()["machine"],
        "program": niid_bench.made_by()["program"],
        "commit": "1",
        "commits": ["1"],
    }
    three = {**row, "seeds": [0, 1, 2], "tests": [1, 2, 3], "best": [4, 5, 6]}
    one = {**row, "seeds": [1], "tests": [7], "best": [8], "commits": ["2"]}
    assert niid_bench.with_earlier(one, [three]) == {
        **row,
        "seeds": [0, 1, 2],
        "tests": [1, 7, 3],
        "best": [4, 8, 6],
        "commits": ["1", "2"],
    }
    for change in ({"flags": "--client-lr 0.2"}, {"seed_of_split": 0}, {"program": "another"}):
        assert niid_bench.with_earlier(one, [{**three, **change}]) == one


def test_results_are_of_the_flags_in_the_benchmarks(monkeypatch):
    """A rate that is edited leaves no table with results of the earlier one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import adversity
    import algorithms
    import compared
    import niid_bench
    import paper
    import tuning
    from results import read

    for row in read("niid_bench")["rows"]:
        flags = niid_bench.flags_of(row["split"], row["row"])
        assert fl.parse(row["flags"]) == fl.parse(flags), flags
        assert row["seed_of_split"] == niid_bench.FLOWERS_SEED
    for row in read("paper")["rows"]:
        assert {run["flags"] for run in row["runs"]} == {paper.CELLS[row["cell"]].flags}
    for row in read("adversity")["rows"]:
        assert (row["flags"], row["seeds"]) == (adversity.FLAGS, list(adversity.SEEDS))
    for row in read("algorithms")["results"]:
        assert row["flags"] == algorithms.BUDGETS[row["budget"]]
    for row in read("tuning")["rows"]:
        assert row["flags"] in [" ".join(flags.split()) for flags in tuning.TRIED[row["table"]]]
    for name, (flags, _) in compared.COMPARISONS.items():
        assert compared.quote(flags) in read("compared")[name]["command"]


def test_every_published_figure_has_its_source_and_setting(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published import published

    figures = published()
    # Flower twice, McMahan et al., FedLab, FLfedavgR, Reddi et al.
    assert len(figures) == 16 + 16 + 8 + 4 + 1 + 5
    for name, figure in figures.items():
        assert set(figure["source"]) == {"repository", "commit", "file", "place"}, name
        assert (
            all(len(value) > 1 for value in figure["source"].values())
            and len(figure["setting"]) > 20
        ), name


def test_reddis_presets_have_the_published_rates(monkeypatch):
    """Powers of ten, with three digits."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published import published

    for name in ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"):
        figure = published()[f"reddi {name}"]
        config = fl.parse(f"--preset reddi-{name}")
        assert config.training.client_lr == pytest.approx(10 ** figure["client_lr"], rel=1e-3)
        assert config.training.server_lr == pytest.approx(10 ** figure["server_lr"], rel=1e-2)
        epsilon = 10 ** figure["epsilon"] if figure["epsilon"] else None
        assert config.optimization.server_epsilon == epsilon


def test_figures_in_the_text_are_those_of_the_results():
    def read(name):
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

    said = " ".join((README + MEASURED).split())
    runs = [run for run in read("default_run")["runs"] if not run["flags"]]
    accuracy = np.mean([run["test_accuracy"] for run in runs])
    seconds = np.median([run["seconds"] for run in runs])
    assert (
        f"**{100 * accuracy:.1f} % after five rounds**, in {seconds:.0f} seconds on two cores"
        in said
    )
    most = read("scaling")["rows"][-1]
    clients = most["clients"]
    median = np.median(most["seconds"])
    each = f"{1000 * median / clients:.2f} ms a client"
    memory = f"{most['peak_mib']} MiB"
    assert (
        f"{clients:,} clients of six images each take {median:.1f} s a round, {each}, and {memory}"
        in said
    )
    assert round(read("startup")["first_round_starts_after_s"]) == 5
    assert "first round starts five seconds after the command" in said


def test_a_cheap_cell_of_the_results_again(tmp_path, monkeypatch):
    """The paper's first cell, seed 0: equal bits on the same machine, within 3 sd of the seeds on
    another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from results import machine

    result = json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text())
    (runs,) = (row["runs"] for row in result["rows"] if row["cell"] == "2nn-iid")
    done = run_script(tmp_path, "--preset", "mcmahan-2nn-iid", "--seed", "0", "--name", "run")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "runs" / "run")
    spread = 3 * np.std([run["rounds"] for run in runs], ddof=1)
    assert abs(metrics["rounds_to_target"] - np.mean([run["rounds"] for run in runs])) <= max(
        spread, 1
    )
    if runs[0]["machine"] == machine():
        assert metrics["weights_sha256"] == runs[0]["sha256"]


@pytest.mark.thorough
@pytest.mark.slow
def test_cheap_cells_of_two_more_tables_again(tmp_path, monkeypatch):
    """FedAvg's best after five rounds, and the mean without attackers; equal, or within 3 sd, as
    above."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import adversity
    import algorithms
    from results import machine, read

    budgets = read("algorithms")["results"]
    (result,) = (result for result in budgets if result["budget"] == "mlp-5")
    (own,) = (row for row in result["rows"] if row["algorithm"] == "fedavg")
    cells = read("adversity")["rows"]
    (cell,) = (
        row
        for row in cells
        if (row["partition"], row["byzantine"], row["aggregator"]) == ("dirichlet", 0, "mean")
    )
    for module in (adversity, algorithms):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(algorithms, "runs_of", lambda _: tmp_path / "runs")
    for again, earlier, where in (
        (
            algorithms.accuracy("mlp-5", "fedavg", own["rates"], 1, 0),
            own["tests"],
            result["machine"],
        ),
        (
            adversity.outcome("dirichlet", "mean", 0, "none", 0)[0],
            cell["accuracies"],
            cell["machine"],
        ),
    ):
        # another processor's last bits
        assert abs(again - np.mean(earlier)) <= max(3 * np.std(earlier, ddof=1), 0.3)
        assert where != machine() or again == pytest.approx(earlier[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "num_blocks"),
    [
        (("README.md",), 1),
        pytest.param(("README.md", "docs/python.md"), 7, marks=pytest.mark.thorough),
    ],
)
def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, digits, pages, num_blocks):
    """The blocks of the pages, one after the other, but for trackers."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join((ROOT / page).read_text() for page in pages)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"x_train": digits.train.images, "y_train": digits.train.labels}
    scope |= {"x_test": digits.test.images, "y_test": digits.test.labels}
    tried = [block for block in blocks if "mlflow" not in block]
    for block in tried:
        exec(block, scope)
    assert len(tried) == num_blocks and scope["record"].test_accuracy > 0.5
    assert all(path.joinpath("report.html").exists() for path in (tmp_path / "runs").iterdir())


def anchors(text):
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*DOCS, ROOT / "benchmarks" / "README.md"], ids=lambda path: path.stem
)
def test_every_link_leads_somewhere(page):
    for path, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]*))?\)", page.read_text()):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), (path, anchor)


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


ERRANDS = {
    "partition": "--partition parity",
    "algorithm": "--algorithm clipsgd",
    "aggregator": "--aggregator power-mean --mean-power 0.5",
    "model": "--model deep",
    "figure": "",
    "metric": "",
    "series": "",
    "flag": "--rate-by-size 0.5",
}


@pytest.fixture(scope="module")
def changed_copy(tmp_path_factory):
    """A copy of the project in which the recipes are done to the letter."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for what in ERRANDS:
        errand = rf"^## An? {what}\b.*?```python\n(.*?)```"
        block = re.search(errand, RECIPES, re.DOTALL | re.MULTILINE)[1]
        for piece in re.split(r"^# (?=\w+[/.])", block, flags=re.MULTILINE)[1:]:
            head, _, code = piece.partition("\n")
            file, where = head.split(", ", 1)
            how, name = quoted(where) if where.endswith('"') else where.split(" ", 1)
            insert(folder / file, how, name, code)
    return folder


def quoted(where):
    """("after", line) of `after "line"`."""
    how, _, line = where.partition(' "')
    return how, line.removesuffix('"')


def insert(path, how, name, code):
    """Puts `code` where the recipe says."""
    text = path.read_text()
    if how == "before":
        place = re.search(rf"^(@.*\n)*(def |class )?{name}\b", text, re.MULTILINE).start()
        text = text[:place] + code + "\n\n" + text[place:]
    elif how == "in":  # as the first thing in its brackets
        opened = re.search(rf"^ *{name}\b.*= \w*[\[{{]$", text, re.MULTILINE)
        place = opened.end()
        text = text[:place] + "\n" + code.rstrip() + text[place:]
    else:
        assert text.count(f"{name}\n") == 1, (path, name)
        kept = f"{name}\n" if how == "after" else ""
        text = text.replace(f"{name}\n", kept + code)
    path.write_text(text)


RUN_AND_TEST = """
import sys
import federated_learning as fl
import pytest
fl.main(fl.parse(sys.argv[1]))
flags = "--dataset digits --model mlp --num-clients 2 --rate-by-size 0.5 --algorithm fednova"
with pytest.raises(fl.UserError, match="rate_by_size cannot be combined"):
    fl.build_experiment(fl.parse(flags))
sys.exit(pytest.main(sys.argv[2:]))
"""
NEW_ROWS = ["-k", "parity or clipsgd or deep", "-m", "not slow"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(["tests/test_house.py", "-k", "not default_run and not binds"], id="house"),
        pytest.param(NEW_ROWS, id="new rows", marks=pytest.mark.thorough),
    ],
)
def test_the_errands_of_change_it_are_done_by_what_stands_there(changed_copy, tests):
    """A run that uses them all, of six steps a client, and the copy's tests of the house or of its
    new rows."""
    run = changed_copy / "runs" / "run"
    series = changed_copy / "losses.csv"
    shutil.rmtree(run, ignore_errors=True)
    series.unlink(missing_ok=True)
    flags = ["--dataset digits --rounds 1 --num-clients 4", *ERRANDS.values()]
    flags += ["--name run --local-epochs 1 --batch-size 100"]
    words = [sys.executable, "-c", RUN_AND_TEST, " ".join(flags), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*words, *tests], cwd=changed_copy, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stderr + done.stdout[-3000:]
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--quiet", "."]
    linted = subprocess.run(ruff, cwd=changed_copy, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
    assert "even and odd digits apart · clipsgd, rate by size to the power 0.5" in done.stdout
    assert "power-mean, mean power 0.5" in done.stdout
    assert (run / "client_sizes.png").stat().st_size > 10_000
    row = read_csv(run / "metrics.csv")[0]
    clients = read_metrics(run)["rounds"][0]["clients"]
    norms = [client["update_norm"] for client in clients]
    examples = [client["examples"] for client in clients]
    assert float(row["train_update_norm"]) == pytest.approx(np.average(norms, weights=examples))
    lines = [line.split(",") for line in series.read_text().splitlines()]
    assert [epoch for epoch, _ in lines] == ["0"] * int(clients[3]["steps"])
    assert all(0 < float(loss) < 1000 for _, loss in lines)  # of a batch of 100
