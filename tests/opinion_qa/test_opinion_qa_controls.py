"""A planted case for each control of study 1: a claim falls where its control shows the same."""

import numpy as np
import pandas as pd
import pytest

from sae_research import claims
from sae_research.studies.opinion_qa import findings
from sae_research.studies.opinion_qa.settings import (
    HUMAN_OVERALL,
    NO_KL,
    SPARSEST,
    UNSTEERED,
)

BEST = "SAE gated"
SEEDS = np.arange(5)
FACTS = {"headline": BEST, "noop": 0.0, "model": "world-survey"}


def row(value, half=0.02, **names):
    return {**names, "value": value, "low": value - half, "high": value + half, "n": 18}


def plant(in_control: bool) -> dict[str, pd.DataFrame]:
    """A headline shift that fits well; with `in_control`, calibration alone does so too."""
    share = {"best": 0.3, "calibration": 0.3 if in_control else 0.6}
    worst = {UNSTEERED: 0.3, BEST: 0.1, findings.CALIBRATION: 0.1 if in_control else 0.2}
    pairs = [
        row(share["best"], first=BEST, second=UNSTEERED, metric="wd_ratio"),
        row(share["calibration"], first=findings.CALIBRATION, second=UNSTEERED, metric="wd_ratio"),
        row(
            0.1 * (share["best"] - share["calibration"]),
            0.005,
            first=BEST,
            second=findings.CALIBRATION,
            metric="wd",
        ),
        row(-0.02, 0.01, first=BEST, second=HUMAN_OVERALL, metric="wd"),
        row(
            0.0 if in_control else -0.02,
            0.01,
            first=BEST,
            second=findings.CALIBRATION,
            metric="worst_group",
        ),
    ]
    scores = [
        {"method": name, "seed": seed, "worst": 0.001 * seed, "cost": 0.01, "moved": 0.5}
        for name in (BEST, NO_KL, SPARSEST)
        for seed in SEEDS
    ]
    scores += [{"method": name, "seed": 0, "worst": 0.0} for name in worst if name != BEST]
    scores = pd.DataFrame(scores)
    scores["worst"] += scores["method"].map(worst).fillna(0.0)
    metrics = ("rho_dev", "slope", "identification", "quietest")
    return {
        "paired": pd.DataFrame(pairs),
        "scores": scores,
        "intervals": pd.DataFrame([row(0.85, method=BEST, metric=metric) for metric in metrics]),
        "axes": pd.DataFrame({"axis": 1, "seed": SEEDS}),
    }


@pytest.mark.parametrize("name", ["fit", "worst_group"])
def test_a_claim_falls_where_its_control_shows_the_same(name):
    claim = claims.load_claims("opinion_qa")[f"opinion_qa.shift.{name}"]
    for in_control, verdict in ((False, claims.REPRODUCED), (True, claims.CONFOUNDED)):
        found = findings._measure_shift(plant(in_control), FACTS)[f"shift.{name}"]
        assert claims.judge(claim, findings._as_measurement(found)) == verdict


def test_groups_gain_nothing_where_calibration_gives_them_as_much():
    """The measure is itself the difference from the control."""
    claim = claims.load_claims("opinion_qa")["opinion_qa.shift.every_group"]
    for in_control, verdict in ((False, claims.REPRODUCED), (True, claims.UNDECIDED)):
        found = findings._measure_shift(plant(in_control), FACTS)["shift.every_group"]
        assert claims.judge(claim, findings._as_measurement(found)) == verdict
