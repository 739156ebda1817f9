"""Claims of study 3 on planted tables: each control fires where it must."""

import pandas as pd
import pytest

from sae_research import claims
from sae_research.studies.specialized_saes import findings

SELECTORS = ("general", "bm25", "dense", "bm25 tracin", "dense tracin", "random", "seed only")
SELECTORS += ("oracle", "none")


NULLS = ("null: frozen_decoder", "null: frozen_encoder")


def make_tables(loss=None, f1=None, shift=None):
    """Three seeds with small noise; `loss`, `f1` and `shift` plant numbers by arm or method."""
    loss, f1, shift = loss or {}, {"oracle": 0.4} | (f1 or {}), {"Oracle": 0.6} | (shift or {})
    losses, summary, recall, shifts, circuits, synthetic = [], [], [], [], [], []
    for seed in range(3):
        noise = 0.001 * seed
        unit = {"model": "m", "seed": seed}
        arms = [(s, "fine-tune", "plain") for s in SELECTORS]
        arms += [("dense", way, "plain") for way in ("residual", "direct", *NULLS)]
        arms += [("random", "direct", "plain")]
        arms += [("dense", "fine-tune", tilt) for tilt in ("500", "ess 0.9")]
        for kind in ("topk", "relu"):
            for i, (selector, way, tilt) in enumerate(arms):
                name = tilt if tilt != "plain" else way if way != "fine-tune" else selector
                name = "random direct" if (selector, way) == ("random", "direct") else name
                arm = {**unit, "selector": selector, "way": way, "kind": kind, "tilt": tilt}
                arm |= {"sparsity": 10, "main": True}
                for text in ("domain", "second register", "general"):
                    ce = 1 + loss.get(name, 0) + noise * (1 + i % 3)
                    losses.append({**arm, "text": text, "ce": ce, "l0": 10 + i})
                readings = {c: 1 + f1.get(name, 0) + noise * i for c in findings.READINGS.values()}
                summary.append({**arm, **readings})
                value = 0.5 + f1.get(name, 0) + noise * (1 + i % 3)
                recall.append({**arm, "band": findings.TAIL, "f1": value})
        methods = ("Original", "Oracle", "Random ablation", "Comp. GSAE SHIFT", "Comp. SSAE SHIFT")
        methods += ("GSAE SHIFT", "SSAE SHIFT", "GSAE SHIFT+retrain", "SSAE SHIFT+retrain")
        for i, method in enumerate(methods):
            worst = 0.3 + shift.get(method, 0) + noise * (i % 3)
            shifts.append({**unit, "method": method, "worst": worst})
        circuits += [{**unit, "sae": sae, "n_nodes": 20 + seed} for sae in ("GSAE", "SSAE")]
        for i, sae in enumerate(("general", "continued", "1", "0.95", "1e9")):
            for band in ("head", "tail"):
                cosine = 0.5 + noise * (i % 2)
                synthetic.append({"seed": seed, "sae": sae, "band": band, "cosine": cosine})
    names = ("losses", "summary", "recall", "shift", "circuit", "synthetic")
    rows = (losses, summary, recall, shifts, circuits, synthetic)
    return {name: pd.DataFrame(row) for name, row in zip(names, rows, strict=True)}


def judge(tables, name):
    found = findings.measure_claims(tables)[f"specialized_saes.{name}"]
    claim = claims.load_claims("specialized_saes")[f"specialized_saes.{name}"]
    return claims.judge(claim, found)


def test_a_null_that_finds_rare_concepts_as_well_takes_the_verdict():
    worse = dict.fromkeys(NULLS, -0.3)
    assert judge(make_tables(f1=worse), "selectors.nulls") == "reproduced"
    assert judge(make_tables(f1=worse | {NULLS[1]: 0.0}), "selectors.nulls") != "reproduced"


def test_found_means_found_in_most_seeds():
    tables = make_tables()
    recall = tables["recall"].assign(concept=3)
    recall["found"] = (recall["selector"] == "dense") & (recall["seed"] > 0)
    recall.loc[recall["selector"] == "bm25", "found"] = recall["seed"] == 0
    found = findings.found_in_most_seeds({"recall": recall})[findings.TAIL]
    assert found["dense", "fine-tune", "plain"] == 1
    assert found["bm25", "fine-tune", "plain"] == 0


