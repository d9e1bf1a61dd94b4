"""Notices on settings that do less than they seem to."""

from types import SimpleNamespace

import federated_learning as fl
from harness.cli.command_line import EVALUATING
from harness.config import conditions
from harness.reporting.notices import find_weak_settings
from harness.storage.callbacks import PrintRounds

import numpy as np
import pytest
from runs import configure, make_record


def find(num_weights=20_001, **flags):
    """The notices of a run by four clients, the largest of which has 100 images."""
    partition = SimpleNamespace(sizes=np.array([10, 100, 20, 30]))
    config = configure(num_clients=4, **flags).effective()
    weights = (np.zeros(num_weights), np.zeros(10))
    return find_weak_settings(
        SimpleNamespace(config=config, partition=partition, initial_weights=weights)
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"aggregator": "trimmed-mean", "trim": 0.2}, "trim=0.2 of 4 clients leaves out none"),
        (
            {"aggregator": "compressed", "num_weights": 20_000},
            "sent as they are, and the model's largest has 20,000; choose a larger --model",
        ),
        ({"workers_cache": "x"}, "workers_cache='x' has no effect without --workers"),
        ({"stop_after": 4, "rounds": 5}, "stop_after=4 never stops the run, as it has 5 rounds"),
        ({"save_every": 6}, "save_every=6 saves no model, as the run has 5 rounds"),
        (
            {"fine_tune_epochs": 1, "client_test": 0.2, "client_schedule": "cosine"},
            "clients fine-tune at client_lr=0.15 in every round, without client_schedule='cosine'",
        ),
        (
            {"aggregator": "dp", "noise_multiplier": 0.1, "dropout": 0.5},
            "that do not report make its steps shorter",
        ),
        (
            {"aggregator": "secure", "algorithm": "scaffold"},
            "sends to the memory of algorithm='scaffold' reaches the server as it is",
        ),
        (
            {"device_speed": "constant", "speed_by_size": 0.5},
            "device_speed='constant' gives all clients the same speed",
        ),
        ({"sampling": "poisson"}, "sampling='poisson' draws all clients in each round; choose"),
        (  # 3 epochs of ceil(100 / 16) = 7 steps
            {"client_schedule": "warm-up", "warmup_steps": 42},
            "no client makes more than 21 local steps in a round, so the rate is at most 50 %",
        ),
    ],
)
def test_what_has_little_effect_is_told(flags, said):
    (notice,) = find(**flags)
    assert said in notice


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"aggregator": "trimmed-mean", "trim": 0.25},
        {"aggregator": "compressed"},
        {"save_every": 5},
        {"client_schedule": "warm-up", "warmup_steps": 21},
        {"client_schedule": "warm-up", "warmup_steps": 3, "batch_size": 0},
    ],
)
def test_what_has_an_effect_is_not(flags):
    assert find(**flags) == []


def test_rounds_with_too_few_reports_for_krum_are_told_once(capsys):
    """With one attacker tolerated it needs five; a round without reports changes nothing."""
    config = configure(aggregator="krum", tolerated=1)
    experiment = SimpleNamespace(config=config, dataset=SimpleNamespace(chance=0.1))
    callback = PrintRounds(experiment, [])
    for round_num, num_reports in enumerate((5, 0, 3, 4), 1):
        record = make_record(0.5, round_num, num_clients=num_reports)
        callback.after_round(SimpleNamespace(record=record))
    said = capsys.readouterr().err
    assert said.count("to withstand tolerated=1") == 1
    assert "round 3: 3 clients reported, but krum needs 5" in said


@pytest.mark.parametrize(
    ("flags", "field", "needed"),
    [
        ("--figures none --figure-font 8", "figure_font=8.0", "--figures png or pdf or svg"),
        ("--figures none --no-caption", "caption=False", "--figures png or pdf or svg"),
        ("--table-columns mean", "table_columns=mean", "--compare or --seeds or --tune"),
        ("--after-target continue", "after_target=continue", "--target-accuracy"),
        ("--warmup-steps 3", "warmup_steps=3", "--client-schedule warm-up"),
        ("--lr-decay 0.5", "lr_decay=0.5", "--client-schedule or --server-schedule exponential"),
    ],
)
def test_fields_of_files_and_figures_without_effect_are_told(flags, field, needed):
    assert fl.parse(flags).unused_notices() == [f"{field} has no effect without {needed}"]


@pytest.mark.parametrize(
    "flags",
    [
        "--compare fedavg,fedprox --table-columns mean",
        "--seeds 2 --figure-y accuracy",
        "--tune client_lr=0.1,0.2 --table-columns mean",
        "--target-accuracy 0.9 --after-target continue",
        "--figures svg --no-caption",
    ],
)
def test_fields_of_files_and_figures_with_an_effect_are_not(flags):
    assert fl.parse(flags).unused_notices() == []


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--sampling by-size --clients-per-round 3",
        "--seeds 3 --figure-y accuracy --target-accuracy 0.9 --after-target continue",
        "--algorithm scaffold --client-schedule cosine --figures none",
        "--aggregator median --byzantine 1 --partition file --partition-file a.json",
        "--algorithm fedsgd --latency 1 --deadline 2",
    ],
)
def test_the_values_in_use_get_no_notice(flags):
    config = fl.parse(flags)
    assert config.unused_notices() == config.effective().unused_notices() == []


