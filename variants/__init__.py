"""Variants of FedAvg, one module per subject; each needs a non-default flag. The papers:

- Acar et al. 2021, Federated Learning Based on Dynamic Regularization (ICLR)
- Andrew et al. 2021, Differentially Private Learning with Adaptive Clipping (NeurIPS)
- Arivazhagan et al. 2019, Federated Learning with Personalization Layers (arXiv:1912.00818)
- Bagdasaryan et al. 2020, How To Backdoor Federated Learning (AISTATS)
- Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
  (NeurIPS)
- Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS)
- Bonawitz et al. 2019, Towards Federated Learning at Scale: System Design (MLSys)
- Cheng et al. 2021, Fine-tuning is Fine in Federated Learning (arXiv:2108.07313)
- Collins et al. 2021, Exploiting Shared Representations for Personalized Federated Learning (ICML)
- Deng et al. 2020, Adaptive Personalized Federated Learning (arXiv:2003.13461)
- Fang et al. 2020, Local Model Poisoning Attacks to Byzantine-Robust Federated Learning
  (USENIX Security)
- Hsieh et al. 2020, The Non-IID Data Quagmire of Decentralized Machine Learning (ICML)
- Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution (arXiv:1909.06335)
- Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (ICML)
- Karimireddy et al. 2021, Breaking the Centralized Barrier for Cross-Device Federated Learning
  (NeurIPS)
- Li et al. 2020, Federated Optimization in Heterogeneous Networks (MLSys)
- Li et al. 2021, FedBN: Federated Learning on Non-IID Features via Local Batch Normalization (ICLR)
- Li et al. 2021b, Ditto: Fair and Robust Federated Learning Through Personalization (ICML)
- Li et al. 2022, Federated Learning on Non-IID Data Silos: An Experimental Study (ICDE)
- McMahan et al. 2018, Learning Differentially Private Recurrent Language Models (ICLR)
- Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation (AISTATS)
- Reddi et al. 2021, Adaptive Federated Optimization (ICLR)
- Suresh et al. 2017, Distributed Mean Estimation with Limited Communication (ICML)
- Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision (CVPR)
- Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated
  Optimization (NeurIPS)
- Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (ICML)
"""

from typing import NamedTuple


class Change(NamedTuple):
    """A change, where one of the fields is not at its default."""

    fields: tuple[str, ...]
    function: str  # "module:function"
    why_here: str


# Of the configuration, once the data are there: function(config, dataset) -> config.
SETTLED = (
    Change(
        ("num_clients",), "partitions:count_owners", "everything depends on the number of clients"
    ),
    Change(("target_epsilon",), "privacy:meet_target", "epsilon depends on that number"),
)

# Of the network: function(network, experiment) -> network.
LOSSES = (
    Change(("label_smoothing", "class_weights", "loss"), "losses:choose_loss", "the only one"),
)

# Of FedAvg's parts: function(parts, experiment) -> parts.
CHANGES = (
    Change(("fine_tune_epochs",), "personal:fine_tune", "it takes FedAvg's own parts"),
    Change(("client_optimizer",), "optimizers:change_optimizer", "the changes below wrap it"),
    Change(("sampling", "unseen_clients"), "sampling:change_sampling", "dp replaces it"),
    Change(("aggregator",), "aggregators:change_aggregator", "FedNova wraps it"),
    Change(("algorithm",), "algorithms:change_algorithm", "its corrections apply last"),
    Change(("weight_decay",), "optimizers:decay_weights", "corrections include it"),
    Change(
        ("server_schedule",), "optimizers:schedule_server", "it wraps the algorithm's optimizer"
    ),
    Change(("stragglers",), "adversity:straggle", "what a client sends depends on its steps"),
    Change(("local_steps",), "optimizers:make_local_steps", "stragglers make a fraction of them"),
    Change(("byzantine",), "adversity:attack", "it changes what the algorithm would send"),
    Change(("client_weighting",), "aggregators:weigh_alike", "it overrides the client's weight"),
    Change(("client_schedule",), "optimizers:schedule_clients", "all of the above read the rate"),
    Change(("batch_norm",), "normalization:take_statistics", "no step above is of statistics"),
    Change(("byzantine",), "evaluations:evaluate_backdoor", "anywhere"),
    Change(("unseen_clients",), "evaluations:evaluate_unseen", "anywhere"),
    Change(("client_test",), "evaluations:evaluate_clients", "anywhere"),
    Change(("dropout",), "sampling:drop_out", "of those drawn"),
    Change(
        ("drop_stragglers",), "sampling:drop_stragglers", "applies to those that did not drop out"
    ),
    Change(
        ("device_speed", "bandwidth", "latency"), "clock:keep_time", "all else tells who reports"
    ),
)
