"""Flags that do not affect the results: files, workers, comparisons; and which fields do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from harness.cli.fields import (
    ConfigGroup,
    Count,
    CountOrZero,
    Folder,
    Name,
    Path,
    Probability,
    UserError,
    choice,
    float_range,
    int_range,
    optional_float,
    text,
)
from harness.cli.own_files import OWN, own_fields
from harness.engine.ssh import HERE, check_folder, read_hosts
from harness.storage.files import expand_path


@dataclass(frozen=True)
class Run(ConfigGroup):
    """Files of the run, and the processes that train.

    None of these flags changes a round's numbers; the number of workers changes their last bits.
    """

    config: Path = ""
    """File with fields, run.toml or a run's config.json, named like the flags, such as client_lr =
    0.1. Flags on the command line override it."""
    resume: Folder = ""
    """Folder of a run to continue from its last round, or to extend with a larger --rounds. All
    other settings are kept."""
    accept_changes: bool = False
    """With --resume: continue even though the program, TensorFlow, TFF or NumPy has changed since
    the run's last round. Captions and metrics.json say so."""
    runs: Folder = "runs"
    """Folder in which the run's own folder is created."""
    name: Name = ""
    """Name of the run's folder. Default: made from data, partition, algorithm, model, seed and
    other non-default settings."""
    cache: Folder = ".cache"
    """Folder in which the clients' shard files are kept and reused."""
    target_accuracy: Probability = 0.0
    """Stop after the first round with this test accuracy, 0 to 1; 0: never. metrics.json has
    rounds_to_target, counted as in McMahan et al. 2017: from the best accuracy so far, linearly
    interpolated between two rounds. A comparison compares it."""
    after_target: Literal["stop", "continue"] = "stop"
    """continue: train all rounds even after the target accuracy, so that a comparison reports both
    the rounds to the target and the accuracy after the same number of rounds."""
    stop_after: CountOrZero = 0
    """Stop after N rounds without an improvement in test accuracy; 0: never stop early."""
    time_limit: text("TIME") = ""
    """Stop before the round that would exceed this time, such as 90m, 3h or 3600 (seconds), as for
    a job with a time limit; --resume continues the run, or its --baselines. The runs of a
    comparison share it: the same command continues them. Default: no limit."""
    metrics: choice({"": "no other metrics"}, OWN, "FILE.py:FUNCTION") = ""
    """A function of more metrics: function(labels, predictions) of the test images after each
    round, both [N], returns a number or a dict of numbers, which become columns. Functions of
    sklearn.metrics can be imported into FILE.py and named."""
    save_every: CountOrZero = 0
    """Also save the global model every N rounds, as models/round-000010.keras."""
    save_clients: bool = False
    """Also save what each client sent in the last round, as clients/client-000003.keras."""
    evaluate: Folder = ""
    """Folder of a finished run: evaluate its model, without training, on the data set given by the
    other flags (default: its own). Writes metrics.json and the figures of its errors."""
    predict: Folder = ""
    """Folder of a finished run: print what its model takes pictures for, such as --predict
    runs/mine digit.png pictures/. They may have any size, and dark ink on a bright ground."""
    pictures: text("LIST") = ""
    """The pictures of --predict, a line each; they can be given behind the run instead."""
    baselines: bool = False
    """After the rounds, also train the model centrally on all images, and on each client alone, for
    the number of passes over their images that the federation made, and report which clients
    benefit from the federation. Takes about four times as long as the run."""
    patience: float_range(1, 86_400) = 60
    """Seconds without progress after which TFF's worker is considered hung and the round is
    retried; a host of --workers that does not answer is waited for as long."""
    workers: text("HOSTS") = HERE
    """Hosts that train, over ssh, separated by commas, such as localhost,hostA,me@hostB. With n
    hosts, client k and its shard are on host k mod n only. The number of hosts changes the last
    bits of the weights."""
    workers_cache: Folder = ".cache/federated_learning"
    """Folder on the hosts for TFF's worker and the shards; a relative path starts at the home
    folder there."""
    list: Folder = ""
    """List the runs in this folder and exit: rounds, accuracy, epsilon, seconds, state and
    non-default settings. --list alone means --list runs; with --json as JSON."""
    version: bool = False
    """Print the commit and the versions that determine the results, and exit."""
    figures: Literal["png", "pdf", "svg", "none"] = "png"
    """Format of the figures. none draws none, which saves two seconds per run of a sweep."""
    caption: bool = True
    """--no-caption omits the figures' titles and small print, for use in a paper."""
    figure_size: text("WxH") = ""
    """Size of each figure in inches, such as 3.3x2.2 for a column of a paper. Default: the
    figure's own."""
    figure_font: optional_float(3, 72) = None
    """Size of the texts in figures, in points; numbers in cells have 0.6 of it. Default: each
    text's own, 8 to 13."""
    figure_style: Path = ""
    """A matplotlibrc or .mplstyle file for the figures' style."""
    figure_y: Literal["error", "error-linear", "accuracy"] = "error"
    """What the figure of a comparison shows: the test error on a log scale, the same on a linear
    one, or the test accuracy."""
    table_columns: text("LIST") = ""
    """Columns of a comparison's summary.md and summary.tex, named as in summary.csv, such as
    mean,sd,megabytes. Default: all in summary.md; in summary.tex accuracy, difference and p, or for
    a grid of two fields a row and a column for each value."""
    quiet: bool = False
    """Print nothing on standard output; notices and errors still appear on standard error."""
    json: bool = False
    """Print a line of JSON last: folder, test_accuracy, weights_sha256, rounds and epsilon of a run
    (the first three of an evaluation), folder and finished of a comparison, or the list of --list
    and --predict. A run that --time-limit ended also has "finished": false."""
    tensorboard: bool = False
    """Also write each round's figures and confusion matrix as TensorBoard events: tensorboard
    --logdir runs."""

    def __post_init__(self) -> None:
        """Raise UserError for a name that no folder can have."""
        super().__post_init__()
        read_hosts(self.workers)
        check_folder(self.workers_cache)
        if self.time_limit and self.seconds_allowed is None:
            raise UserError(
                f"time_limit={self.time_limit!r:.40} is not a time; give seconds, or a number "
                "with m, h or d, such as 90m"
            )
        if self.figure_size and self.inches is None:
            raise UserError(
                f"figure_size={self.figure_size!r:.40} is not a size; give width and height from 1 "
                "to 40 inches, such as 3.3x2.2"
            )
        name = self.name
        if (
            name in (".", "..")
            or "/" in name
            or not name.isprintable()
            or len(os.fsencode(name)) > 200
        ):
            raise UserError(
                f"name={self.name[:50]!r} is not a valid folder name; choose up to 200 letters, "
                "digits, - or _"
            )

    @property
    def seconds_allowed(self) -> float | None:
        """The time limit in seconds, None without one."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", self.time_limit)
        units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
        return float(found[1]) * units[found[2]] if found and float(found[1]) else None

    @property
    def inches(self) -> tuple[float, float] | None:
        """The figures' width and height, None for each figure's own."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)", self.figure_size)
        size = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
        return size if min(size) >= 1 and max(size) <= 40 else None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts' names."""
        return read_hosts(self.workers)

    @property
    def single_worker(self) -> bool:
        """Whether one worker, on this machine, trains all clients."""
        return self.hosts == (HERE,)


