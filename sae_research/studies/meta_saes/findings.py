"""What the claims of this study measure, and its answer in a few sentences.

Every number is first taken for each seed, as a difference between arms that saw the same batches;
intervals are Student's, over seeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.studies.meta_saes import senses
from sae_research.studies.meta_saes.arms import JOINT, NULL, SOLO, ZERO
from sae_research.studies.meta_saes.settings import VECTORS, Settings
from sae_research.studies.runner import Result

Tables = dict[str, pd.DataFrame]
RANDOM, SHUFFLED, ORT, MATRYOSHKA = "random meta", "shuffled meta", "OrtSAE", "Matryoshka"
GRID_TABLE = "grid_arms"
MODEL = "model"
"""In place of a ground's name: all grounds but planted vectors."""


def select(table: pd.DataFrame, ground: str = "", **columns) -> pd.DataFrame:
    """Rows of a table by ground and columns."""
    if ground:
        vectors = table["ground"] == VECTORS
        table = table[vectors if ground == VECTORS else ~vectors]
    for name, value in columns.items():
        table = table[table[name] == value]
    return table


def by_seed(t: Tables, ground: str, arm: str, column: str, table: str = "arms") -> pd.Series:
    """A column of an arm by ground and seed."""
    rows = select(t[table], ground, arm=arm)
    return rows.set_index(["ground", "seed"])[column]


def change(t: Tables, ground: str, arm: str, column: str, table: str = "arms") -> pd.Series:
    """Relative change of a column against the solo SAE of the same seed."""
    own, solo = (by_seed(t, ground, name, column, table) for name in (arm, SOLO))
    return (own - solo) / solo


def interval(values: pd.Series) -> Measurement:
    """Mean over seeds with Student's interval; one seed has none."""
    values = values.dropna()
    if len(values) < 2:
        return Measurement(float(values.mean()), n=len(values))
    return Measurement.of(stats.mean_interval(values.to_list()))


def versus(own: pd.Series, control: pd.Series) -> Measurement:
    """A measurement, the same under its control, and their difference seed by seed."""
    own, control = own.align(control, join="inner")
    gap = interval(own - control)
    return replace(interval(own), control=interval(control), difference=gap)


def match_reconstruction(t: Tables, ground: str, column: str) -> pd.Series:
    """A column of a solo SAE that rebuilds as badly as the joint one: between (or beyond) the solo
    SAEs of fewer active latents, along a line in the reconstruction cost.
    """
    found = {}
    for key, rows in select(t["arms"], ground).groupby(["ground", "seed"]):
        solo = rows[rows["arm"].str.startswith(SOLO)].sort_values("fvu")
        wanted = rows.loc[rows["arm"] == JOINT, "fvu"].iloc[0]
        above = int(np.clip(np.searchsorted(solo["fvu"], wanted), 1, len(solo) - 1))
        (x0, x1), (y0, y1) = (solo[c].iloc[above - 1 : above + 1] for c in ("fvu", column))
        found[key] = y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)
    return pd.Series(found).rename_axis(["ground", "seed"])


def senses_won(t: Tables, settings: Settings, arm: str) -> pd.DataFrame:
    """Share of senses that an arm splits and merges, by seed."""
    rows = {}
    for key, table in t["senses"].groupby(["ground", "seed"]):
        own, solo = (table[table["arm"] == name] for name in (arm, SOLO))
        rows[key] = senses.compare(solo, own, settings.own_latent_f1)
    return pd.DataFrame(rows).T.rename_axis(["ground", "seed"])


def sense_purity(t: Tables, arm: str) -> pd.Series:
    """Mean purity over words minus that of shuffled senses, by seed."""
    rows = t["senses"][t["senses"]["arm"] == arm]
    words = rows.drop_duplicates(["ground", "seed", "word"])
    return (words["purity"] - words["chance"]).groupby([words["ground"], words["seed"]]).mean()


def grid(t: Tables, ground: str = "") -> pd.DataFrame:
    """Cells of the grid, mean over seeds: cost and |phi| against solo, and strength s.

    s = (lambda2 / sigma2) exp(-e / sigma2), e the error of the rows where the penalty is zero.
    """
    table = t["grid_arms"]
    parts = []
    for key, rows in select(table, ground).groupby(["ground", "seed"]):
        solo, zero = (rows[rows["arm"] == name].iloc[0] for name in (SOLO, ZERO))
        cells = rows[rows["arm"].str.split(" ").str[0] == JOINT].copy()
        for name, column in (("cost", "fvu"), ("phi", "phi_corrected")):
            cells[name] = (cells[column] - solo[column]) / solo[column]
        kernel = np.exp(-zero["e"] / cells["sigma2"])
        cells["s"] = cells["lambda2"] / cells["sigma2"] * kernel
        parts.append(cells.assign(ground=key[0], seed=key[1]))
    cells = pd.concat(parts)
    keys = ["ground", "lambda2", "sigma2"]
    return cells.groupby(keys, as_index=False)[["s", "cost", "phi", "e"]].mean()


