"""Exact inference, as pure functions on time-first tensors: linear-Gaussian models and hidden Markov models.

`kalman.kalman_filter(...)`, `hmm.hmm_filter(...)`: both modules have names such as `Filtered`, `simulate` and
`sample_posterior`, so use them through their module. For training and imputation, `likelihood.log_likelihood` and
`simulation.complete` share covariances between sequences that miss the same values.
"""

from dynavae.exact import em, hmm, kalman, structural

__all__ = ["em", "hmm", "kalman", "structural"]
