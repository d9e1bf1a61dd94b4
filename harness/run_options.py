"""Flags that change none of a run's numbers: its files, its workers, what it is compared with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from harness.engine.ssh import HERE, check_folder, read_hosts
from harness.fields import ConfigGroup, Count, CountOrZero, Probability, UserError, float_range
from harness.files import expand_path


@dataclass(frozen=True)
class Run(ConfigGroup):
    """The run's files, and the processes that train.

    None of these flags changes a round's numbers, except the number of workers their last bits.
    """

    config: str = ""
    """A file of fields, run.toml or a run's config.json, with the names of the flags, such as
    client_lr = 0.1. Flags beside it win."""
    resume: str = ""
    """Folder of a run to resume where it stopped, or to extend by a larger --rounds. All else is
    as it was."""
    accept_changes: bool = False
    """With --resume: go on although the program, or TensorFlow, TFF or NumPy, has changed since
    the run's last round. Captions and metrics.json say so."""
    runs: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = ""
    """Name of the run's folder. By default it is made of data, partition, algorithm, model and
    seed."""
    cache: str = ".cache"
    """Folder in which the clients' shard files are kept and reused."""
    target_accuracy: Probability = 0.0
    """The run ends after the first round with this test accuracy, 0..1; 0: after all its rounds.
    metrics.json has rounds_to_target as McMahan et al. 2017 count them: of the best accuracy so
    far, on a straight line between two rounds. A comparison compares them."""
    stop_after: CountOrZero = 0
    """The run ends after so many rounds without a better test accuracy; 0: after all its rounds."""
    save_every: CountOrZero = 0
    """Also save the global model after each so many rounds, as models/round-000010.keras."""
    save_clients: bool = False
    """Also save what each client sent in the last round, as clients/client-000003.keras."""
    evaluate: str = ""
    """Folder of a finished run: evaluate its model on the data set that the other flags name, by
    default its own, with the same tables and pictures, and train nothing."""
    baselines: bool = False
    """After the rounds, let the same process train on all images in one place, and each client
    alone, for as many local epochs: what is the federation worth, and who gains by it? That takes
    about four times as long as the run."""
    patience: float_range(1, 86_400) = 60
    """Seconds without any progress after which TFF's worker counts as hung, and the round is done
    again."""
    workers: str = HERE
    """Hosts that train, by ssh: names with commas between, such as localhost,hostA,me@hostB. With n
    hosts client k belongs to host k mod n, and its shard goes only there. Their number changes the
    weights' last bits."""
    workers_cache: str = ".cache/federated_learning"
    """Folder on the hosts for TFF's worker and the shards; a relative one begins at the home folder
    there."""
    list: str = ""
    """Print the runs in this folder, a line each, and nothing else: what differs from the default,
    rounds, accuracy, epsilon, seconds, and whether it is finished. --list alone is --list runs."""
    version: bool = False
    """Print the commit and the versions of what makes the numbers, and nothing else."""
    figures: Literal["png", "pdf", "svg", "none"] = "png"
    """Format of the figures. none draws none, which takes two seconds off each run of a sweep."""
    caption: bool = True
    """--no-caption leaves out the figures' titles and small print, which a paper has elsewhere."""
    tensorboard: bool = False
    """Also write each round's figures and confusion matrix as TensorBoard events: tensorboard
    --logdir runs."""

    def __post_init__(self) -> None:
        """Raise UserError for a name that no folder can have."""
        super().__post_init__()
        read_hosts(self.workers)
        check_folder(self.workers_cache)
        name = self.name
        if (
            name in (".", "..")
            or "/" in name
            or not name.isprintable()
            or len(os.fsencode(name)) > 200
        ):
            raise UserError(
                f"name={self.name[:50]!r} is not a folder's name; choose up to 200 letters, "
                "digits, - or _"
            )

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
    """Several runs in one plot and one table. A run that is done already is not done again."""

    compare: str = ""
    """Algorithms, or partitions, aggregators, models or attacks, with commas between, or values of
    any field that changes a run: fedavg,fedprox or alpha=0.1,1. Each is run, on the same split and
    seed if these are not what differs, and one plot shows all. Given twice, as in --compare
    fedavg,scaffold --compare alpha=0.1,1, it makes a grid. Folders of finished runs, such as
    runs/a,runs/b, are put into one table and plot, without training."""
    seeds: Count = 1
    """Seeds to run and compare, from `seed` on: mean and standard deviation, and whether they tell
    a row from the default, or the first (paired t-test over the seeds, with Holm's correction for
    several rows)."""


# Fields that came after runs of 225c0cd, with defaults that do what was done before: a saved
# configuration may lack them, and at their defaults they are no part of what a run is.
NEWER = ("warmup_steps",)
MAY_GROW = ("rounds", "epsilon_budget")  # a resumed run may go further
# Files count by their content: the partition's hash is that of data and split.
BY_CONTENT = (
    "data",
    "data_name",
    "transpose",
    "validation",
    "partition_file",
    "initial_model",
)


def identity(config: Any) -> dict[str, Any]:
    """Return field -> effective value of all that a run's numbers depend on.

    Left out are the data, known by their hash, and how far the run goes.
    """
    effective = config.effective().to_dict()
    ignored = {*Run().to_dict(), *Comparison().to_dict(), *MAY_GROW, *BY_CONTENT}
    fields = {field: value for field, value in effective.items() if field not in ignored}
    if ".py:" in fields["model"]:  # a file, from wherever it is named
        fields["model"] = str(expand_path(fields["model"]).absolute())
    usual = config.defaults()
    for field in NEWER:
        if fields[field] == usual[field]:
            del fields[field]
    # The last bits of the sums follow the number of hosts, not their names.
    return fields | {"workers": len(read_hosts(effective["workers"]))}