def collapse(cells: pd.DataFrame, on: str = "s") -> float:
    """R squared of log cost on the log of a column, over cells that cost something; 0 where fewer
    than three do.
    """
    cells = cells.query("cost > 0")
    if len(cells) < 3:
        return 0.0
    return float(np.corrcoef(np.log(cells[on]), np.log(cells["cost"]))[0, 1] ** 2)


def measure_collapse(t: Tables) -> Measurement:
    """R squared of the collapse on s by seed; control: on lambda2 alone."""
    seeds = t["grid_arms"].groupby(["ground", "seed"])
    cells = {key: grid({"grid_arms": rows}) for key, rows in seeds}
    return versus(
        *(pd.Series({key: collapse(c, on) for key, c in cells.items()}) for on in ("s", "lambda2"))
    )


def measure_monotone(t: Tables) -> Measurement:
    """Slope of mean |phi| less its null, relative to solo, on the logarithm of lambda2 at sigma2 1:
    below zero where the fall grows with the weight.
    """
    found = {}
    for key, rows in t["grid_arms"].groupby(["ground", "seed"]):
        cells = grid({"grid_arms": rows}).query("sigma2 == 1")
        found[key] = np.polyfit(np.log(cells["lambda2"]), cells["phi"], 1)[0]
    return interval(pd.Series(found))


def measure_rates(t: Tables) -> Measurement:
    """The smaller of two relative changes of mean |phi| of the solo SAE, in size: half of its
    activations dropped at random, or all of them on half of the tokens.
    """
    rows = select(t["arms"], MODEL, arm=SOLO)
    thinned = [rows[name] / rows["phi_live"] - 1 for name in ("phi_thinned", "phi_fewer_tokens")]
    return interval(min(thinned, key=lambda change: abs(change.mean())))


def measure_phi(t: Tables, ground: str) -> Measurement:
    """Change of mean |phi| over live pairs less its null; control: the random frozen meta SAE."""
    return versus(*(change(t, ground, arm, "phi_corrected") for arm in (JOINT, RANDOM)))


def measure_phi_of_nulls(t: Tables) -> Measurement:
    """Change of mean |phi| less its null from the solo SAE to the null dictionary where it is
    lowest: above zero where co-occurrence tells a trained SAE from one that learned little.
    """
    nulls = [arm for arm in t["arms"]["arm"].unique() if arm.startswith(NULL)]
    changes = [change(t, MODEL, null, "phi_corrected") for null in nulls]
    return interval(min(changes, key=pd.Series.mean))


def measure_phi_at_equal_cost(t: Tables, ground: str) -> Measurement:
    """Mean |phi| less its null of the joint SAE against a solo one of the same reconstruction."""
    matched = match_reconstruction(t, ground, "phi_corrected")
    own = by_seed(t, ground, JOINT, "phi_corrected")
    return interval((own - matched) / matched)


def measure_gap(t: Tables, ground: str, column: str) -> Measurement:
    """Difference of a column to solo, in its own unit; control: the random frozen meta SAE."""
    solo = by_seed(t, ground, SOLO, column)
    return versus(*(by_seed(t, ground, arm, column) - solo for arm in (JOINT, RANDOM)))


def measure_interpretation(t: Tables, column: str) -> Measurement:
    """Difference of mean scores of explained latents to solo; control: random frozen meta SAE."""
    table = t["latents"].groupby(["ground", "seed", "arm"], as_index=False)[column].mean()
    return measure_gap({"arms": table}, MODEL, column)


def measure_splits(t: Tables) -> Measurement:
    """Share of solo latents that split in the joint SAE minus share of joint ones that merge."""
    split, merged = (by_seed(t, MODEL, JOINT, column) for column in ("split", "merged"))
    return interval(split - merged)


def measure_senses(t: Tables, settings: Settings) -> Measurement:
    """Share of senses that gain a latent of their own minus share that lose theirs;
    control: the random frozen meta SAE.
    """
    won = [senses_won(t, settings, arm) for arm in (JOINT, RANDOM)]
    return versus(*(table["split"] - table["merged"] for table in won))


def can_split(t: Tables, settings: Settings) -> bool:
    """Whether some sense lacks a latent of its own in a solo SAE, so that one can split."""
    return "senses" in t and bool(
        (select(t["senses"], arm=SOLO)["f1"] < settings.own_latent_f1).any()
    )


def measure_purity(t: Tables) -> Measurement:
    """Gain of sense purity over solo; control: the random frozen meta SAE."""
    solo = sense_purity(t, SOLO)
    return versus(*(sense_purity(t, arm) - solo for arm in (JOINT, RANDOM)))


