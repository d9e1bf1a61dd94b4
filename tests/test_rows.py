"""Rows of a comparison: settings of their own, grids, files, configurations, finished runs."""

import json

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing import comparison, run_folders
from harness.comparing.sweep import Row, compared_rows, overlaid_folders, rows_of_configs

import pytest
from runs import NO_FIGURES, ON_DIGITS, call_script, configure, read_csv

FLAGS = (*ON_DIGITS, "--rounds", "1", "--local-epochs", "1", *NO_FIGURES)


def rows_of(compare):
    """label -> changes of the rows, and the base."""
    compared = compared_rows(configure(compare=compare))
    return {row.label: row.changes for row in compared.rows}, compared.base


def test_a_row_has_settings_of_its_own():
    rows, base = rows_of("fedavg(client_lr=0.2),fedprox(client_lr=0.1,prox_mu=0.1),scaffold")
    assert rows == {
        "fedavg (client lr 0.2)": {"algorithm": "fedavg", "client_lr": 0.2},
        "fedprox (client lr 0.1, prox mu 0.1)": {
            "algorithm": "fedprox",
            "client_lr": 0.1,
            "prox_mu": 0.1,
        },
        "scaffold": {"algorithm": "scaffold"},
    }
    assert base == "fedavg (client lr 0.2)"
    rows, _ = rows_of("(alpha=0.1,client_lr=0.2),(algorithm=scaffold)")
    assert list(rows) == ["alpha 0.1, client lr 0.2", "scaffold"]
    rows, base = rows_of("fedprox(prox_mu=1),fedprox(prox_mu=0.1);alpha=0.1,1")
    assert len(rows) == 4
    assert base["fedprox (prox mu 0.1), alpha 1"] == "fedprox (prox mu 1), alpha 1"


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        ("fedavg(local_epochs=1),fedprox,fedavg", "fedavg"),
        ("fedprox,fedavg(client_lr=0.2)", "fedavg (client lr 0.2)"),
        ("fedprox,scaffold", "fedprox"),
    ],
)
def test_rows_are_held_against_that_of_the_default_choice(compared, expected):
    assert rows_of(compared)[1] == expected


def test_a_field_that_a_row_does_not_use_makes_no_second_row_of_it():
    rows, base = rows_of("fedavg,fedprox;prox_mu=0.001,0.1")
    assert list(rows) == ["fedavg", "fedprox, prox mu 0.001", "fedprox, prox mu 0.1"]
    assert base == "fedavg"
    # prox_mu's default, 0.01, is among the values: FedAvg is still one row
    rows, _ = rows_of("fedavg,fedprox;prox_mu=0.01,0.1")
    assert list(rows) == ["fedavg", "fedprox, prox mu 0.01", "fedprox, prox mu 0.1"]


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ("fedavg(client_lr=0.2", "unmatched parentheses"),
        ("scaffold(prox_mu=0.1),fedavg", "prox_mu=0.1 has no effect on this row"),
        ("prox_mu=0.1,1", "rows that do not differ, as prox_mu has no effect"),
        ("fedavg(x=1),fedprox", "'x' is not a field that a comparison can change"),
        ("fedavg(client_lr=0.1,client_lr=1)", "not a setting of a row"),
        ("fedavg(client_lr)", "not a setting of a row"),
        ("fedavg(client_lr=abc),fedprox", "not a number"),
        ("fedavg(algorithm=fedprox)", "gives algorithm twice in a row"),
        ("fedavg(alpha=1),fedprox;alpha=0.1,1", "names a field twice"),
        ("fedavg(rounds=3),fedprox", "'rounds' is not a field that a comparison can change"),
        ("(alpha=1),(alpha=1)", "has the same row twice"),
        ("(alpha=1),fedavg", "is not a choice of|does not name different choices"),
    ],
)
def test_a_row_that_cannot_be_is_refused(compare, said):
    with pytest.raises(UserError, match=said):
        configure(compare=compare)


def test_a_budget_of_epsilon_makes_another_run():
    """It ends a run earlier: the rows are different runs, and each has a name."""
    private = configure(aggregator="dp", num_clients=20, noise_multiplier=0.9)
    config = private.replace(compare="mean,dp,dp(epsilon_budget=30)")
    labels = [row.label for row in compared_rows(config).rows]
    assert labels == ["mean", "dp", "dp (epsilon budget 30)"]
    budgets = compared_rows(configure(aggregator="dp", compare="epsilon_budget=30,50"))
    assert len(budgets.rows) == 2