def test_every_claim_is_measured_and_every_measurement_claimed():
    assert set(findings.measure_claims(make_tables())) == set(
        claims.load_claims("specialized_saes")
    )


def test_text_of_the_domain_that_is_no_better_than_random_text_is_confounded():
    planted = {"dense": -0.3, "bm25": -0.3}
    assert judge(make_tables(planted), "selectors.domain") == claims.REPRODUCED
    assert judge(make_tables(planted | {"random": -0.3}), "selectors.domain") == claims.CONFOUNDED
    rare = {"dense": 0.2}
    assert judge(make_tables(f1=rare), "selectors.rare_concepts") == claims.REPRODUCED
    assert judge(make_tables(f1=rare | {"random": 0.2}), "selectors.rare_concepts") == (
        claims.CONFOUNDED
    )


def test_a_small_sae_that_is_as_poor_after_random_text_says_nothing_of_the_domain():
    planted = {"direct": 0.5}
    assert judge(make_tables(planted), "ways.direct") == claims.REPRODUCED
    assert judge(make_tables(planted | {"random direct": 0.5}), "ways.direct") != claims.REPRODUCED


def test_random_ablation_that_repairs_the_probe_as_well_confounds_shift():
    planted = {"SSAE SHIFT": 0.4, "GSAE SHIFT": 0.2}
    tables = make_tables(shift=planted)
    assert judge(tables, "shift.ablation") == claims.REPRODUCED
    assert judge(tables, "shift.worst_group") == claims.REPRODUCED
    tables = make_tables(shift=planted | {"Random ablation": 0.4})
    assert judge(tables, "shift.ablation") == claims.CONFOUNDED
    assert judge(make_tables(shift={"SSAE SHIFT": -0.1}), "shift.worst_group") == (
        claims.NOT_REPRODUCED
    )


def test_where_general_dictionaries_repair_the_probe_nothing_can_be_said():
    tables = make_tables(shift={"GSAE SHIFT": 0.55, "SSAE SHIFT": 0.6})
    assert judge(tables, "shift.worst_group") == claims.NOT_TESTABLE


def test_where_labelled_text_teaches_no_rare_concept_nothing_can_be_said():
    tables = make_tables(f1={"dense": 0.2, "oracle": 0.0})
    assert judge(tables, "selectors.rare_concepts") == claims.NOT_TESTABLE


def test_a_reading_that_the_untrained_start_shows_too_is_no_sign_of_the_tilt():
    for column in ("f1", "activation"):
        own = make_tables(f1={"500": 0.3})
        assert judge(own, f"term.{column}_l0") == claims.REPRODUCED
        start = make_tables(f1={"500": 0.3, "none": 0.3})
        assert judge(start, f"term.{column}_l0") == claims.CONFOUNDED


def test_a_tilt_is_judged_in_both_directions():
    assert judge(make_tables(f1={"500": 0.2}), "term.rare_concepts") == claims.REPRODUCED
    assert judge(make_tables(f1={"500": -0.2}), "term.rare_concepts") == claims.NOT_REPRODUCED
    assert judge(make_tables({"500": 0.5}), "term.loss") == claims.NOT_REPRODUCED


def test_a_proxy_that_follows_the_truth_correlates_with_it():
    planted = {name: 0.05 * i for i, name in enumerate((*SELECTORS, "residual", "direct", "500"))}
    proxies = findings.measure_proxies(make_tables(f1=planted))
    assert proxies.rho.min() > 0.9
    assert set(proxies.reading) == set(findings.READINGS)


def test_the_summary_names_every_verdict():
    tables = make_tables()
    verdicts = {name: "direction only" for name in findings.measure_claims(tables)}
    text = findings.summarize(tables, verdicts)
    assert text.count("**direction only**") == 18
    with pytest.raises(KeyError):
        findings.summarize(tables, {})