@dataclass(frozen=True)
class Comparison(ConfigGroup):
    """Several runs in one figure and one table. Finished runs of comparisons are reused."""

    compare: text("LIST") = ""
    """Algorithms, or partitions, aggregators, models or attacks, separated by commas, or values of
    a field that changes a run, but for its data, seed and rounds: fedavg,fedprox or alpha=0.1,1. A
    row may have settings of its own: "fedavg(client_lr=0.2),fedprox(client_lr=0.1,prox_mu=0.1)".
    Each is run on the same split and seed, unless these are what is compared, and one plot shows
    all. Given twice, such as --compare fedavg,scaffold --compare alpha=0.1,1, it makes a grid.
    Folders of finished runs, such as runs/a,runs/b, 'runs/*-seed?' or that of a comparison, are put
    into one table and plot without training."""
    seeds: Count = 1
    """Number of seeds per row, counting up from --seed. Reports mean and standard deviation, and
    tests each row against that of the default choice, such as fedavg, or else the first (paired
    t-test over the seeds, with Holm's correction for several rows)."""
    tune: text("LIST") = ""
    """Values of a field to choose from for each row, such as client_lr=0.05,0.1,0.2: each value is
    trained with seeds of its own and evaluated on --holdout training images (default: a sixth), in
    runs/NAME-tuning. The rows are then trained on all training images with the value of the highest
    mean accuracy, and evaluated on the test set. Given twice, it tunes two fields together."""
    jobs: int_range(1, 64) = 1
    """Number of runs that are trained at once, each in its own process, with the same results.
    Each trains with two threads."""