def test_a_row_of_a_file_may_name_a_function(tmp_path):
    file = tmp_path / "rows.toml"
    file.write_text('[[compare]]\nmodel = "net.py:build"\n[[compare]]\nmodel = "mlp"\n')
    compared = compared_rows(fl.parse(["--config", str(file)]))
    assert [row.changes for row in compared.rows] == [{"model": "net.py:build"}, {"model": "mlp"}]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"compare": "fedavg,fedprox"}, "compare='fedavg,fedprox' cannot be combined with a list"),
        ({"tune": "client_lr=0.1,0.2"}, "cannot be combined with a list of configurations"),
    ],
)
def test_a_row_that_is_a_configuration_compares_nothing_itself(more, said):
    with pytest.raises(UserError, match=said):
        fl.compare([configure(**more), configure(alpha=1.0)])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"baselines": True}, "baselines=True cannot be combined with a list of configurations"),
        ({"prox_mu": 0.5}, "two of the configurations make the same run; give each once"),
    ],
    ids=str,
)
def test_a_list_is_refused_for_what_a_comparison_is(more, said):
    """prox_mu has no effect on fedavg, so its row would be the first one again."""
    rows = [configure(), configure(algorithm="fedprox"), configure(**more)]
    with pytest.raises(UserError, match=said):
        fl.compare(rows)


@pytest.mark.parametrize(
    "more", [{"stop_after": 3}, {"save_every": 2}, {"seeds": 3}, {"target_accuracy": 0.9}]
)
def test_what_holds_for_all_rows_is_given_to_the_first(more):
    """Of a later one it would have no effect."""
    (field,) = more
    with pytest.raises(UserError, match=f"{field}=.* rows differ; give it to the first"):
        fl.compare([configure(), configure(algorithm="fedprox", **more)])
    rows = [configure(**more), configure(algorithm="fedprox", name="other", **more)]
    assert len(rows_of_configs(rows).rows) == 2


def test_a_choice_that_is_also_a_folders_name_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fedavg").mkdir()
    assert [row.label for row in compared_rows(configure(compare="fedavg,scaffold")).rows] == [
        "fedavg",
        "scaffold",
    ]


@pytest.mark.parametrize("given", [["a", "b"], "ab", None, 3])
def test_what_is_no_configuration_is_not_compared(given):
    with pytest.raises(UserError, match="is not a configuration; give those of fl.parse"):
        fl.compare(given)


def test_rows_are_tables_of_a_file(tmp_path):
    file = tmp_path / "rows.toml"
    file.write_text(
        'rounds = 2\n[[compare]]\nalgorithm = "fedavg"\nclient_lr = 0.2\n'
        '[[compare]]\nalgorithm = "fedprox"\nprox_mu = 0.1\n'
    )
    config = fl.parse(["--config", str(file)])
    assert config.comparison.compare == "fedavg(client_lr=0.2),fedprox(prox_mu=0.1)"
    file.write_text("[[compare]]\nalpha = 0.1\n[[compare]]\nalpha = 1.0\nclient_lr = 0.2\n")
    compared = compared_rows(fl.parse(["--config", str(file)]))
    assert [row.label for row in compared.rows] == ["alpha 0.1", "alpha 1, client lr 0.2"]
    file.write_text("compare = [1, 2]\n")
    with pytest.raises(UserError, match=r"is not a row of settings; write tables such as \[\["):
        fl.parse(["--config", str(file)])


