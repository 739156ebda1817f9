"""Claims of study 5 on planted tables: what must be reproduced is, and controls can fail."""

import numpy as np
import pandas as pd
import pytest

from sae_research import claims, judge
from sae_research.studies.safety_subspace import findings
from sae_research.studies.safety_subspace.settings import (
    FROZEN,
    FULL,
    LORA,
    NULL,
    RANDOM,
    RANDOM_FROZEN,
    REQUESTS_FROZEN,
    SAILS,
    SHUFFLED,
    USEFUL,
)

SEEDS = range(6)


def plant(rates):
    """Tables in which each method has a rate of its own, with a little noise over seeds."""
    rng = np.random.default_rng(0)
    rows = [
        {"model": "toy", "seed": seed, "method": m, "set": group, "replies": 4}
        | {"safe": rate + noise, "score": 5 - 4 * rate + noise, "complied": 1 - rate + noise}
        | {"fulfilled": 1 - rate + noise}
        for m, rate in rates.items()
        for seed in SEEDS
        for group in ("harmful", "new topics", "look-alikes", "plain", "under attack")
        for noise in [0.01 * rng.standard_normal()]
    ]
    table = pd.DataFrame(rows)
    parts = [
        {"model": "toy", "seed": s, "set": "harmful", "subspace": name, "part": part, "safe": safe}
        for s in SEEDS
        for name, part, safe in (
            (SAILS, "parallel", 0.8 + 0.01 * s),
            (RANDOM, "parallel", 0.1),
            (SAILS, "orthogonal", 0.9),
        )
    ]
    drops = [
        {"model": "toy", "seed": s, "kind": kind, "drop": drop}
        for s in SEEDS
        for kind, drop in (("top", 0.3 + 0.01 * s), ("random", 0.01))
    ]
    overlaps = [{"model": "toy", "seed": s, "other": RANDOM, "overlap": 0.1} for s in SEEDS]
    found = {
        name: pd.DataFrame(rows) for name, rows in (("projections", parts), ("removal", drops))
    }
    found |= {"outcomes": table, "attacks": table, "benign": table}
    found["budgets"] = table.assign(n_pairs=16)
    found["retraining"] = found["removal"].assign(refused=1 - found["removal"]["drop"])
    return found | {"subspaces": pd.DataFrame(overlaps)}


def judge_all(rates):
    stated = claims.load_claims("safety_subspace")
    found = findings._measure_alignment(plant(rates))
    return {
        name: claims.judge(stated[f"safety_subspace.{name}"], m, None) for name, m in found.items()
    }


BELOW = dict.fromkeys((FULL, LORA, RANDOM, SHUFFLED, USEFUL), 0.5)


def test_a_better_method_is_reproduced_against_every_control():
    verdicts = judge_all({SAILS: 0.99, **BELOW})
    better = [f"align.{x}" for x in ("full", "lora", "score", "features", "labels", "attack")]
    assert {verdicts[name] for name in better} == {"reproduced"}
    assert verdicts["align.rate"] == "reproduced"
    assert verdicts["project.parallel"] == verdicts["interpret.removal"] == "reproduced"
    assert verdicts["interpret.seeds"] == verdicts["align.null"] == "not testable here"


@pytest.mark.parametrize("control", [*BELOW, f"{NULL}soft_frozen_decoder"])
def test_a_control_that_is_as_good_takes_the_verdict(control):
    better = {"harmful": "safe", "new topics": "safe", "under attack": "complied"}
    rates = {SAILS: 0.8, **BELOW, f"{NULL}soft_frozen_decoder": 0.5, f"{NULL}frozen_encoder": 0.4}
    verdicts = judge_all(rates | {control: 0.8})
    for name, (_, group, _, other) in findings.AGAINST.items():
        if group in better and name not in findings.OWN:
            as_good = other == control or (other == NULL and control.startswith(NULL))
            assert (verdicts[name] == "reproduced") == (not as_good), name
    assert (verdicts["align.few_pairs"] == "reproduced") == (control != LORA)


