"""What the claims of this study measure, from the tables of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats, store
from sae_research.claims import Measurement
from sae_research.stats import Interval

if TYPE_CHECKING:
    import pandas as pd

    Tables = dict[str, pd.DataFrame]


def tables(folder: Path) -> "Tables":
    """The tables that the run wrote."""
    import pandas as pd

    return {path.stem: pd.read_csv(path, float_precision="round_trip") for path in sorted(folder.glob("*.csv"))}


def facts(folder: Path) -> dict:
    """Single numbers and names of the run."""
    return dict(store.read_json(folder / "facts.json"))


def interval(rows: "pd.DataFrame") -> Interval:
    """The only row as an interval."""
    (row,) = rows.to_dict("records")
    return Interval(row["value"], row["low"], row["high"], int(row["n"]))


def of(t: "Tables", method: str, metric: str) -> Interval:
    """WD or rho_dev of a method, interval over clusters of questions and seeds."""
    return interval(t["intervals"].query("method == @method and metric == @metric"))


def less(t: "Tables", first: str, second: str, metric: str = "wd") -> Interval:
    """First less second method, or their ratio, on the same questions."""
    return interval(t["paired"].query("first == @first and second == @second and metric == @metric"))


def over_seeds(values: "pd.Series") -> Interval:
    """Mean with Student's interval over seeds."""
    return stats.mean_interval(values.to_numpy())


def column(t: "Tables", method: str, name: str) -> "pd.Series":
    """One score of a method by seed."""
    return t["scores"].query("method == @method").set_index("seed")[name]


def worst_group(t: "Tables", best: str) -> Interval:
    """WD of the worst group, less that of the worst group without steering."""
    return over_seeds(column(t, best, "worst") - column(t, "no steering", "worst").iloc[0])


def negative_control(t: "Tables", best: str) -> Interval:
    """Deviations predicted for the attribute that moves nothing, relative to the mean of the others."""
    rows = t["attributes"].query("method == @best")
    table = rows.pivot_table(index="seed", columns="attribute", values="predicted", sort=False)
    silent = rows.groupby("attribute", sort=False)["true"].mean().idxmin()
    return over_seeds(table[silent] / table.drop(columns=silent).mean(axis=1))


def composition(t: "Tables") -> Interval:
    """WD of the composed shift less that of the margin that is better on average; mean over pairs and seeds."""
    rows = t["composition"]
    means = rows.groupby(["pair", "seed"])[["margin 1", "margin 2"]].transform("mean")
    best = np.where(means["margin 1"] <= means["margin 2"], rows["margin 1"], rows["margin 2"])
    gap = (rows["composed"] - best).groupby(rows["cluster"]).mean()
    return stats.cluster_bootstrap(gap, seed=0, draws=2000)


def new_groups(t: "Tables", first: tuple[str, int], second: tuple[str, int]) -> Interval:
    """WD to groups that training left out, first less second way; interval over groups."""
    table = t["new_groups"].pivot_table(index="group", columns=["way", "shots"], values="wd", sort=False)
    return stats.cluster_bootstrap((table[first] - table[second]).to_numpy(), seed=0, draws=2000)


def axis(t: "Tables", number: int) -> Interval:
    """Canonical correlation of the groups' scores with the planted traits."""
    return over_seeds(t["axes"].query("axis == @number").set_index("seed")["correlation"])


def deepest(t: "Tables") -> "pd.Series":
    """The deepest layer of the sweep, with the names of its methods."""
    return t["layers"].sort_values("blocks").iloc[-1]


def coordinates(t: "Tables", best: str, dense: str) -> float:
    """Coordinates that the shift moves, less those that a dense vector does."""
    moved = [column(t, name, "coordinates").mean() for name in (best, dense)]
    return float(moved[0] - moved[1])


def measurements(t: "Tables", about: dict) -> dict[str, Measurement | None]:
    """A measurement for every claim of the study; None where the run lacks what it needs."""
    best, dense, free = about["headline"], "dense vector, low rank", "dense vector, free"
    shuffled, late = "shuffled groups", deepest(t)
    planted = not t["axes"].empty
    found: dict[str, Interval | float | None] = {
        "shift.noop": about["noop"],
        "shift.fit": less(t, best, "no steering", "wd_ratio"),
        "shift.harm": over_seeds(column(t, best, "cost")),
        "shift.below_population": less(t, best, "human overall marginal"),
        "shift.worst_group": worst_group(t, best),
        "shift.sparse": float(column(t, best, "moved").mean()),
        "shift.sensitivity_stretch": of(t, best, "rho_dev"),
        "shift.slope": over_seeds(column(t, best, "slope")),
        "shift.identification": over_seeds(column(t, best, "identification")),
        "shift.negative_control": negative_control(t, best) if planted else None,
        "shift.second_axis": axis(t, 2) if planted else None,
        "rivals.prompt": less(t, best, about["prompt"]),
        "rivals.lora": less(t, best, "LoRA, one a group") if _has(t, "LoRA, one a group") else None,
        "h1.depth": less(t, best, late["all"], "rho_dev"),
        "h1.letters": of(t, late["all"], "rho_dev"),
        "h1.divergence": over_seeds(column(t, late["all"], "kl") - column(t, "no steering", "kl").iloc[0]),
        "h2.last_token": of(t, late["answer"], "rho_dev"),
        "h3.dense": less(t, best, free, "wd_ratio"),
        "h3.coordinates": coordinates(t, best, free),
        "h3.cost": over_seeds(column(t, "SAE multiplicative", "cost") - column(t, "SAE additive", "cost")),
        "h4.composition": composition(t) if not t["composition"].empty else None,
        "h4.correlated": None,
        "h5.shuffled": of(t, shuffled, "rho_dev"),
        "new_groups.few": new_groups(t, ("scores, U frozen", 10), ("population", 0)),
        "new_groups.vector": new_groups(t, ("scores, U frozen", 10), ("whole vector", 10)),
        "real.gemma": less(t, best, "no steering", "wd_ratio") if about["subject"] == "gemma-2-2b" else None,
    }
    for kind in ("multiplicative", "gated", "additive"):
        for short, other in (("random", f"random {kind}"), ("pca", f"PCA {kind}"), ("dense", dense)):
            found[f"space.{kind}_{short}"] = less(t, f"SAE {kind}", other)
    judged = {name: _measured(m) for name, m in found.items()}
    judged["shift.sensitivity"] = Measurement.of(of(t, best, "rho_dev"), of(t, shuffled, "rho_dev"))
    return {f"opinion_qa.{name}": m for name, m in judged.items()}


def _has(t: "Tables", method: str) -> bool:
    return bool((t["scores"]["method"] == method).any())


def _measured(found: Interval | float | None) -> Measurement | None:
    if found is None or isinstance(found, Interval):
        return None if found is None else Measurement.of(found)
    return Measurement(found)
