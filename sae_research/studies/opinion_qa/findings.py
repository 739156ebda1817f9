"""What the claims of this study measure, from the tables of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_research import stats, store
from sae_research.claims import Measurement
from sae_research.stats import Interval
from sae_research.studies.opinion_qa import intervals

if TYPE_CHECKING:
    import pandas as pd

    Tables = dict[str, pd.DataFrame]


def tables(folder: Path) -> "Tables":
    """The tables that the run wrote."""
    import pandas as pd

    return {
        path.stem: pd.read_csv(path, float_precision="round_trip")
        for path in sorted(folder.glob("*.csv"))
    }


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
    return interval(
        t["paired"].query("first == @first and second == @second and metric == @metric")
    )


def over_seeds(values: "pd.Series") -> Interval:
    """Mean with Student's interval over seeds."""
    return stats.mean_interval(values.to_numpy())


def column(t: "Tables", method: str, name: str) -> "pd.Series":
    """One score of a method by seed."""
    return t["scores"].query("method == @method").set_index("seed")[name]


def composition(t: "Tables") -> Interval:
    """WD of the composed shift less that of the margin that is better on average; mean over pairs and seeds."""
    rows = t["composition"]
    means = rows.groupby(["pair", "seed"])[["margin 1", "margin 2"]].transform("mean")
    best = np.where(means["margin 1"] <= means["margin 2"], rows["margin 1"], rows["margin 2"])
    gap = (rows["composed"] - best).groupby(rows["cluster"]).mean()
    return stats.cluster_bootstrap(gap, seed=0, draws=2000)


def new_groups(t: "Tables", first: tuple[str, int], second: tuple[str, int]) -> Interval | None:
    """WD to groups that training left out, first less second way; over groups, clusters of questions and seeds."""
    table, keys = t["new_groups"], ["seed", "group", "cluster"]
    ways = [
        table.query("way == @way and shots == @shots").set_index(keys)["wd"]
        for way, shots in (first, second)
    ]
    if any(way.empty for way in ways):
        return None
    gap = (ways[0] - ways[1]).dropna().unstack("cluster").sort_index()
    shape = [gap.index.get_level_values(i).nunique() for i in (0, 1)]
    return intervals.over_groups_and_clusters(gap.to_numpy().reshape(*shape, -1), seed=0)


def axis(t: "Tables", number: int, which: str = "correlation") -> Interval:
    """Canonical correlation of the groups' scores with the planted traits, or what chance gives."""
    return over_seeds(t["axes"].query("axis == @number").set_index("seed")[which])


def deepest(t: "Tables") -> "pd.Series":
    """The deepest layer of the sweep, with the names of its methods."""
    return t["layers"].sort_values("blocks").iloc[-1]


def coordinates(t: "Tables", best: str, dense: str) -> float:
    """Coordinates that the shift moves, less those that a dense vector does."""
    moved = [column(t, name, "coordinates").mean() for name in (best, dense)]
    return float(moved[0] - moved[1])


def measurements(t: "Tables", about: dict) -> dict[str, Measurement | None]:
    """A measurement for every claim of the study; None where the run lacks what it needs."""
    best, dense, free, none = (
        about["headline"],
        "dense vector, low rank",
        "dense vector, free",
        "no steering",
    )
    shuffled, late, unkept = "shuffled groups", deepest(t), "nothing kept"
    planted, few = not t["axes"].empty, ("scores, U frozen", 10)
    found: dict[str, Interval | float | None] = {
        "shift.noop": about["noop"],
        "shift.fit": less(t, best, none, "wd_ratio"),
        "shift.harm": over_seeds(column(t, best, "cost")),
        "shift.term": over_seeds(column(t, unkept, "cost") - column(t, best, "cost")),
        "shift.below_population": less(t, best, "human overall marginal"),
        "shift.worst_group": over_seeds(
            column(t, best, "worst") - column(t, none, "worst").iloc[0]
        ),
        "shift.every_group": less(t, best, none, "worst_group"),
        "shift.sparse": float(column(t, "sparsest within one s.e.", "moved").mean()),
        "shift.sensitivity_stretch": of(t, best, "rho_dev"),
        "shift.slope": of(t, best, "slope"),
        "shift.identification": of(t, best, "identification"),
        "shift.negative_control": of(t, best, "quietest") if planted else None,
        "rivals.prompt": less(t, best, about["prompt"]),
        "rivals.means": less(t, best, "difference of means, calibrated"),
        "rivals.lora": less(t, best, "LoRA, one a group") if _has(t, "LoRA, one a group") else None,
        "space.tokens": less(t, best, "a vector a token") if _has(t, "a vector a token") else None,
        "space.raw": less(t, "SAE multiplicative", "raw coordinates multiplicative"),
        "h1.depth": less(t, best, late["all"], "rho_dev"),
        "h1.letters": of(t, late["all"], "rho_dev"),
        "h1.divergence": less(t, late["all"], none, "kl"),
        "h2.last_token": of(t, late["answer"], "rho_dev"),
        "h3.dense": less(t, best, free, "wd_ratio"),
        "h3.coordinates": coordinates(t, best, free),
        "h3.cost": over_seeds(
            column(t, "SAE multiplicative", "cost") - column(t, "SAE additive", "cost")
        ),
        "h4.composition": composition(t) if not t["composition"].empty else None,
        "h4.correlated": None,
        "h5.shuffled": of(t, shuffled, "rho_dev"),
        "new_groups.few": new_groups(t, few, ("population", 0)),
        "new_groups.vector": new_groups(t, few, ("whole vector", 10)),
        "real.gemma": less(t, best, none, "wd_ratio") if about["subject"] == "gemma-2-2b" else None,
    }
    for kind in ("multiplicative", "gated", "additive"):
        for short, other in (
            ("random", f"random {kind}"),
            ("pca", f"PCA {kind}"),
            ("dense", dense),
        ):
            found[f"space.{kind}_{short}"] = less(t, f"SAE {kind}", other)
    judged = {name: _measured(m) for name, m in found.items()}
    judged["shift.sensitivity"] = Measurement.of(of(t, best, "rho_dev"), of(t, shuffled, "rho_dev"))
    judged["shift.second_axis"] = (
        Measurement.of(axis(t, 2), axis(t, 2, "chance")) if planted else None
    )
    return {f"opinion_qa.{name}": m for name, m in judged.items()}


def _has(t: "Tables", method: str) -> bool:
    return bool((t["scores"]["method"] == method).any())


def _measured(found: Interval | float | None) -> Measurement | None:
    if found is None or isinstance(found, Interval):
        return None if found is None else Measurement.of(found)
    return Measurement(found)