def measure_overhead(t: Tables) -> Measurement:
    """Percentage points that the joint SAE adds to the solo one's overhead in cross-entropy."""
    solo, joint = (by_seed(t, MODEL, arm, "ce_overhead") for arm in (SOLO, JOINT))
    return interval(100 * (joint - solo))


def measures(settings: Settings) -> dict[str, tuple[str, Callable[[Tables], Measurement]]]:
    """How each claim is measured, and which table or ground it needs."""
    both = {
        f"{topic}.{where}": (ground, how)
        for where, ground in (("vectors", VECTORS), ("model", MODEL))
        for topic, how in (
            ("phi", lambda t, g=ground: measure_phi(t, g)),
            ("phi_equal_cost", lambda t, g=ground: measure_phi_at_equal_cost(t, g)),
            ("cost", lambda t, g=ground: interval(change(t, g, JOINT, "fvu"))),
            ("composition", lambda t, g=ground: measure_gap(t, g, "composition")),
        )
    }
    return both | {
        "phi.nulls": ("nulls", measure_phi_of_nulls),
        "recovery": (VECTORS, lambda t: measure_gap(t, VECTORS, "mcc")),
        "overhead": (MODEL, measure_overhead),
        "detection": (MODEL, lambda t: measure_interpretation(t, "detection")),
        "fuzzing": (MODEL, lambda t: measure_interpretation(t, "fuzzing")),
        "strength": (MODEL, lambda t: measure_interpretation(t, "strength")),
        "splits": (MODEL, measure_splits),
        "senses": ("unsplit senses", lambda t: measure_senses(t, settings)),
        "purity": ("senses", measure_purity),
        "rates": (MODEL, measure_rates),
        "monotone": (GRID_TABLE, measure_monotone),
        "collapse": (GRID_TABLE, measure_collapse),
    }


def make_tables(results: Mapping[str, Result]) -> Tables:
    """All published tables."""
    return dict(results[""].tables)


def measure_claims(t: Tables, settings: Settings) -> dict[str, Measurement | None]:
    """A measurement for every claim; None where this run lacks its ground."""
    has = {VECTORS: len(select(t["arms"], VECTORS)), MODEL: len(select(t["arms"], MODEL))}
    has["unsplit senses"] = can_split(t, settings)
    has["nulls"] = has[MODEL] and t["arms"]["arm"].str.startswith(NULL).any()
    has |= {name: name in t for name in ("senses", GRID_TABLE)}
    return {
        f"meta_saes.{name}": how(t) if has[needs] else None
        for name, (needs, how) in measures(settings).items()
    }


def summarize(t: Tables, settings: Settings, verdicts: Mapping[str, str]) -> str:
    """What was found, in a few sentences with the numbers; `verdicts` are the ledger's, by id."""
    measured = measure_claims(t, settings)

    def say(name: str, scale: float = 1.0, unit: str = "") -> str:
        m = measured[f"meta_saes.{name}"]
        if m is None:
            return "not measured here"
        ends = "" if m.low is None else f" [{scale * m.low:.2g}, {scale * m.high:.2g}]"
        beside = f"; random meta SAE {scale * m.control.value:.2g}" if m.control else ""
        return f"{scale * m.value:.2g}{unit}{ends} (**{verdicts[f'meta_saes.{name}']}**{beside})"

    def both(name: str, scale: float = 1.0, unit: str = "") -> str:
        words = {f"{name}.model": "in the language model", f"{name}.vectors": "on planted vectors"}
        said = [
            f"{say(n, scale, unit)} {w}" for n, w in words.items() if measured[f"meta_saes.{n}"]
        ]
        return " and ".join(said)

    sentences = [
        "With the paper's penalty and equal L0, mean |phi| of live latents less its null changes "
        f"by {both('phi', 100, ' %')}.",
        "From a solo SAE of fewer active latents, which rebuilds as badly, the joint one lies "
        f"{both('phi_equal_cost', 100, ' %')}; the null dictionary with the least of it lies "
        f"{say('phi.nulls', 100, ' %')} from the solo SAE.",
        f"Unexplained variance grows by {both('cost', 100, ' %')}; the overhead in loss by "
        f"{say('overhead')} points.",
        "Whether latents are more atomic is another question: the match with planted directions "
        f"changes by {say('recovery')}, the composition rate for a fresh meta SAE by "
        f"{both('composition')}.",
        f"Of the senses of words, a net share of {say('senses')} gains a latent of its own."
        if can_split(t, settings) or "senses" not in t
        else "No sense is left to split: each has a latent of its own in the solo SAE.",
        "Fewer activations, or fewer tokens, alone move mean |phi| by "
        f"{say('rates', 100, ' %')} at least.",
        "Explained by a rule on tokens, latents are told from their neighbours "
        f"{say('detection')} better, and their strengths ranked {say('strength')} better.",
    ]
    return "\n".join(f"- {sentence}" for sentence in sentences)