SINGLE = Comparison().to_dict()  # fields of one run of a comparison
FORM = ("caption", "figure_size", "figure_font", "figure_style")  # of all figures
OF_SEVERAL = ("figure_y", "table_columns")  # of a comparison's own figure and tables
OF_FINISHED = ("after_target", *FORM, *OF_SEVERAL)  # of a table of finished runs
# Fields that --compare finds by their choices alone.
COMPARABLE = ("algorithm", "partition", "aggregator", "model", "attack")
# Fields that a run's numbers depend on and that every saved run has had since version 1.0. A field
# that is added later counts only where it is not at its default, and has that where a saved run
# lacks it: its default must be what the program did before.
FIRST_NAMES = """
seed preset dataset holdout min_images shards_per_client labels_per_client size_spread
size_exponent rotation noise owner_choice unseen_clients partition num_clients alpha sampling
local_steps model clients_per_round local_epochs batch_size client_lr server_lr algorithm
client_optimizer client_momentum weight_decay server_momentum server_epsilon prox_mu dyn_alpha
client_schedule server_schedule lr_decay lr_horizon aggregator client_weighting trim tolerated
noise_multiplier delta target_epsilon public_cohorts dropout stragglers drop_stragglers byzantine
attack attack_scale backdoor_target backdoor_share
"""
FIRST_FIELDS = frozenset(FIRST_NAMES.split())
MAY_GROW = ("rounds", "epsilon_budget")  # a resumed run may go further
# Fields of files that runs of before version 1.2 lack.
SINCE_1_2 = ("test_share", "image_size")
# Files count by their content: the partition's hash is that of data and split.
BY_CONTENT = (
    "data",
    "data_name",
    "transpose",
    "validation",
    "partition_file",
    "initial_model",
    *SINCE_1_2,
)


def identity(config: Any) -> dict[str, Any]:
    """Return field -> effective value of all that a run's numbers depend on.

    Left out are the data, known by their hash, and how far the run goes.
    """
    effective = config.effective().to_dict()
    ignored = {*Run().to_dict(), *SINGLE, *MAY_GROW, *BY_CONTENT}
    fields = {field: value for field, value in effective.items() if field not in ignored}
    for field, name in own_fields(effective).items():
        if field in fields:  # a file, from wherever it is named
            fields[field] = str(expand_path(name).absolute())
    usual = config.defaults()
    for field in fields.keys() - FIRST_FIELDS:
        if fields[field] == usual[field]:
            del fields[field]
    # The last bits of the sums follow the number of hosts, not their names.
    return fields | {"workers": len(read_hosts(effective["workers"]))}


# Fields whose defaults follow from others, which are the latter.
FOLLOWING = ("client_lr", "server_lr", "lr_horizon")
DECIDING = (
    "algorithm",
    *("device_speed", "bandwidth", "latency"),  # without which an algorithm may be refused
    "client_optimizer",
    "client_schedule",
    "dataset",
    "model",
    "rounds",
    "server_schedule",
)


def changed_fields(saved: dict[str, Any], default: Any) -> dict[str, Any]:
    """Return field -> value of those that change numbers and are not as by default.

    `saved` is field -> value, of this version of the program or another. A rate counts if it is not
    the default of its algorithm, optimizer and model.
    """
    usual = default.to_dict()
    chosen = {field: saved[field] for field in DECIDING if field in saved}
    usual |= default.effective(**chosen).subset(FOLLOWING)
    own = Run().to_dict()  # where files lie
    return {
        field: saved[field]
        for field in usual
        if field in saved and field not in own and saved[field] != usual[field]
    }


def show(value: Any) -> str:
    """Return a field's value: a number without a needless point, a path by its end."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).rpartition("/")[2]
