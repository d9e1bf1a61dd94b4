"""The global model on each client: on its label mix, and on images that it holds out."""

import json

import federated_learning as fl
from harness.cli.fields import UserError
from harness.reporting import clients
from harness.training import client_accuracies
from variants.partitions import draw_tests

import numpy as np
import pytest
from runs import NO_FIGURES, ON_DIGITS, call_script, configure, read_csv, read_metrics

FLAGS = (*ON_DIGITS, "--rounds", "2", "--local-epochs", "1", *NO_FIGURES)


def rows_of(folder):
    """clients.csv of a run, with numbers."""
    rows = read_csv(folder / "clients.csv")
    return [{name: float(text or "nan") for name, text in row.items()} for row in rows]


def test_gini_and_worst_tenth_by_hand():
    assert client_accuracies.gini(np.array([1.0, 1.0, 1.0])) == 0
    # sum of |x - y| over all ordered pairs is 4, over 2 * n^2 * mean = 2 * 4 * 2 = 16
    assert client_accuracies.gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert client_accuracies.gini(np.zeros(3)) == 0
    accuracies = np.array([0.9, np.nan, *[1.0] * 18, 0.5])  # 20 measured: the worst two
    assert client_accuracies.worst_tenth(accuracies) == pytest.approx(0.7)
    assert client_accuracies.worst_tenth(np.array([0.4, 0.8])) == pytest.approx(0.4)
    assert np.isnan(client_accuracies.worst_tenth(np.array([np.nan])))


def test_an_accuracy_of_0_counts():
    rows = [{"label_mix_accuracy": value} for value in (0.0, 1.0, float("nan"))]
    assert clients.distributions(rows)["label_mix_accuracy"].tolist() == [0, 1]
    texts = [{"label_mix_accuracy": text} for text in ("0.0", "1.0", "", "nan")]
    assert clients.distributions(texts)["label_mix_accuracy"].tolist() == [0, 1]
    assert clients.summarize_clients(rows)["label_mix_accuracy"]["mean"] == 0.5


def test_accuracy_on_a_label_mix_by_hand():
    """Recall is 1/2 for label 0 and 1 for label 1; label 2 has no test image."""
    counts = np.array([[1, 3, 0], [5, 0, 7], [0, 0, 2]])
    found = client_accuracies.accuracies_on_label_mix(
        np.array([1, 2, 0]), np.array([2, 2, 0]), counts
    )
    assert found[:2] == pytest.approx([0.25 * 0.5 + 0.75 * 1, 0.5]) and np.isnan(found[2])


def test_each_client_holds_out_its_share(digits):
    config = configure(client_test=0.25, num_clients=20)
    partition = fl.make_partition(digits, config)
    whole = fl.make_partition(digits, configure(num_clients=20))
    for own, tests, all_of_it in zip(
        partition.indices, partition.test_indices, whole.indices, strict=True
    ):
        assert np.array_equal(np.union1d(own, tests), all_of_it)
        assert not np.intersect1d(own, tests).size
        assert len(tests) == min(round(0.25 * len(all_of_it)), len(all_of_it) - 1)
    assert partition.digest != whole.digest
    # A client's draw does not depend on the others.
    (again,) = draw_tests([whole.indices[0]], 0.25, config.seed)
    assert np.array_equal(again, partition.test_indices[0])


def test_a_client_keeps_an_image_to_train_on():
    parts = [np.array([7]), np.array([1, 2])]
    assert [len(part) for part in draw_tests(parts, 0.9, 0)] == [0, 1]
    with pytest.raises(UserError, match=r"client_test=0.1 holds out no image"):
        draw_tests(parts, 0.1, 0)


def test_the_files_say_how_each_client_does(tmp_path):
    """The same arithmetic from the outside: the saved model, and the split in partition.json."""
    call_script(tmp_path, *FLAGS, "--client-test", "0.3", "--alpha", "0.2", "--name", "a")
    folder = tmp_path / "runs" / "a"
    rows = rows_of(folder)
    run = fl.load(folder)
    split = json.loads((folder / "partition.json").read_text())
    model = run.model()
    images, labels = run.dataset.train
    for row, tests in zip(rows, split["test_indices"], strict=True):
        assert row["test_images"] == len(tests)
        predicted = np.argmax(model(images[tests].astype(np.float32)), axis=1)
        assert row["own_test_accuracy"] == pytest.approx(np.mean(predicted == labels[tests]))
    evaluation = run.evaluate()
    recalls = np.diag(evaluation.confusion) / evaluation.confusion.sum(axis=1)
    for row, own in zip(rows, run.partition, strict=True):
        mix = np.bincount(labels[own], minlength=10)
        assert row["images"] == len(own)
        assert row["label_mix_accuracy"] == pytest.approx(mix @ recalls / mix.sum())
    metrics = read_metrics(folder)
    own = np.array([row["own_test_accuracy"] for row in rows])
    last = metrics["rounds"][-1]
    assert last["client_accuracy"] == pytest.approx(own.mean())
    assert last["client_worst10"] == pytest.approx(own.min())  # of ten clients, one
    summary = metrics["client_accuracy"]["own_test_accuracy"]
    assert summary["mean"] == pytest.approx(own.mean()) and summary["gini"] > 0
    # What a client measures while it trains is called so.
    report = last["clients"][0]
    assert {"train_accuracy", "train_loss"} <= report.keys() and "accuracy" not in report
    assert run.records[-1].clients[0]["accuracy"] == report["train_accuracy"]


def test_a_run_with_held_out_images_resumes_and_can_be_split_again(tmp_path):
    flags = (*FLAGS, "--client-test", "0.3")
    call_script(tmp_path, *flags, "--name", "a", "--rounds", "3")
    call_script(tmp_path, *flags, "--name", "b")
    done = call_script(tmp_path, "--resume", "runs/b", "--rounds", "3", *NO_FIGURES)
    assert done.returncode == 0, done.stderr
    whole = read_metrics(tmp_path / "runs/a")
    resumed = read_metrics(tmp_path / "runs/b")
    assert whole["weights_sha256"] == resumed["weights_sha256"]
    # The split of a file is held out alike.
    split = ("--partition-file", "runs/a/partition.json")
    done = call_script(tmp_path, *flags, *split, "--name", "c", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    of_file = read_metrics(tmp_path / "runs/c")
    assert of_file["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize(
    "flags",
    [
        "--algorithm scaffold",
        "--algorithm fedadam --aggregator median",
        "--partition feature",
        "--unseen-clients 0.3",
        "--sampling poisson --clients-per-round 4",
        "--baselines",
    ],
)
def test_held_out_images_with_other_variants(tmp_path, flags):
    done = call_script(
        tmp_path,
        *FLAGS,
        "--client-test",
        "0.2",
        "--num-clients",
        "4",
        *flags.split(),
        "--name",
        "a",
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / "a")
    assert len(rows) == 4 and all(0 <= row["own_test_accuracy"] <= 1 for row in rows)
    if "baselines" in flags:
        assert all(
            row["global_accuracy"] == pytest.approx(row["label_mix_accuracy"]) for row in rows
        )


def test_a_private_run_says_nothing_about_single_clients(tmp_path):
    with pytest.raises(UserError, match=r"client_test=0.2 cannot be combined with aggregator='dp'"):
        fl.parse("--aggregator dp --client-test 0.2")
    call_script(tmp_path, *FLAGS, "--aggregator", "dp", "--public-cohorts", "--name", "a")
    folder = tmp_path / "runs" / "a"
    assert not (folder / "clients.csv").exists()
    assert "client_accuracy" not in read_metrics(folder)
