"""Everything that needs a flag other than the default, one module a subject. The papers:

- Acar et al. 2021, Federated Learning Based on Dynamic Regularization (ICLR)
- Andrew et al. 2021, Differentially Private Learning with Adaptive Clipping (NeurIPS)
- Bagdasaryan et al. 2020, How To Backdoor Federated Learning (AISTATS)
- Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
  (NeurIPS)
- Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning (CCS)
- Fang et al. 2020, Local Model Poisoning Attacks to Byzantine-Robust Federated Learning
  (USENIX Security)
- Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution (arXiv:1909.06335)
- Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (ICML)
- Karimireddy et al. 2021, Breaking the Centralized Barrier for Cross-Device Federated Learning
  (NeurIPS)
- Li et al. 2020, Federated Optimization in Heterogeneous Networks (MLSys)
- Li et al. 2022, Federated Learning on Non-IID Data Silos: An Experimental Study (ICDE)
- McMahan et al. 2018, Learning Differentially Private Recurrent Language Models (ICLR)
- Reddi et al. 2021, Adaptive Federated Optimization (ICLR)
- Suresh et al. 2017, Distributed Mean Estimation with Limited Communication (ICML)
- Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated
  Optimization (NeurIPS)
- Yin et al. 2018, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (ICML)
"""