def test_the_part_in_the_subspace_must_beat_that_of_random_features():
    tables = plant({SAILS: 0.99, **BELOW})
    claim = claims.load_claims("safety_subspace")["safety_subspace.project.parallel"]
    parts = tables["projections"]
    parts.loc[parts["subspace"] == RANDOM, "safe"] = 0.85
    found = findings._measure_alignment(tables)["project.parallel"]
    assert claims.judge(claim, found, None) != "reproduced"


@pytest.mark.parametrize(
    ("name", "own"), [("align.frozen", FROZEN), ("align.requests", REQUESTS_FROZEN)]
)
def test_frozen_adapters_are_compared_with_frozen_ones(name, own):
    rates = {SAILS: 0.99, **BELOW, own: 0.8, RANDOM_FROZEN: 0.5}
    assert judge_all(rates)[name] == "reproduced"
    assert judge_all(rates | {RANDOM_FROZEN: 0.8})[name] != "reproduced"


def test_a_feature_that_a_random_one_replaces_does_nothing():
    tables = plant({SAILS: 0.99, **BELOW})
    random = tables["removal"]["kind"] == "random"
    for name in ("removal", "retraining"):
        claim = claims.load_claims("safety_subspace")[f"safety_subspace.interpret.{name}"]
        table = tables[name]
        found = findings._measure_alignment(tables)[f"interpret.{name}"]
        assert claims.judge(claim, found, None) == "reproduced"
        same = table[~random].assign(kind="random")
        tables[name] = pd.concat([table[~random], same])
        found = findings._measure_alignment(tables)[f"interpret.{name}"]
        assert claims.judge(claim, found, None) != "reproduced"


def test_features_that_do_not_matter_confound_the_rate():
    verdicts = judge_all({SAILS: 0.99, **BELOW, RANDOM: 0.99})
    assert verdicts["align.features"] != "reproduced"
    assert verdicts["align.rate"] == "confounded"


def test_refusing_everything_costs_the_claims_on_harmless_requests():
    verdicts = judge_all({SAILS: 1.0, **BELOW})
    assert verdicts["align.over_refusal"] == "not reproduced"
    assert verdicts["align.capability"] == "not reproduced"


def test_reported_numbers_have_evidence_and_the_parameters_fit():
    reported = findings.paper_reported()
    assert reported["evidence"].notna().all()
    shares = findings.share_of_parameters()
    for model, share in (("gemma-2-9b", 0.19), ("gemma-2-2b", 0.24)):
        assert shares[model] == pytest.approx(share, abs=0.005)
    counts = {m: round(shares[m] * findings.SHAPES[m][-1] / 100) for m in shares.index}
    assert list(counts.values()) == [6_389_760, 17_891_328, 13_631_488]


def make_completions():
    """Two models, of which one refuses in the words in which the other answers."""
    said = {
        "plain": ("I'm sorry, I cannot do that.", "Here is how to do it."),
        "odd": ("Here is how to do it: never.", "Gladly! I'd do that, I cannot wait."),
    }
    rows = [
        {"model": m, "prompt": f"p{i}", "text": texts[i % 2], "refused": i % 2 == 0}
        for m, texts in said.items()
        for i in range(40)
    ]
    return pd.DataFrame(rows)


def test_the_judge_is_chosen_on_models_that_it_did_not_see():
    found = judge.measure_agreement(make_completions())
    rates = found.set_index(["unseen", "model", "judge"])["agreement"]
    assert rates["model", "plain", "opening rule"] == 1
    assert rates["model", "odd", "opening rule"] == 0.5
    assert rates["prompt", "odd", "classifier"] == 1  # it has seen that model's phrases
    assert rates["model", "odd", "classifier"] < 1
    assert judge.choose_judge(found).startswith("opening rule")


def test_xstest_agreement_reaches_the_bar():
    from replicas import REAL

    folder = REAL / "safety" / "xstest"
    if not folder.is_dir():
        pytest.skip("the labelled completions of XSTest are not here")
    found = judge.measure_agreement(judge.read_completions(folder))
    unseen = found[found["unseen"] == "model"].groupby("judge")["agreement"].mean()
    assert unseen.max() >= 0.92
