"""Prediction and screening of study 2 on planted labels, on pure noise and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from side_effects_toys import make_frame, make_labelled

from sae_research.screening import labels, ridge
from sae_research.studies.side_effects import findings, prediction, selection, tables
from sae_research.studies.side_effects.settings import Settings


def test_ridge_and_folds_equal_scikit_learn():
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    frame = make_frame()
    X, y = ridge.get_columns(frame, "full_no_magnitude"), frame["crowding"] * 2 + frame["E"]
    reference = cross_val_predict(
        make_pipeline(StandardScaler(), Ridge(1.0)), X, y, cv=KFold(5, shuffle=True, random_state=0)
    )
    _, ours = ridge.cross_predict(X, y.to_numpy()[:, None], ridge.make_folds(200, 0))
    assert ours[:, 0] == pytest.approx(reference)


def test_nuisances_are_removed_inside_the_fold():
    frame = make_frame(400)
    y = (5 * frame["E"] + 0.1 * np.random.default_rng(1).standard_normal(400)).to_numpy()[:, None]
    X = np.column_stack([frame["E"], frame["crowding"]])  # a predictor that knows the nuisance only
    Z = frame[["E"]].to_numpy()
    splits = ridge.make_folds(400, 0)

    def correlate(target, predicted):
        return prediction.score(target[:, 0], predicted[:, 0], splits)["pooled"]

    assert correlate(*ridge.cross_predict(X, y, splits)) > 0.95
    assert abs(correlate(*ridge.cross_predict(X, y, splits, Z))) < 0.15
    test = splits[0][1]
    changed = y.copy()
    changed[test] += 100
    before = ridge.cross_predict(X, y, splits[:1], Z)[1]
    after = ridge.cross_predict(X, changed, splits[:1], Z)[1]
    assert after[test] == pytest.approx(before[test])
    leaked = ridge.cross_predict(X, changed, splits[:1], Z, everywhere=True)[1]
    assert np.abs(leaked[test] - after[test]).max() > 1, "as published, it sees held-out labels"


def test_scores_of_random_directions_stand_beside_those_of_the_sae():
    frame = make_frame(200)
    rng = np.random.default_rng(6)
    frame["C"] = frame["crowding"] + 0.3 * rng.standard_normal(200)
    frame["C@random"] = rng.standard_normal(200)
    frame["E@random"] = rng.uniform(1, 2, 200)
    table = prediction.compare_with_random(frame, ("C",), draws=200)
    found = table[~table.residualised].set_index("direction")
    assert found.low["SAE"] > 0.5
    assert found.low["random"] < 0.1
    assert found.rho["difference"] == pytest.approx(found.rho["SAE"] - found.rho["random"])
    assert found.low["difference"] > 0.3


def test_frequency_only_mechanism_is_not_beaten_by_the_full_set():
    frame = make_frame(300)
    frame["C"] = frame["token_frequency"] + 0.5 * np.random.default_rng(2).standard_normal(300)
    gain = prediction.compare_sets(frame, ("C",), baselines=("freq_only",), draws=500).iloc[0]
    assert gain["low"] <= 0
    frame["C"] = frame["crowding"] + 0.5 * np.random.default_rng(2).standard_normal(300)
    gain = prediction.compare_sets(frame, ("C",), baselines=("freq_only",), draws=500).iloc[0]
    assert gain["low"] > 0.3
    assert gain["holm"] < 0.01


def test_boosted_trees_see_a_bend_that_ridge_does_not_and_nothing_in_noise():
    frame, rng = make_frame(300), np.random.default_rng(5)
    frame["C"] = frame["crowding"] ** 2 + 0.1 * rng.standard_normal(300)
    frame["S_abs"] = rng.standard_normal(300)
    found = prediction.compare_boosted_trees(frame, ("C", "S_abs"), draws=300).set_index("target")
    assert found.loc["C", "low"] > 0.1
    assert abs(found.loc["S_abs", "boosted"]) < 0.2


def test_permuted_labels_are_not_predicted():
    frame = make_frame(300)
    frame["C"] = frame["crowding"]
    null = prediction.score_permuted(frame, "C", draws=200)
    assert abs(null.mean()) < 0.05
    low, high = np.quantile(null, [0.025, 0.975])
    assert low < 0 < high


def test_a_constant_score_is_undefined_not_zero():
    assert np.isnan(ridge.rank_correlation(np.ones(5), np.arange(5.0)))


def test_partial_correlation_sees_through_a_common_cause():
    rng = np.random.default_rng(3)
    frame = make_frame(400)
    frame["crowding"] = frame["E"] + 0.3 * rng.standard_normal(400)
    frame["C"] = frame["E"] + 0.3 * rng.standard_normal(400)
    raw = prediction.correlate_predictors(frame, ("C",), ("crowding",), draws=300).iloc[0]
    given = {"controls": ("E",), "draws": 300}
    partial = prediction.correlate_predictors(frame, ("C",), ("crowding",), **given).iloc[0]
    assert raw["low"] > 0.2
    assert partial["low"] < 0 < partial["high"]


# screening


def test_groups_are_held_out_disjoint_and_matched():
    frame, rule = make_labelled(), Settings()
    groups = selection.split_features(frame, rule, seed=0)
    assert len(groups.train) == 180
    assert len(groups.clean) == len(groups.messy) == len(groups.random) == 32, (
        "floor(96 / 3), as published for GPT-2"
    )
    together = np.concatenate([groups.train, groups.clean, groups.messy, groups.random])
    assert len(set(together)) == len(together)
    assert set(groups.clean) | set(groups.messy) | set(groups.random) <= set(groups.candidates)


def test_a_true_signal_pays_and_permuted_labels_do_not():
    paid = selection.repeat_splits(make_labelled(), Settings(), 20, 0)
    assert selection.summarize_splits(paid["S_abs: clean - messy"]).low > 0.1
    assert paid["share_of_oracle"].mean() > 0.9
    null = selection.repeat_splits(make_labelled(), Settings(), 40, 0, permute=True)
    assert abs(null["share_of_oracle"].mean()) < 0.15
    curve = selection.measure_top_k(make_labelled(), Settings(), (5, 20, 40), 10, 0)
    assert (curve["predicted"] <= curve["oracle"] + 1e-12).all()


def test_clean_score_formulas():
    frame = pd.DataFrame({"S_abs": [0.1, 0.5, 0.9], "C": [5.0, 1.0, 3.0], "E": [1.0, 2.0, 4.0]})
    S, C, E = frame.to_numpy().T

    def z(x):
        return (x - x.mean()) / x.std()

    over_effect = labels.compute_clean_score(frame)
    of_ratio = labels.compute_clean_score(frame, "log_of_ratio")
    assert over_effect == pytest.approx(z(S) - z(np.log1p(C) / E))
    assert of_ratio == pytest.approx(z(S) - z(np.log1p(C / E)))


def test_a_payoff_is_strong_on_both_axes_only():
    def compare(stable, spread):
        rows = [("S_abs", stable), ("C_per_E", spread)]
        return pd.DataFrame(
            [{"metric": m, "groups": "clean - messy", "difference": d} for m, d in rows]
        )

    assert selection.grade_payoff(compare(0.1, -1)) == "strong"
    assert selection.grade_payoff(compare(0.1, 1)) == "partial"
    assert selection.grade_payoff(compare(-0.1, 1)) == "weak"


def test_a_signature_is_more_than_the_luck_of_the_features():
    def led_by(planted):
        rows = []
        for i, name in enumerate(planted):
            frame, rng = make_frame(200), np.random.default_rng(20 + i)
            frame["C"] = rng.standard_normal(200) + (
                3 * frame[name] / frame[name].std() if name else 0
            )
            leaders = prediction.find_leaders(frame, "C", seed=i)
            rows.append(leaders.assign(model="m", sae=f"d{i}", seed=0))
        return findings.measure_signature({"leaders": pd.concat(rows)})

    noise = led_by([None] * 4)
    # pure noise names another leader in every SAE, but in every resample as well
    assert noise.value < 0.35
    planted = led_by(["crowding", "encoder_norm", "crowding", "encoder_norm"])
    assert planted.value == pytest.approx(4 / 6, abs=0.05)
    assert planted.low > 0
    assert led_by(["crowding"] * 4).value == pytest.approx(0, abs=0.02)


def test_clean_scores_of_the_replication_know_nothing_of_held_out_labels():
    frame = make_labelled()
    rule = replace(Settings(), protocol="replication")
    groups = selection.split_features(frame, rule, seed=0)
    changed = frame.copy()
    changed.loc[changed.index[groups.held_out], ["S_abs", "C", "E"]] *= 7
    again = selection.split_features(changed, rule, seed=0)
    assert np.array_equal(groups.clean, again.clean)
    assert np.array_equal(groups.candidates, again.candidates)


def test_the_ladder_of_widths_has_no_vote_outside_the_comparison_of_widths():
    rows = pd.DataFrame(
        {"model": "gpt2-small", "sae": ["primary", "width_768", "wide"], "rho": [0.2, 9.0, 0.4]}
    )
    assert tables.summarize_saes(rows, "rho").value == pytest.approx(0.3)
    assert tables.is_wide("width_98304", "width_24576")
    assert not tables.is_wide("width_24576")
