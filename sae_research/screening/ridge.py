"""Ridge regression of labels on predictors, out of fold, for the features of one SAE."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sae_research.screening import predictors

Splits = Sequence[tuple[np.ndarray, np.ndarray]]

N_FOLDS = 5
RIDGE_ALPHA = 1.0


def make_folds(n: int, seed: int) -> Splits:
    """Shuffled train and test rows of five folds."""
    return list(KFold(N_FOLDS, shuffle=True, random_state=seed).split(np.arange(n)))


def predict_by_ridge(X: np.ndarray, Y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Predictions [rows of `at`, labels] of a ridge regression of Y on standardised columns."""
    ridge = make_pipeline(StandardScaler(), Ridge(RIDGE_ALPHA)).fit(X, Y)
    return ridge.predict(at).reshape(len(at), -1)  # scikit-learn drops the axis of a single label


def cross_predict(
    X: np.ndarray,
    Y: np.ndarray,
    splits: Splits,
    nuisance: np.ndarray | None = None,
    everywhere: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold (targets, predictions), each row predicted by a model that never saw it.

    With `nuisance`, both are what a ridge on the nuisances leaves, fitted inside the training fold
    (or, as published, on all rows: `everywhere`).
    """
    target = Y.astype(float)
    predicted = np.zeros(Y.shape)
    for train, test in splits:
        y = Y
        if nuisance is not None:
            rows = slice(None) if everywhere else train
            y = Y - predict_by_ridge(nuisance[rows], Y[rows], nuisance)
        target[test] = y[test]
        predicted[test] = predict_by_ridge(X[train], y[train], X[test])
    return target, predicted


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho; not a number where one side is constant, since it has no order."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    # scipy's spearmanr also computes p-values: ten times slower
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def get_columns(frame: pd.DataFrame, name: str) -> np.ndarray:
    """The predictors of one of the ten sets, or of a set named by its columns joined with '+'."""
    names = predictors.SETS.get(name) or tuple(name.split("+"))
    return frame[list(names)].to_numpy(float)
