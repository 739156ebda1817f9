"""Answers of people with two attributes, predicted from those of each attribute alone."""

import numpy as np

from sae_research.errors import ResearchError
from sae_research.surveys.survey import Survey

FLOOR = 1e-3


def add_log_probabilities(
    first: np.ndarray, second: np.ndarray, overall: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """log p = log p_first + log p_second - log p_overall, renormalised within `mask`."""
    # By Bayes' rule this is exact where the attributes are independent among people who give the
    # same answer.
    first, second, overall = (np.log(np.maximum(p, FLOOR)) for p in (first, second, overall))
    return _normalize(np.where(mask, np.exp(first + second - overall), 0.0))


def leave_cell_out(crossed: Survey, least: int = 100, seed: int = 0) -> dict[str, float]:
    """Mean distance from each cell's answers to guesses out of the other cells of its attribute
    pair, by guess.

    A cell is an intersection and a question that at least `least` of its people answered, and
    all cells weigh the same; `noise` is the distance to one redraw of the cell at its own size.
    """
    if crossed.counts is None:
        raise ResearchError(
            "cells can only be left out of a survey with counts; draw a poll with `sampled` first."
        )
    margins = [
        np.tensordot(others, crossed.counts, axes=1) for others in _find_other_cells(crossed)
    ]
    known = np.all([m.sum(-1) > 0 for m in margins], axis=0) & (
        crossed.counts.sum(-1) >= max(least, 1)
    )
    if not known.any():
        raise ResearchError(
            f"no intersection has {least} respondents and shares both its values with other ones."
        )
    cells, questions = crossed.counts[known], np.nonzero(known)[1]
    truth = _normalize(cells)
    first, second, overall = (_normalize(m[known]) for m in margins)
    sizes = np.rint(cells.sum(-1)).astype(int)  # counts of a weighted survey need not be whole
    guesses = {
        "overall": overall,
        "first margin": first,
        "second margin": second,
        "mean of margins": (first + second) / 2,
        "added": add_log_probabilities(first, second, overall, crossed.mask[questions]),
        "noise": _normalize(np.random.default_rng(seed).multinomial(sizes, truth)),
    }
    return {
        name: float(crossed.distance(truth, guess, questions).mean())
        for name, guess in guesses.items()
    }


def _find_other_cells(crossed: Survey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which other intersections of the pair share the first value, share the second, or are there
    at all.
    """
    for group in crossed.groups:
        if group.attribute.count("|") != 1 or group.name.count("|") != 1:
            raise ResearchError(
                f"'{group.name}' of '{group.attribute}' is no intersection of two attributes."
            )
    pair = np.array([g.attribute for g in crossed.groups])
    first, second = np.array([g.name.split("|") for g in crossed.groups]).T
    others = (pair[:, None] == pair) & ~np.eye(len(pair), dtype=bool)
    return others & (first[:, None] == first), others & (second[:, None] == second), others


def _normalize(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(-1, keepdims=True)
