"""Study 2: every claim with a control holds on a planted table, and falls where its control wins.

All numbers of a planted table differ, so that a wrong label, baseline or arm shows in the value.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from side_effects_toys import make_frame

from sae_research import claims
from sae_research.studies.side_effects import analysis, findings, tables
from sae_research.studies.side_effects.prediction import FULL_SET
from sae_research.studies.side_effects.settings import Settings

FAMILIES = {"world-text": ("b_topk", "b_relu"), "world-survey": ("a_topk", "a_jumprelu")}
WIDE = [("world-text", "b_topk_wide", 0), ("world-survey", "a_topk_wide", 0)]
SAES = [(m, sae, 0) for m, names in FAMILIES.items() for sae in names] + WIDE
SAES += [("world-text", "b_topk", 1), ("world-survey", "a_topk", 1)]
"""Model, SAE and seed: the main SAE of each model has two seeds."""
LADDER = [("gpt2-small", f"width_{768 * 2**i}", 0) for i in range(3)]
"""SAEs of the ladder of widths, which have no vote; whatever is planted, they say the opposite."""
NULLS = [(m, f"{sae}_frozen_decoder", 0) for m, names in FAMILIES.items() for sae in names]
"""Null dictionaries, which have no vote either: what is planted for them alone ends in "null"."""
LABELS = ["C", "S_abs", "C_per_E"]
KEYS = {
    "gains": [["freq_only", "activation_magnitude_only"], LABELS],
    "gains_random": [["freq_only", "activation_magnitude_only"], ["C@random", "S_abs@random"]],
    "random": [["C", "S_abs", "S_loo"], [False, True], ["SAE", "random"]],
    "sensitivity": [["direction", "dose"], ["SAE", "random", "4"], ["C", "C_per_E"]],
    "confirmation": [LABELS, ["clean - messy", "clean - random"], ["SAE", "random"]],
    "own_contexts": [["C", "S_abs"], [False, True], ["SAE", "random"]],
    "seed_stability": [LABELS, ["SAE", "random"]],
}
"""Tables with one row per SAE for each combination of these values."""
COLUMNS = {
    "gains": ["baseline", "target", "gain"],
    "gains_random": ["baseline", "target", "gain"],
    "random": ["target", "residualised", "direction", "rho"],
    "sensitivity": ["kind", "value", "label", "rho"],
    "confirmation": ["metric", "groups", "direction", "standardised"],
    "own_contexts": ["target", "residualised", "direction", "rho"],
    "seed_stability": ["label", "direction", "rho"],
}


def plant(levels: dict[tuple, float]) -> tables.Tables:
    """The tables of a run with these levels, and another level for everything else.

    SAEs differ by more than the levels to compare, and rows of each level have an order of their
    own. A key that ends in True or False holds for wide SAEs or the others only.
    """
    draws = np.random.default_rng(0)
    made = {"facts": pd.DataFrame(SAES, columns=[*tables.SAE, "seed"])}
    names = dict.fromkeys(sae.removesuffix("_wide") for _, sae, _ in SAES)
    common = dict(zip(names, (-0.2, -0.1, 0.1, 0.2), strict=True))
    for table, values in KEYS.items():
        rows = []
        for key in product(*values):
            usual, noise = draws.uniform(0.3, 0.8, 2), draws.uniform(-0.01, 0.01, len(SAES))
            noise -= noise.mean()
            for i in draws.permutation(len(SAES)):
                model, sae, seed = SAES[i]
                wide = tables.is_wide(sae)
                level = levels.get((table, *key, wide), levels.get((table, *key), usual[int(wide)]))
                level += common[sae.removesuffix("_wide")] + noise[i]
                rows.append((model, sae, seed, *key, level))
            rows += [(*where, *key, -9 * levels.get((table, *key), 1)) for where in LADDER]
            for i, (model, sae, seed) in enumerate(NULLS):
                level = levels.get((table, *key), usual[0] if table == "random" else 1)
                if table != "random":
                    level *= -9
                level = levels.get((table, *key, "null"), level)
                level += common[sae.removesuffix("_frozen_decoder")] + noise[i]
                rows.append((model, sae, seed, *key, level))
        made[table] = pd.DataFrame(rows, columns=[*tables.SAE, "seed", *COLUMNS[table]])
    made["random"] = _add_differences(made["random"])
    made["width_effects"] = tables._measure_width_effects(made)
    made["sensitivity"]["rho"] *= np.resize([1, -1], len(made["sensitivity"]))
    return made


def _add_differences(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["target", "residualised", *tables.SAE, "seed"]
    own, control = (tables.select(rows, direction=d).set_index(keys) for d in ("SAE", "random"))
    gap = (own[["rho"]] - control[["rho"]]).assign(direction="difference").reset_index()
    rows = pd.concat([rows, gap], ignore_index=True)
    return rows.assign(low=rows["rho"] - 0.04, high=rows["rho"] + 0.04, n=60)


def plant_widths(wide: list[float], base: list[float]) -> tables.Tables:
    """Payoffs over splits in wide SAEs and the others; permuted labels have those of the others."""
    rows, scores = [], []
    for model, sae, seed in SAES:
        broad = tables.is_wide(sae)
        score = {"pooled": 0.5, "low": 0.4, "high": 0.6, "residualised": False, "set": FULL_SET}
        where = {"model": model, "sae": sae, "seed": seed}
        scores += [where | score | {"target": label} for label in LABELS]
        for labels, first in (("real", broad), ("permuted", not broad)):
            for pay in wide if first else base:
                paid = {"S_abs: clean - messy": pay, "C_per_E: clean - messy": -pay}
                rows.append(where | {"labels": labels} | paid)
    made = {"facts": pd.DataFrame(SAES, columns=[*tables.SAE, "seed"])}
    made |= {"splits": pd.DataFrame(rows), "sets": pd.DataFrame(scores)}
    return {"widths": tables._compare_widths(made)}


def plant_leaders(between: bool, within: bool) -> tables.Tables:
    """The best predictor differs between SAEs, or between resamples of one SAE, or both alike.

    Another seed and a ladder of widths, which have no vote, say the opposite.
    """
    draws = np.random.default_rng(0)
    names = ["crowding", "encoder_norm", "kurtosis", "logit_l2", "final_mean", "token_std"]
    shared = draws.choice(names, 200)
    rows = []
    for i, (model, sae, seed) in enumerate(SAES):
        if seed:
            continue
        fixed, drawn = np.full(200, names[i]), draws.choice(names, 200)
        led = (drawn if between else shared) if within else fixed
        led = np.where(draws.random(200) < 0.1, names[0], led)
        where = {
            (model, sae, 1): fixed if within else drawn,
            (f"{model} {i}", LADDER[0][1], 0): fixed if within else shared,
            (model, sae, 0): led,
        }
        rows += [(*at, k, name) for at, column in where.items() for k, name in enumerate(column)]
    return {"leaders": pd.DataFrame(rows, columns=[*tables.SAE, "seed", "draw", "predictor"])}


def follow(x: np.ndarray, strength: float, draws: np.random.Generator) -> np.ndarray:
    """Numbers that correlate with `x` at this strength."""
    x = (x - x.mean()) / x.std()
    return strength * x + (1 - strength**2) ** 0.5 * draws.standard_normal(len(x))


SETTINGS = replace(Settings(), n_bootstrap=30)


def plant_doses(lowest: float, once: float, twice: float, highest: float) -> tables.Tables:
    """Crowding follows the count per effect with these strengths; rows as the study makes them."""
    rows = []
    for i, (model, sae, seed) in enumerate(SAES[:4]):
        frame, draws = make_frame(300, seed=i), np.random.default_rng(10 + i)
        strengths = {"C_per_E@0.5": lowest, "C_per_E": once, "C_per_E@2": twice}
        for name, strength in (strengths | {"C_per_E@4": highest}).items():
            frame[name] = follow(frame["crowding"].to_numpy(), strength, draws)
        found = analysis._compare_doses(frame, SETTINGS, seed)
        rows.append(found | {"model": model, "sae": sae, "seed": seed})
    return {"dose_change": pd.DataFrame(rows)}


def plant_forecasts(label: str, forecast: float, full_set: float, others: float) -> tables.Tables:
    """How well the Jacobian forecast, the full set and other forecasts follow a label.

    With the other label, forecast and full set trade places.
    """
    made = []
    for i, (model, sae, seed) in enumerate(SAES[:4]):
        frame, draws = make_frame(200, seed=i), np.random.default_rng(10 + i)
        for target in ("C_per_E", *LABELS[:2]):
            frame[target] = draws.standard_normal(len(frame))
        for target, names in analysis.FORECASTERS.items():
            y = frame[target].to_numpy()
            for name in names:
                frame[name] = follow(y, others, draws)
            own = forecast if target == label else full_set
            frame[f"{target}^jacobian"] = follow(y, own, draws)
        (other,) = {"C", "S_abs"} - {label}
        known = {"crowding": (label, full_set), "kurtosis": (other, forecast)}
        for name, (target, strength) in known.items():
            frame[name] = follow(frame[target].to_numpy(), strength, draws)
        table = analysis.score_forecasts(frame, SETTINGS.n_bootstrap, seed)
        made.append(table.assign(model=model, sae=sae, seed=seed))
    return {"forecasts": pd.concat(made, ignore_index=True)}


# the cases


PAIRED = {
    f"predict.{name}_over_{short}": (
        ("gains", baseline, label),
        ("gains_random", baseline, f"{label}@random"),
    )
    for name, label in (("spread", "C"), ("stability", "S_abs"))
    for short, baseline in (("frequency", "freq_only"), ("magnitude", "activation_magnitude_only"))
}
PAIRED |= {
    f"predict.{name}_residualised": tuple(("random", label, True, d) for d in ("SAE", "random"))
    for name, label in (("spread", "C"), ("stability", "S_abs"))
}
PAIRED["width.signal"] = tuple(("random", "C", False, d, True) for d in ("SAE", "random"))
PAIRED["controls.own_contexts"] = tuple(
    (table, "C", False, "random") for table in ("own_contexts", "random")
)
PAIRED["controls.random_directions"] = tuple(
    ("sensitivity", "direction", d, "C") for d in ("SAE", "random")
)
"""Claims that one level lies above another: own and control."""
for _name, _label in (("stability", "S_abs"), ("spread", "C_per_E")):
    PAIRED[f"screening.{_name}"] = tuple(
        ("confirmation", _label, "clean - messy", d) for d in ("SAE", "random")
    )
    PAIRED[f"seeds.{_name}"] = tuple(("seed_stability", _label, d) for d in ("SAE", "random"))
for _name, _label in (("stability", "S_abs"), ("spread", "C")):
    PAIRED[f"nulls.{_name}"] = tuple(
        ("random", _label, False, "SAE", *of) for of in ((), ("null",))
    )
BELOW = {"screening.spread", "seeds.spread"}
"""Claims that the level lies below the control."""
WIDTH_LOSS = tuple(("random", "C", False, "SAE", wide) for wide in (True, False))


def make_cases() -> dict[str, tuple[dict, list[dict]]]:
    """Per claim: what to plant so that it holds, and so that its control does as well or better."""
    cases = {}
    for name, (own, control) in PAIRED.items():
        sign = -1 if name in BELOW else 1
        holds, *falls = ({own: sign * 0.5, control: sign * level} for level in (0.4, 0.5, 0.7))
        cases[name] = (holds, falls)
    wide, base = WIDTH_LOSS
    cases["width.loss"] = ({wide: 0.48, base: 0.5}, [{wide: 0.3, base: 0.5}])
    return cases


LEVELS = make_cases()
PLANTED = {
    "predict.signature": (plant_leaders, (True, False), [(True, True), (False, True)]),
    # 1 in 4 splits of the wide SAE has the wrong sign; then none, or twice as many in the base
    "width.payoff": (
        plant_widths,
        ([-0.2, 0.1, 0.2, 0.5], [0.9, 1.0, 1.0, 1.1]),
        [
            ([0.1, 0.2, 0.3], [0.9, 1.0, 1.1]),
            ([0.1] * 8 + [1.1, -0.1], [1.0] * 8 + [-0.1, -0.1]),
        ],
    ),
    # the doses between say the opposite
    "controls.dose": (
        plant_doses,
        (0.9, 0.1, 0.9, 0.1),
        [(0.6, 0.95, 0.1, 0.6), (0.3, 0.95, 0.1, 0.6)],
    ),
    **{
        f"forecast.{name}": (
            plant_forecasts,
            (label, 0.9, 0.4, 0.2),
            [(label, 0.7, 0.75, 1.0), (label, 0.4, 0.9, 1.0)],
        )
        for name, label in (("spread", "C"), ("stability", "S_abs"))
    },
}
CASES = {name: (plant, (holds,), [(f,) for f in falls]) for name, (holds, falls) in LEVELS.items()}
CASES |= PLANTED
DIRECTION_AT_BEST = {"width.payoff"}
"""Its rule reads no interval."""
STATED = claims.load_claims("side_effects")


def judge(name: str, planted: tables.Tables) -> tuple[str, claims.Measurement]:
    found = findings.MEASURES[name](planted)
    return claims.judge(STATED[f"side_effects.{name}"], found), found


@pytest.mark.parametrize("name", CASES)
def test_a_claim_is_reproduced_where_its_control_does_worse(name):
    make, holds, _ = CASES[name]
    verdict, found = judge(name, make(*holds))
    best = claims.DIRECTION if name in DIRECTION_AT_BEST else claims.REPRODUCED
    assert verdict == best, found


@pytest.mark.parametrize(
    ("name", "falls"), [(name, i) for name, (*_, falls) in CASES.items() for i in range(len(falls))]
)
def test_a_claim_falls_where_its_control_does_as_well_or_better(name, falls):
    make = CASES[name][0]
    verdict, found = judge(name, make(*CASES[name][2][falls]))
    best = claims.DIRECTION if name in DIRECTION_AT_BEST else claims.REPRODUCED
    assert verdict not in (best, claims.REPRODUCED), found


@pytest.mark.parametrize("name", PAIRED)
def test_the_difference_is_that_of_the_two_planted_levels(name):
    _, found = judge(name, plant(LEVELS[name][0]))
    gap = -0.1 if name in BELOW else 0.1
    assert (found.difference or found).value == pytest.approx(gap, abs=0.01)
    if found.control is not None:
        assert found.value - found.control.value == pytest.approx(gap, abs=0.01)


def test_the_loss_in_a_wide_sae_is_that_of_the_two_planted_levels():
    _, found = judge("width.loss", plant(LEVELS["width.loss"][0]))
    assert found.value == pytest.approx(0.02, abs=0.01)


def test_every_claim_with_a_control_has_a_planted_case():
    controlled = {n for n, c in STATED.items() if c.against or c.rule.control}
    assert controlled == {f"side_effects.{name}" for name in CASES}


@pytest.mark.parametrize(
    "name", [name for name in PAIRED if not name.startswith(("width", "nulls"))]
)
def test_a_run_with_one_sae_is_judged_and_proves_nothing(name):
    planted = plant(LEVELS[name][0])
    own = ["world-text", "b_topk"]
    alone = {
        key: t[(t[tables.SAE] == own).all(axis=1)] if "sae" in t else t
        for key, t in planted.items()
    }
    found = findings.MEASURES[name](alone)
    assert (found.low, found.n) == (found.value, 1)
    claim = STATED[f"side_effects.{name}"]
    p = claims.correct([claim], {claim.id: found})
    assert claims.judge(claim, found, p[claim.id]) == claims.DIRECTION
