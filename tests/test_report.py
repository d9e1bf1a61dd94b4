"""report.html: one page that says what metrics.json says, with nothing from elsewhere."""

import html.parser
import json
import re
import shlex
from functools import partial

import federated_learning as fl
from harness.cli.run_options import identity
from harness.cli.saved_config import read_saved
from harness.reporting import report

import numpy as np
import pytest
from runs import configure, read_metrics

thorough = partial(pytest.param, marks=pytest.mark.thorough)
NAME = "<script>alert(1)</script> & co"


class Page(html.parser.HTMLParser):
    """The texts of a page's tables, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tables = []
        self.sources = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(dict(attrs).get("data-value"))
        elif tag == "img":
            self.sources.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two rounds, of three clients and data with a hostile name."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 6, 5)).astype(np.uint8)
    labels = np.arange(90) % 3
    dataset = fl.build_dataset(images[:60], labels[:60], images[60:], labels[60:], NAME)
    runs = tmp_path_factory.mktemp("runs")
    flags = {"num_clients": 3, "rounds": 2, "alpha": 0.3, "name": "it's", "public_cohorts": False}
    return fl.run(configure(model="logreg", **flags, runs=str(runs)), dataset=dataset)


def test_the_page_has_the_runs_figures_and_nothing_from_elsewhere(done):
    text = (done.folder / "report.html").read_text()
    page = Page(text)
    metrics = read_metrics(done.folder)
    partition = json.loads((done.folder / "partition.json").read_text())
    assert f"{metrics['test_accuracy']:.2%} test accuracy after 2 rounds" in page.texts
    assert len(page.sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "http" not in text.partition("<body>")[0].replace("http-equiv", "")
    assert NAME not in text and "&lt;script&gt;alert(1)" in text
    rounds, clients, *_ = page.tables
    assert [row[0] for row in rounds[1:]] == ["1", "2"]
    accuracies = [str(record["test_accuracy"]) for record in metrics["rounds"]]
    assert all(accuracy in row for accuracy, row in zip(accuracies, rounds[1:], strict=True))
    for row, counts in zip(clients[1:], partition["label_counts"], strict=True):
        assert row[1:3] == [str(sum(counts)), str(np.count_nonzero(counts))]


@pytest.mark.parametrize(
    "flags",
    [
        "--preset fast --batch-size 16",
        "--preset fedprox-mnist --stragglers 0",
        "--preset mcmahan-2nn-iid --rounds 3 --target-accuracy 0",
        "--aggregator dp --num-clients 100 --noise-multiplier 1.5",
    ],
)
def test_the_command_of_a_configuration_makes_it_again(flags):
    """A value that a preset has otherwise is in it, although it is the default."""
    config = fl.parse(flags)
    line = report.command_of(config, "python federated_learning.py")
    assert fl.parse(shlex.split(line)[2:]) == config


def test_the_command_of_a_target_epsilon_finds_the_noise_again():
    config = fl.parse("--aggregator dp --num-clients 100 --target-epsilon 8")
    found = config.replace(noise_multiplier=1.25)
    line = report.command_of(found, "python federated_learning.py")
    assert fl.parse(shlex.split(line)[2:]) == config


def test_its_command_makes_the_same_run(done):
    config = read_saved(str(done.folder), fl.Config())
    line = report.command_of(config, "python federated_learning.py")
    again = fl.parse(shlex.split(line)[2:])
    assert identity(again) == identity(config)
    assert again.run.name == "" and again.training.rounds == 2  # its name is taken


@pytest.mark.parametrize(
    ("fields", "go_on"),
    [
        ({}, "--rounds 6"),
        ({"target_accuracy": 0.1}, "--after-target continue"),
        ({"client_lr": 1e-7, "stop_after": 1}, "--stop-after 0"),
        ({"time_limit": "0.001"}, ""),
    ],
)
def test_its_command_continues_the_run(tmp_path, monkeypatch, fields, go_on):
    """Whatever ended it: all rounds, a target, no improvement, or the time limit."""
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "digits", "model": "logreg", "num_clients": 2, "local_epochs": 1}
    usual = {"client_lr": 1e-7 if "target_accuracy" not in fields else 0.05}
    end = fl.run(configure(**flags, rounds=3, figures="none", name="run", **usual | fields))
    page = Page((end.folder / "report.html").read_text())
    (line,) = (text for text in page.texts if "--resume" in text)
    assert line.endswith(f"--resume runs/run {go_on}".strip())
    words = shlex.split(line)
    more = fl.run(fl.parse(words[words.index("--resume") :]))
    assert len(more.records) > len(end.records)


def test_a_page_of_a_private_run_has_no_clients(tmp_path, digits):
    flags = {"aggregator": "dp", "num_clients": 20, "rounds": 1, "model": "logreg"}
    end = fl.run(configure(dataset="digits", **flags, runs=str(tmp_path), name="run"))
    text = (end.folder / "report.html").read_text()
    assert "<h2>Clients</h2>" not in text and "ε" in text and "seconds</th>" not in text
    page = Page(text)
    assert len(page.sources) == 4 and len(page.tables[0]) == 2


def test_figures_of_another_form_are_on_the_page_too(tmp_path):
    flags = {"dataset": "digits", "model": "logreg", "num_clients": 2, "rounds": 1}
    end = fl.run(configure(**flags, figures="pdf", runs=str(tmp_path), name="pdf"))
    page = Page((end.folder / "report.html").read_text())
    assert len(page.sources) == 6 and page.sources[0].startswith("data:image/png;base64,")
    assert (end.folder / "convergence_plot.pdf").exists()
    assert not (end.folder / "convergence_plot.png").exists()
    fl.run(fl.parse(f"--resume {end.folder} --rounds 2 --figures png"))  # what is outdated goes
    assert (end.folder / "convergence_plot.png").exists()
    assert not list(end.folder.glob("*.pdf"))
    fl.run(fl.parse(f"--resume {end.folder} --rounds 3 --figures none"))
    assert not list(end.folder.glob("*.png"))


@pytest.mark.parametrize(
    ("fields", "then", "flags"),
    [
        ({}, {"target_accuracy": 0.1}, "--target-accuracy 0.1 --after-target continue"),
        thorough({"client_lr": 1e-7}, {"stop_after": 1}, "--rounds 2"),
        thorough({"time_limit": "0.001", "stop_after": 2}, {}, "--stop-after 2"),
        thorough(
            {"time_limit": "0.001"}, {"rounds": 3, "time_limit": "", "target_accuracy": 0.1}, "0.1"
        ),
    ],
)
def test_its_command_ends_where_the_run_did(tmp_path, monkeypatch, fields, then, flags):
    """Though it was stopped, or resumed with a flag that would have ended it earlier."""
    monkeypatch.chdir(tmp_path)
    usual = configure(dataset="digits", model="logreg", num_clients=2, local_epochs=1, rounds=2)
    config = usual.replace(figures="none", name="run", **fields)
    end = fl.run(config)
    if then:
        end = fl.run(config.replace(resume="runs/run", **then))
    page = Page((end.folder / "report.html").read_text())
    (line,) = (text for text in page.texts if "--dataset" in text)
    assert flags in line
    again = fl.run(fl.parse(shlex.split(line)[2:]))
    made = [read_metrics(folder)["weights_sha256"] for folder in (end.folder, again.folder)]
    assert len(end.records) == len(again.records) and made[0] == made[1], line