@pytest.mark.slow
def test_configurations_are_rows(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    config = fl.parse(FLAGS).replace(name="mine")
    rows = [config, config.replace(algorithm="fedprox", prox_mu=0.5)]
    folder = fl.compare(rows, dataset=digits)
    table = read_csv(folder / "summary.csv")
    assert [row["compared"] for row in table] == ["fedavg", "fedprox, prox mu 0.5"]
    assert {path.name for path in folder.glob("*seed0")} == {
        "fedavg-seed0",
        "fedprox-prox-mu0.5-seed0",
    }
    for wrong, said in [
        (rows[:1], "needs two or more configurations, not 1"),
        ([config, config], "the same run"),
        ([config, config.replace(seed=1)], "seed=0, 1 differs between"),
        ([config, config.replace(dataset="mnist")], "dataset='digits', 'mnist' differs between"),
    ]:
        with pytest.raises(UserError, match=said):
            fl.compare(wrong)


@pytest.mark.slow
def test_runs_are_in_the_comparisons_folder_and_found_by_patterns(tmp_path):
    flags = (*FLAGS, "--compare", "fedavg,fedprox", "--name", "mine", "--seeds", "2")
    done = call_script(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    runs = ["fedavg-seed0", "fedavg-seed1", "fedprox-seed0", "fedprox-seed1"]
    assert sorted(path.name for path in tmp_path.glob("runs/mine/*-seed?")) == runs
    own = tmp_path / "runs" / "mine"
    for text, number in [
        (own, 4),
        (own / "fedavg*", 2),
        (f"{own}/*seed1", 2),
        (own.parent / "*", 4),
    ]:
        assert len(overlaid_folders(str(text))) == number, text
    assert overlaid_folders(f"fedavg(model={own}/net.py:build)") == []
    with pytest.raises(UserError, match=r"nothing\*' contains no run"):
        overlaid_folders(f"{own}/nothing*")
    again = call_script(tmp_path, *FLAGS, "--compare", str(own), "--name", "again")
    assert again.returncode == 0, again.stderr
    summary = (own / "summary.csv").read_text()
    assert (tmp_path / "runs" / "again" / "summary.csv").read_text() == summary
    (own / runs[0] / "partition.json").write_text(
        json.dumps({"dataset_sha256": "0", "dataset": "another"})
    )
    refused = call_script(tmp_path, "--compare", str(own))
    assert refused.returncode == 2 and "compare runs on the same data" in refused.stderr


def test_folders_of_rows_have_short_names_of_their_own():
    labels = ["fedavg, alpha 0.1", "a" * 100, "a" * 99 + "b", "x/y.py:f", "x-y.py-f", "…"]
    names = run_folders.folder_names([Row(label, {}) for label in labels])
    assert names[0] == "fedavg-alpha0.1"
    assert len(set(names)) == len(names) and max(map(len, names)) <= 60 - len("-seed2147483647")


@pytest.mark.slow
def test_a_stopped_comparison_has_a_table_of_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []

    def run_twice(config, resume_hint):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config)
        return fl.run(config, resume_hint=resume_hint)

    config = fl.parse([*FLAGS, "--compare", "fedavg,fedprox,fedavgm", "--name", "mine"])
    with pytest.raises(KeyboardInterrupt):
        comparison.compare(config, compared_rows(config), fl.build_experiment, run_twice)
    folder = tmp_path / "runs" / "mine"
    table = read_csv(folder / "summary.csv")
    assert [row["compared"] for row in table] == ["fedavg", "fedprox"]
    assert "partial: 2 of 3 runs" in (folder / "summary.tex").read_text()
    fl.main(fl.parse("--list --json"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["state"] == "unfinished"
    fl.compare(config)
    assert "partial" not in (folder / "summary.tex").read_text()
    assert len(read_csv(folder / "summary.csv")) == 3


@pytest.mark.parametrize(
    "flags",
    [
        "--compare num_clients=20,30 --clients-per-round 15",
        "--compare bandwidth=1e6,1e7 --algorithm fedbuff",
    ],
)
def test_a_comparison_is_checked_row_by_row(flags):
    """No row has the default that the values replace."""
    assert len(compared_rows(fl.parse(flags)).rows) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"compare": "num_clients=10,30", "clients_per_round": 15}, "exceeds num_clients=10"),
        ({"compare": "bandwidth=0,1e7", "algorithm": "fedbuff"}, "needs a clock"),
        ({"compare": "alpha=0.1,1", "noise_multiplier": 1.0}, "would not be private"),
        ({"compare": "fedavg,fedprox", "baselines": True}, "cannot be combined with compare"),
        ({"seeds": 2, "baselines": True}, "cannot be combined with compare or seeds"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_run_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        configure(**fields)
