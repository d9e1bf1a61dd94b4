"""Presets: published experiments, and one of ours, as flags.

Flags given in addition override them. In Python, use `config.replace(preset=NAME)`. No TensorFlow
here.

A paper's cells leave the rate open. It was chosen on held-out training images with seed 0 (`python
benchmarks/paper.py --tune`), and that of `fast` likewise (`python benchmarks/tuning.py
--optimizers`).
"""

from typing import NamedTuple


class Preset(NamedTuple):
    """An experiment: its flags as on the command line, and where it stands."""

    flags: str
    help: str  # where it is published
    note: str = ""  # what is not as it is there


MCMAHAN = "--num-clients 100 --clients-per-round 10 --batch-size 10"
TWO_NN = f"{MCMAHAN} --model 2nn --local-epochs 1 --target-accuracy 0.97"
CNN = f"{MCMAHAN} --model cnn --local-epochs 5 --target-accuracy 0.99"
SHARDS = "--partition shards --shards-per-client 2"
NIID_BENCH = (
    "--model lenet --num-clients 10 --batch-size 64 --client-optimizer momentum --client-lr 0.01"
)
NIID_BENCH += " --weight-decay 1e-5 --local-epochs 10 --rounds 50"
REDDI = (
    "--model cnn --num-clients 100 --clients-per-round 10 --local-epochs 1 --batch-size 20 "
    f"{SHARDS} --rounds 100"
)
# Rates and epsilons, tuned together, by powers of ten: google-research/federated,
# optimization/docs/hyperparameters.md.
TABLE_8 = "Reddi et al. 2021, table 8"
EMNIST_RATES = (
    "rates of EMNIST CR (there 1,500 rounds of a CNN with dropout; here MNIST in two shards, 100 "
    "rounds)"
)
SUM_AT_1E_6 = (
    f"{EMNIST_RATES}. The sum of squares starts at TFF's 1e-6; the paper's starts at tau squared"
)
# That makes 13 to 48 % of what a weight moves in the first rounds.
BIAS = f"{EMNIST_RATES}. TFF's Adam and Yogi correct the bias of the moments; the paper's do not"

PRESETS: dict[str, Preset] = {
    "none": Preset("", "no preset"),
    "fast": Preset(
        "--client-optimizer adam --client-lr 0.003 --client-schedule inverse-sqrt --local-epochs "
        "2 --batch-size 32",
        "ours: two thirds of the default's local epochs (`python benchmarks/tuning.py "
        "--optimizers`)",
    ),
    "mcmahan-2nn-iid": Preset(
        f"{TWO_NN} --partition iid --client-lr 0.2 --rounds 1500",
        "McMahan et al. 2017, table 1: 87 rounds",
    ),
    "mcmahan-2nn-noniid": Preset(
        f"{TWO_NN} {SHARDS} --client-lr 0.2 --rounds 2000",
        "McMahan et al. 2017, table 1: 664 rounds",
    ),
    "mcmahan-cnn-iid": Preset(
        f"{CNN} --partition iid --client-lr 0.2 --rounds 400",
        "McMahan et al. 2017, table 1: 18 rounds",
    ),
    "mcmahan-cnn-noniid": Preset(
        f"{CNN} {SHARDS} --client-lr 0.1 --rounds 1200", "McMahan et al. 2017, table 1: 206 rounds"
    ),
    "niid-bench-iid": Preset(
        f"{NIID_BENCH} --partition iid", "Flower's niid_bench: 99.09 ± .05 %, the best of 50 rounds"
    ),
    "niid-bench-dirichlet": Preset(
        f"{NIID_BENCH} --partition capped-dirichlet --alpha 0.5 --min-images 10",
        "Flower's niid_bench: 98.89 ± .07 %, the best of 50 rounds",
    ),
    "niid-bench-two-labels": Preset(
        f"{NIID_BENCH} --partition random-labels --labels-per-client 2",
        "Flower's niid_bench: 96.86 ± .30 %, the best of 50 rounds",
    ),
    "niid-bench-one-label": Preset(
        f"{NIID_BENCH} --partition random-labels --labels-per-client 1",
        "Flower's niid_bench: 19 ± 12 %, the best of 50 rounds",
    ),
    "reddi-fedavg": Preset(
        f"{REDDI} --algorithm fedavg --client-lr 0.1 --server-lr 1", TABLE_8, EMNIST_RATES
    ),
    "reddi-fedavgm": Preset(
        f"{REDDI} --algorithm fedavgm --client-lr 0.0316 --server-lr 0.316",
        TABLE_8,
        EMNIST_RATES,
    ),
    "reddi-fedadagrad": Preset(
        f"{REDDI} --algorithm fedadagrad --client-lr 0.0316 --server-lr 0.1 --server-epsilon 0.01",
        TABLE_8,
        SUM_AT_1E_6,
    ),
    "reddi-fedadam": Preset(
        f"{REDDI} --algorithm fedadam --client-lr 0.0316 --server-lr 0.00316 --server-epsilon 1e-4",
        TABLE_8,
        BIAS,
    ),
    "reddi-fedyogi": Preset(
        f"{REDDI} --algorithm fedyogi --client-lr 0.0316 --server-lr 0.00316 --server-epsilon 1e-4",
        TABLE_8,
        BIAS,
    ),
    "fedprox-mnist": Preset(
        "--model logreg --partition lognormal-labels --num-clients 1000 --clients-per-round 10 "
        "--local-epochs 20 --batch-size 10 --client-lr 0.03 --rounds 200 --stragglers 0.9 "
        "--algorithm fedprox --prox-mu 1",
        "after Li et al. 2020, figure 1, MNIST with 90 % stragglers; FedAvg in that figure: "
        "--drop-stragglers --prox-mu 0",
        "here each client is a straggler with probability 0.9 (in the paper exactly 9 of 10), so "
        "in some rounds no client finishes; stragglers complete a random fraction of their steps "
        "(in the paper, of their epochs); pixels are in 0..1 (in the paper, standardized)",
    ),
    "original-script": Preset(
        "--model mlp --num-clients 10 --rounds 5",
        "the script this project started from, which claimed 96.7 %",
    ),
}
