"""Fixtures: digits, a worker, and small federations on both.

TensorFlow is imported where it is used: pytest-xdist's first process, which runs no test, reads
this file too, and all others wait for it.
"""

import contextlib
import gc
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import harness  # noqa: F401, before TensorFlow: it quiets that, here and in the tests' processes
from variants import choices

import psutil
import pytest

gc.disable()  # until all is imported and collected, of which nothing is garbage

# these tests go on behind nohup or &: what they start would
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignore Ctrl-C too, as it should


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory):
    """The list of the model files that were run is not the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def digits():
    import federated_learning as fl

    from runs import configure

    return fl.load_dataset(configure(dataset="digits").data)


@pytest.fixture(scope="session")
def mnist():
    import federated_learning as fl

    return fl.load_dataset(fl.Config().data)


@pytest.fixture(scope="module")
def worker():
    from harness.engine.worker import LocalWorker

    with LocalWorker(3) as worker:
        yield worker


def small_experiment(digits, cache, monkeypatch, **flags):
    import federated_learning as fl

    from reference import replace_choice, tanh_layers
    from runs import configure

    replace_choice(monkeypatch, choices.MODELS, "2nn", tanh_layers)
    small = {"dataset": "digits", "model": "2nn", "num_clients": 3, "cache": str(cache)}
    return fl.build_prepared(configure(**small | flags), digits)


@pytest.fixture
def federation(worker, digits, tmp_path, monkeypatch):
    """make(**flags) -> the experiment on digits; the model 2nn is a small one with tanh."""

    return partial(small_experiment, digits, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def federation_of_module(worker, digits, tmp_path_factory):
    """The same for the fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        yield partial(small_experiment, digits, tmp_path_factory.mktemp("module"), patch)


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Ends the runs of a test that failed before it could: they would slow all others down."""
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(word.endswith("/federated_learning.py") for word in process.cmdline()):
                process.kill()


# Fixtures that start a worker, build a TFF process, or train; and what starts a process.
BUILDERS = {"worker", "federation", "federation_of_module", "learners", "trained", "kept", "done"}
BUILDERS |= {"copy", "whole", "half", "twice", "undisturbed", "own", "go", "pair", "compared"}
STARTERS = {"run_script", "run_code", "start", "started", "command", "subprocess", "Popen"}
STARTERS |= {
    "call_script",
    "NotebookClient",
    "KernelManager",
    "compare",
    "rounds_of",
    "run_rounds",
    "build_process",
    "build_prepared",
    "run",
    "after_first_round",
}


# The modules that take a minute and more: they begin, lest one ends alone.
LONG = {
    "test_notebook.py",
    "test_faults.py",
    "test_hosts.py",
    "test_run_folder.py",
    "test_command_line.py",
    "test_worker.py",
    "test_provenance.py",
    "test_comparison.py",
}


# What does for another row, or at another moment, what a test of `make test` does for one of its
# kind: function -> the ids of these rows, without any all of them.
MORE_OF_A_KIND = {
    "test_statistics_are_not_a_matter_of_the_optimizers": (),
    "test_local_layers_with_other_variants_resume": (
        "{'algorithm': 'fedadam', 'server_lr': 0.01}",
        "{'algorithm': 'fedprox', 'prox_mu': 0.1}",
        "{'clients_per_round': 2, 'dropout': 0.3}",
        "{'sampling': 'poisson', 'clients_per_round': 2}",
        "{'aggregator': 'median'}",
        "{'partition': 'feature', 'unseen_clients': 0.3}",
    ),
    "test_a_file_that_a_folder_from_elsewhere_names_is_not_run": (
        "partition",
        "aggregator",
        "metrics",
    ),
    "test_held_out_images_with_other_variants": (
        "--algorithm fedadam --aggregator median",
        "--algorithm scaffold",
        "--sampling poisson --clients-per-round 4",
        "--baselines",
        "--partition feature",
    ),
    "test_with_equal_times_and_a_full_buffer_fedbuff_is_fedavg": (),
    "test_losses_with_other_variants": (
        "{'algorithm': 'scaffold'}",
        "{'aggregator': 'median'}",
        "{'algorithm': 'mimelite'}",
        "{'baselines': True}",
    ),
    "test_the_same_function_from_a_file_makes_the_same_numbers": (),
    "test_models_of_any_kind_are_trained_saved_and_resumed": (
        "Net",
        "nested",
        "branches",
        "logits",
        "recurrent",
    ),
    "test_a_model_file_does_not_end_the_script_in_silence": (
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "def build():\\n    import sys\\n    sys.exit(3)",
        "def build():\\n    raise KeyboardInterrupt",
        "import sys\\nsys.exit(0)",
    ),
    "test_a_comment_makes_no_other_program": (),
    "test_a_notebook_reads_fields_calls_and_single_lines": (),
    "test_after_the_target_all_rounds_are_trained_if_asked_for": (),
    "test_no_model_is_saved_that_no_client_sent": (),
    "test_a_private_run_says_nothing_about_single_clients": (),
    "test_a_private_run_has_metrics_of_the_test_set": (),
    "test_balanced_classes_help_a_rare_label": (),
    "test_a_round_without_a_finite_update_changes_nothing": (
        "secure",
        "compressed",
        "fednova",
        "fedavgm",
    ),
    "test_a_run_with_an_algorithm_of_a_file_has_baselines": (),
    "test_a_function_of_a_file_may_read_the_fields_of_what_it_replaces": (),
    "test_the_runs_of_a_comparison_share_a_time_limit": ("1-more1", "2-more0", "2-more1"),
    "test_its_command_continues_the_run": (
        "fields0---rounds 6",
        "fields1---after-target continue",
        "fields2---stop-after 0",
    ),
    "test_the_axis_of_baselines_is_what_was_passed_over": (),
    "test_two_equal_comparisons_at_once_share_their_runs": (),
    "test_a_client_that_sees_shifted_images_is_asked_on_such": (),
    "test_a_cheap_cell_of_the_results_again": (),
    "test_a_grid_runs_each_of_its_cells_once": (),
    "test_a_stopped_comparison_ends_its_jobs_and_continues": (),
    "test_runs_are_stopped_at_any_moment_of_their_start": (),
    "test_the_server_takes_the_mean_by_examples": (),
    "test_a_row_that_gets_the_value_of_another_stays_a_row_of_its_own": (),
    "test_fednova_does_not_scale_what_no_rate_moves": (),
    "test_a_comparison_to_a_target_tells_rounds": (),
    "test_a_page_of_a_private_run_has_no_clients": (),
    "test_three_workers_repeat_to_the_bit_where_a_cohort_leaves_one_out": (),
    "test_with_one_step_a_round_the_split_is_nothing_to_the_weights": (),
    "test_a_client_whose_labels_no_test_image_has_is_left_out": (),
    "test_a_kernels_restart_leaves_no_worker": (),
    "test_a_killed_coordinator_leaves_nothing_on_any_host": (),
    "test_a_name_that_another_comparison_has_is_not_overwritten": (),
    "test_a_pipe_behind_the_script_ends_with_it": (),
    "test_a_preset_is_its_flags": (
        "mcmahan-2nn-noniid",
        "mcmahan-cnn-iid",
        "mcmahan-cnn-noniid",
        "niid-bench-iid",
        "niid-bench-one-label",
        "niid-bench-two-labels",
        "reddi-fedadagrad",
        "reddi-fedavg",
        "reddi-fedavgm",
        "reddi-fedyogi",
    ),
    "test_a_private_round_is_counted_as_often_as_its_noise_was_drawn": (
        "before training",
        "before the checkpoint",
        "between the tables",
    ),
    "test_ctrl_c_in_a_comparison_says_that_the_same_command_goes_on": (),
    "test_adaptive_clipping_and_zeroing_equal_numpys": (
        "clipping-numpy_clipping-1.0-flags1",
        "zeroing-numpy_zeroing-10.0-flags2",
    ),
    "test_a_client_that_is_left_out_is_left_out_of_the_adaptive_norm_too": ("zeroing",),
    "test_a_client_that_diverges_leaves_the_memory_as_it_was": ("mimelite",),
    "test_a_warm_up_within_a_round_counts_its_factors": ("scaffold", "fednova"),
    "test_learning_by_oneself_equals_numpys": ("alone-1-1", "tuned-2-2"),
    "test_local_steps_are_as_many_as_said": ("1-16", "11-0"),
    "test_local_steps_equal_numpys": ("adagrad-0.01", "rmsprop-0.01", "yogi-0.01"),
    "test_split_is_disjoint_covering_and_a_function_of_the_seed": ("1000-client-dirichlet",),
    "test_what_each_client_sent_is_kept": ("fedavg", "fednova"),
    "test_a_full_disk_ends_the_run_with_the_files_name": ("60-shards-",),
    "test_a_worker_lost_in_a_round_is_replaced_and_the_end_is_the_same": ("19-hung for 2 s",),
    "test_attackers_send_what_the_attack_says": (
        "gaussian",
        "label-flip",
        "nan",
        "scaled",
        "sign-flip",
    ),
    "test_earlier_cells_of_a_notebook_change_nothing_and_stay_as_they_were": (),
    "test_every_row_goes_on_from_its_checkpoint_with_equal_bits": ("fedadam", "zeroing"),
    "test_only_what_clients_need_travels": ("fedavg-1", "fedadam-1", "feddyn-4"),
    "test_output_closed_early": (),
    "test_output_that_goes_nowhere": (),
    "test_figures_of_another_form_are_on_the_page_too": (),
    "test_the_best_model_is_the_same_after_a_resume": ("best.npz",),
    "test_the_users_environment_changes_nothing": (),
    "test_robust_rules_equal_numpys": (
        "None-trimmed-mean",
        "None-multi-krum",
        "groups1-median",
        "groups1-trimmed-mean",
        "groups1-krum",
        "groups1-multi-krum",
    ),
    "test_three_rounds_equal_numpys": (
        "fedavg",
        "fedsgd",
        "fedavgm",
        "fedadagrad",
        "fedyogi",
        "fedadagrad-server_epsilon",
        "fedadam-server_schedule-lr_decay",
        "mimelite-client_weighting",
        "feddyn-client_weighting",
        "feddyn-num_clients-unseen_clients-seed",
        "scaffold-client_weighting",
        "scaffold-num_clients-unseen_clients-seed",
        "fedper",
        "fedrep",
        "scaffold-client_schedule-lr_decay",
    ),
    "test_a_data_set_from_python_is_held_out_too": (),
    "test_what_is_in_a_file_is_taken_or_refused_in_one_line": (
        "run/partition.json",
        "run/program.json",
        "run/rounds_begun.txt",
        "run/metrics.json",
        "packed.npz",
        "idx/t10k-labels-idx1-ubyte.gz",
    ),
    "test_randomness_is_there_and_repeats": ("rotation",),
    "test_rounds_equal_tffs_own": ("mimelite", "fedprox"),
    "test_rounds_equal_tffs_own_fedavg_on_the_same_batches": (
        "mlp-0.1",
        "small-cnn-0.01",
        "lenet-0.01",
    ),
    "test_schedules_change_the_learning_rates": ("exponential-factors0", "inverse-sqrt-factors1"),
    "test_signal_leaves_no_worker": ("2-130", "10-138"),
    "test_two_runs_at_once_in_one_folder": (),
    "test_two_workers_train_what_one_does": (
        "fedadam",
        "median",
        "scaffold-3",
        "clipping",
        "adam-0.5-1-nan",
        "cosine",
    ),
    "test_what_is_lost_is_done_again_and_the_end_is_the_same": ("worker",),
    "test_a_step_is_keras_own_of_the_same_loss": (
        "L2",
        "smoothing",
        "balanced",
        "activity",
        "own",
    ),
    "test_a_step_of_a_model_of_ones_own_is_keras_own": ("branches", "recurrent"),
    "test_somebody_elses_folder_runs_no_file": ("--config", "--evaluate"),
    "test_a_run_that_the_limit_of_a_comparison_ends_has_no_row": (),
    "test_with_its_neighbours_a_run_resumes_bit_for_bit": (
        "--algorithm fedbuff --device-speed lognormal:0.8 --buffer-size 3 --aggregator krum "
        "--tolerated 0 --byzantine 1",
    ),
    "test_a_model_is_trained_as_its_layers_are": (),
    "test_fine_tuning_is_local_training_from_the_global_model": ("{}",),
    "test_an_adaptive_norm_is_a_column": ("dp", "mean"),
    "test_a_function_of_each_round_ends_the_run_with_all_its_files": ("returns False",),
    "test_weights_that_are_not_in_the_file_are_refused": ("replace_by_huge", "replace_by_file"),
    "test_a_round_is_done_once_where_no_norm_is_looked_at": ("mean", "compressed"),
    "test_a_client_drawn_twice_counts_once_where_all_updates_are_looked_at": (
        "krum",
        "trimmed-mean",
        "multi-krum",
    ),
    "test_two_hosts_train_fedbuffs_clients": (),
    "test_a_run_with_statistics_is_resumed": (),
    "test_what_a_function_returns_is_taken_or_refused_for_its_reason": ("lstm-last14",),
    "test_fedprox_without_pull_is_fedavg": (),
    "test_secure_sums_of_clients_that_count_the_same_are_as_fine": (),
    "test_a_client_alone_does_as_keras": (),
    "test_a_run_with_held_out_images_resumes_and_can_be_split_again": (),
}


def names_used(function, seen=()):
    """The names in a test, and in the functions of its module that it calls."""
    names = set(function.__code__.co_names)
    found = set(names)
    for name in names - {*seen}:
        called = function.__globals__.get(name)
        if getattr(called, "__module__", None) == function.__module__ and hasattr(
            called, "__code__"
        ):
            found |= names_used(called, (*seen, *names))
    return found


def pytest_collection_finish():
    """Leave what was imported, which stays, out of garbage collection, as the script does."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Marks `slow` what starts a process or builds a TFF one: `make quick` leaves it out.

    The long modules begin.
    """
    items.sort(key=lambda item: item.path.name not in LONG)
    rows_of = {}
    for item in items:
        name, _, row = item.name.removesuffix("]").partition("[")
        rows_of.setdefault(name, set()).add(row)
        if name in MORE_OF_A_KIND and row in (MORE_OF_A_KIND[name] or [row]):
            item.add_marker(pytest.mark.thorough)
        names = names_used(item.function)
        if STARTERS & names or BUILDERS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    if {item.path for item in items} >= {*Path(__file__).parent.glob("test_*.py")}:
        for name, rows in MORE_OF_A_KIND.items():
            unknown = {*rows} - rows_of.get(name, set())
            if unknown or name not in rows_of:
                raise pytest.UsageError(f"MORE_OF_A_KIND has what no test is: {name} {unknown}")