@pytest.mark.parametrize(
    ("flags", "field", "needed"),
    [
        ("--prox-mu 0.001", "prox_mu=0.001", "--algorithm fedprox"),
        ("--figure-y error", "figure_y=error", "--compare or --seeds or --tune"),
        ("--after-target stop", "after_target=stop", "--target-accuracy"),
        ("--preset reddi-fedavg --lr-decay 0.99", "lr_decay=0.99", "--client-schedule or"),
    ],
)
def test_default_values_without_effect_are_told_where_a_command_line_gives_them(
    flags, field, needed, capsys
):
    fl.parse(flags)
    said = capsys.readouterr().err
    assert said.count("notice:") == 1
    assert said.startswith(f"notice: {field} has no effect without {needed}")


@pytest.mark.parametrize(
    "flags",
    [
        '--compare "fedavg,fedprox(client_lr=0.1)" --prox-mu 0.1',
        '--compare "(client_optimizer=momentum),(client_optimizer=sgd)" --client-momentum 0.5',
        '--compare "shards(num_clients=20),iid" --shards-per-client 3',
        "--compare byzantine=0,3 --attack scaled --attack-scale 5",
        "--compare stragglers=0,0.5 --drop-stragglers",
        "--compare bandwidth=1e6,1e7 --deadline 30",
        '--compare "mean,dp(clients_per_round=8)" --noise-multiplier 0.3',
        "--tune aggregator=mean,trimmed-mean --trim 0.2",
    ],
)
def test_what_a_row_of_a_comparison_uses_has_an_effect(flags):
    assert fl.parse(flags).unused_notices() == []


def test_a_split_of_a_file_reads_no_field():
    """It gets labels, a number and a generator, while an algorithm gets the configuration."""
    config = configure(partition="own.py:split", alpha=0.1)
    (notice,) = config.unused_notices()
    assert notice.startswith("alpha=0.1 has no effect without --partition")
    assert configure(algorithm="own.py:change", prox_mu=0.1).unused_notices() == []


def test_flags_of_training_with_finished_runs_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    fl.parse("--compare runs/a,runs/b --rounds 7 --alpha 0.1 --figures none --name c")
    said = capsys.readouterr().err
    assert "notice: --rounds, --alpha have no effect with --compare of finished runs" in said


@pytest.mark.parametrize("flags", ["--dropout 1", "--stragglers 1 --drop-stragglers"])
def test_rounds_without_a_report_are_told(flags):
    config = fl.parse(flags)
    (notice,) = conditions.learning_notices(config.to_dict(), config.tables)
    assert notice.endswith("no client reports, so no learning will take place")


def test_default_values_with_an_effect_are_not(capsys):
    fl.parse("--alpha 0.5 --client-lr 0.15 --rounds 5 --algorithm fedprox --prox-mu 0.001")
    fl.parse("--list runs --rounds 5")
    assert "without" not in capsys.readouterr().err


def test_a_comparison_tells_of_fields_without_effect_once(tmp_path, monkeypatch, capsys):
    """Before its runs, not again in each of them."""
    monkeypatch.chdir(tmp_path)
    words = "--dataset digits --model logreg --rounds 1 --local-epochs 1 --num-clients 2"
    flags = f"{words} --compare fedavg,fedprox --figures none --no-caption --after-target continue"
    config = fl.parse(f"{flags} --cache {tmp_path / 'cache'}")
    told = config.unused_notices()
    assert len(told) == 2
    fl.compare(config)
    said = capsys.readouterr().err
    assert all(said.count(notice) == 1 for notice in told)


def test_what_a_run_is_drawn_with_is_kept_though_it_draws_nothing_yet():
    config = fl.parse("--figures none --no-caption --after-target continue").effective()
    assert not config.run.caption and config.run.after_target == "continue"


def test_notices_of_commands_without_rounds_are_on_what_they_use(capsys):
    config = fl.parse("--figures none --no-caption --prox-mu 0.3 --table-columns mean")
    assert len(config.unused_notices()) == 3
    (notice,) = config.unused_notices(fields=EVALUATING)
    assert notice.startswith("caption=False")
    assert len(config.unused_notices(seeds=2)) == 2  # of a list of configurations, a table is made


@pytest.mark.parametrize("flag", ["--rounds 3", "--preset fast"])
def test_flags_of_training_with_a_list_are_told(capsys, flag):
    fl.parse(f"--list runs {flag}")
    name = flag.split()[0]
    said = capsys.readouterr().err
    assert said == f"notice: {name} has no effect with --list, which trains nothing\n"
