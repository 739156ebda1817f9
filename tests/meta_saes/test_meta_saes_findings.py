"""Measurements on planted tables: each moves where its claim holds, and its control fires."""

import numpy as np
import pandas as pd
import pytest

from sae_research import claims
from sae_research.studies.meta_saes import findings


def make_arms(joint=0.9, random=1.0):
    rows = []
    for seed in range(4):
        base = 1 + 0.01 * seed
        for arm, phi, fvu in (
            ("solo", 1.0, 0.10),
            ("solo k 0.8", 0.8, 0.20),
            ("joint", joint, 0.11),
            ("random meta", random, 0.10),
        ):
            rows.append({"arm": arm, "phi_corrected": base * phi, "fvu": base * fvu, "seed": seed})
    thinned = {"phi_thinned": 0.5, "phi_fewer_tokens": 0.9, "phi_live": 1.0}
    return {"arms": pd.DataFrame(rows).assign(ground="vectors", **thinned)}


def test_a_fall_counts_only_beyond_the_random_meta():
    found = findings.measure_phi(make_arms(), "vectors")
    assert found.value == pytest.approx(-0.1)
    assert found.difference.high < 0
    confounded = findings.measure_phi(make_arms(random=0.9), "vectors")
    assert confounded.value == pytest.approx(-0.1)
    assert confounded.difference.value == pytest.approx(0)


def test_equal_reconstruction_takes_off_what_damage_gives():
    """A solo SAE at the joint one's reconstruction has phi .98."""
    found = findings.measure_phi_at_equal_cost(make_arms(joint=0.98), "vectors")
    assert found.value == pytest.approx(0, abs=1e-9)
    assert findings.measure_phi_at_equal_cost(make_arms(joint=0.9), "vectors").value < -0.08
    text = {"arms": make_arms()["arms"].assign(ground="world-text")}
    assert findings.measure_rates(text).value == pytest.approx(-0.1)


@pytest.mark.parametrize(("low", "verdict"), [(1.2, "reproduced"), (0.95, "not reproduced")])
def test_the_null_with_the_lowest_phi_decides(low, verdict):
    arms = make_arms()["arms"]
    solo = arms[arms["arm"] == "solo"]
    noise = 1 + 0.001 * solo["seed"]
    nulls = [
        solo.assign(arm=f"null: {name}", phi_corrected=solo["phi_corrected"] * phi * noise)
        for name, phi in (("frozen_encoder", 1.5), ("soft_frozen_decoder", low))
    ]
    table = pd.concat([arms, *nulls]).assign(ground="world-text")
    claim = claims.load_claims("meta_saes")["meta_saes.phi.nulls"]
    assert claims.judge(claim, findings.measure_phi_of_nulls({"arms": table}), None) == verdict


def make_grid(cost, phi):
    rows = []
    for seed in range(2):
        rows += [{"arm": "solo", "fvu": 1.0, "phi_corrected": 1.0, "seed": seed}]
        rows += [{"arm": "penalty 0", "fvu": 1.0, "phi_corrected": 1.0, "e": 0.75, "seed": seed}]
        for weight in (0.1, 0.3, 1.0):
            for width in (0.3, 1.0, 3.0):
                s = weight / width * np.exp(-0.75 / width)
                cell = {"arm": f"joint {weight:g}/{width:g}", "lambda2": weight, "sigma2": width}
                values = {"fvu": 1 + cost(s, weight), "phi_corrected": phi(weight), "e": 0.8}
                rows.append({**cell, **values, "seed": seed})
    return {"grid_arms": pd.DataFrame(rows).assign(ground="vectors")}


def test_the_collapse_is_found_where_it_is_planted():
    on_s = findings.measure_collapse(make_grid(lambda s, w: s**0.8, lambda w: 1.0))
    assert on_s.value == pytest.approx(1)
    assert on_s.difference.value > 0.05
    on_weight = findings.measure_collapse(make_grid(lambda s, w: w / 10, lambda w: 1.0))
    assert on_weight.control.value == pytest.approx(1)
    assert on_weight.difference.value < 0
    free = findings.measure_collapse(make_grid(lambda s, w: -0.1, lambda w: 1.0))
    assert free.value == 0


def test_monotone_is_a_slope_on_the_logarithm_of_the_weight():
    falling = make_grid(lambda s, w: s, lambda w: 1 - 0.1 * np.log(w))
    assert findings.measure_monotone(falling).value == pytest.approx(-0.1)
    turning = findings.measure_monotone(make_grid(lambda s, w: s, lambda w: (w - 0.3) ** 2))
    assert turning.value > 0


def test_senses_are_won_and_lost():
    rows = [
        {
            "arm": arm,
            "word": "bank",
            "sense": i,
            "f1": f1,
            "purity": f1,
            "chance": 0.5,
            "seed": seed,
        }
        for seed in range(2)
        for arm, scores in (
            ("solo", (0.9, 0.2)),
            ("joint", (0.9, 0.9)),
            ("random meta", (0.9, 0.2)),
        )
        for i, f1 in enumerate(scores)
    ]
    t = {"senses": pd.DataFrame(rows).assign(ground="world-text")}
    settings = type("Settings", (), {"own_latent_f1": 0.7})
    found = findings.measure_senses(t, settings)
    assert found.value == 0.5
    assert found.control.value == 0
    assert findings.can_split(t, settings)
    assert not findings.can_split({"senses": t["senses"].assign(f1=0.9)}, settings)
    assert findings.sense_purity(t, "joint").tolist() == pytest.approx([0.4, 0.4])
