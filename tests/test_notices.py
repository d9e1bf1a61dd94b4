"""Notices on settings that do less than they seem to."""

from types import SimpleNamespace

import federated_learning as fl
from harness.reporting.notices import find_weak_settings
from harness.storage.callbacks import PrintRounds

import numpy as np
import pytest
from runs import configure, make_record


def find(**flags):
    """The notices of a run by four clients, the largest of which has 100 images."""
    partition = SimpleNamespace(sizes=np.array([10, 100, 20, 30]))
    config = configure(num_clients=4, **flags).effective()
    return find_weak_settings(SimpleNamespace(config=config, partition=partition))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"aggregator": "trimmed-mean", "trim": 0.2}, "trim=0.2 of 4 clients leaves out none"),
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
    ("flags", "said"),
    [
        ("--figures none --figure-font 8", "--figure-font: no effect without figures"),
        ("--table-columns mean", "--table-columns: no effect without a comparison"),
        ("--after-target continue", "--after-target: no effect without --target-accuracy"),
        ("--list runs --rounds 3", "--rounds has no effect with --list, which trains nothing"),
        (
            "--sampling by-size --clients-per-round 3 --client-weighting uniform",
            "--client-weighting: no effect without --sampling fixed or poisson",
        ),
        ("--compare fedavg,fedprox --table-columns mean", ""),
        ("--target-accuracy 0.9 --after-target continue", ""),
        ("--seeds 2 --figure-y accuracy", ""),
        ("--figures none --no-caption", "--no-caption: no effect without figures"),
        ("--list runs --preset fast", "--preset has no effect with --list, which trains nothing"),
    ],
)
def test_flags_of_files_and_figures_without_effect_are_told(capsys, flags, said):
    fl.parse(flags)
    assert capsys.readouterr().err == (f"notice: {said}\n" if said else "")
