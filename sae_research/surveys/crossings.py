"""Answers of people with two attributes, predicted from those of each attribute alone."""

import numpy as np

FLOOR = 1e-3


def add_log_probabilities(
    first: np.ndarray, second: np.ndarray, overall: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """log p = log p_first + log p_second - log p_overall, renormalised within `mask`."""
    # By Bayes' rule this is exact where the attributes are independent among people who give the
    # same answer.
    first, second, overall = (np.log(np.maximum(p, FLOOR)) for p in (first, second, overall))
    joint = np.where(mask, np.exp(first + second - overall), 0.0)
    return joint / joint.sum(-1, keepdims=True)
