"""The notebook runs top to bottom, gives the script's numbers, defines nothing, and leaves no
worker behind.

Jupyter is imported where it is used: it takes three seconds, and each process of pytest-xdist reads
this file.
"""

import ast
import inspect
import re
import time

import federated_learning as fl
from harness.reporting import notebook as notebook_help

import pytest
from runs import NO_FIGURES, ROOT, call_script, find_worker, gone, read_csv

SMALL = {"dataset": "digits", "model": "mlp", "num_clients": 4, "rounds": 3}
ABSENT = ("epsilon", "measured_bytes_down", "measured_bytes_up", "clip_norm", "simulated_seconds")


@pytest.fixture
def notebook():
    import nbformat

    return nbformat.read(ROOT / "federated_mnist.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_it_gives_the_scripts_numbers(notebook, tmp_path, whole):
    """`make test` executes the run's cells, `make thorough` those of the story too."""
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    flags = [
        word
        for name, value in SMALL.items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]
    main = " ".join([*flags, "--cache", str(tmp_path)])
    story = f"--dataset digits --model mlp --runs {tmp_path} --cache {tmp_path}"
    parameters.source = f"main = {main!r}; story = {story!r}"
    if not whole:
        titles = [cell.source.partition("\n")[0] for cell in notebook.cells]
        (story_begins,) = [n for n, title in enumerate(titles) if "federation worth" in title]
        del notebook.cells[story_begins:]
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    notebook.cells.append(new_code_cell("[record.figures() for record in records]"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    history = ast.literal_eval(notebook.cells[-1].outputs[0]["data"]["text/plain"])

    assert call_script(tmp_path, *flags, *NO_FIGURES, "--name", "run").returncode == 0
    run = tmp_path / "runs" / "run"
    rows = read_csv(run / "metrics.csv")
    assert len(rows) == len(history) == 3
    for row, record in zip(rows, history, strict=True):
        # of dp, several hosts, adaptive norms and the clock
        for name in ABSENT:
            assert row.pop(name) == "" and record[name] is None
        for name in row.keys() - {"seconds"}:
            assert float(row[name]) == record[name]

    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    lines = [out["text"] for out in outputs if out.get("name") == "stdout"]
    assert len(pictures) == (6 + 6 if whole else 6)  # of the run, and of the story
    assert sum(text.count("train loss") for text in lines) == 3
    assert sum(text.count("vs fedavg") for text in lines) == (2 if whole else 0)


def test_it_is_committed_with_its_outputs_from_real_mnist(notebook):
    cells = code_cells(notebook)
    assert all(cell.execution_count for cell in cells)
    assert not any(
        out.output_type == "error" or out.get("name") == "stderr"
        for cell in cells
        for out in cell.outputs
    )
    text = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    assert text.count("train loss") == fl.Config().training.rounds and text.count("vs fedavg") == 2


def test_its_outputs_show_todays_code_and_texts(notebook):
    """What it shows of the script; intervals, which a comparison prints since version 1.2."""
    shown = {
        re.search(r"getsource\(fl\.(\w+)\)", cell.source)[1]: cell.outputs[0]["data"]["text/plain"]
        for cell in code_cells(notebook)
        if "getsource" in cell.source
    }
    assert len(shown) == 2
    for name, source in shown.items():
        assert source.strip() == inspect.getsource(getattr(fl, name)).strip()
    text = "".join(out.get("text", "") for cell in code_cells(notebook) for out in cell.outputs)
    assert text.count("95 % CI") == text.count(" vs ")


def test_it_imports_the_script_and_defines_nothing(notebook):
    for cell in code_cells(notebook):
        tree = ast.parse(re.sub("^%.*", "", cell.source, flags=re.MULTILINE))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda), cell.source
            if isinstance(node, ast.Import):
                assert node.names[0].name in ("federated_learning", "inspect")


def test_a_bar_counts_the_rounds_and_what_is_printed_is_kept(capsys):
    with notebook_help.quietly(3, "rounds") as said:
        print("round 1/2   test loss 1\nround 2/2   test loss 0.5\n\nfedavg  90 %\nfedprox  91 %\n")
        print("wrote all")
    assert said.bar.n == 2 and said.closing_lines == "fedavg  90 %\nfedprox  91 %"
    told = capsys.readouterr()
    assert told.out == "" and "2/3" in told.err


def test_a_kernels_restart_leaves_no_worker(tmp_path):
    from jupyter_client.manager import KernelManager

    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(tmp_path))
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute(
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import time\n"
            "from harness.engine.worker import LocalWorker\n"
            "with LocalWorker(1): time.sleep(1000)"
        )
        pid = kernel.provisioner.pid
        worker = None
        deadline = time.monotonic() + 60
        while worker is None and time.monotonic() < deadline:
            worker = find_worker(pid)
            time.sleep(0.05)
        assert worker is not None
        kernel.restart_kernel(now=True)
        assert gone(worker, 3)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
