"""What the claims of the first look measure, and its answer in a few sentences."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sae_research import stats
from sae_research.claims import Measurement
from sae_research.errors import ResearchError
from sae_research.studies.real_model.settings import Settings
from sae_research.studies.runner import Result
from sae_research.training import NULLS

Tables = dict[str, pd.DataFrame]
MAIN = "topk"


def make_tables(results: Mapping[str, Result]) -> Tables:
    """All tables of the run by name."""
    return results[""].tables


def by_seed(t: Tables, column: str, null: str = "") -> pd.Series:
    """A column of the main SAE, or of one of its nulls, by seed."""
    q = t["quality"].fillna({"null": ""})
    hook = q.loc[q["null"] != "", "hook"].iloc[0]  # the one that has null dictionaries
    own = q[(q["hook"] == hook) & (q["kind"] == MAIN) & (q["null"] == null)]
    return own.set_index("seed")[column].astype(float)


def by_pair(t: Tables, null: str = "") -> pd.Series:
    """PW-MCC of each pair of seeds, named by the third seed.

    The table has, for each seed, the mean over its pairs. Three of those give the pairs; an
    interval over the seeds' own means would count every pair twice.
    """
    means = by_seed(t, "pw_mcc", null)
    if len(means) != 3:
        raise ResearchError(f"PW-MCC by pair needs three seeds, and there are {len(means)}.")
    return means.sum() - 2 * means


def versus(own: pd.Series, control: pd.Series) -> Measurement:
    """Mean over seeds, the same for the control, and their paired difference."""
    found, other, gap = (stats.mean_interval(list(v)) for v in (own, control, own - control))
    return Measurement.of(found, other, gap)


def best_null(t: Tables, column: str) -> str:
    """The null dictionary whose mean of a column is largest: the hardest control."""
    return max(NULLS, key=lambda null: by_seed(t, column, null).mean())


def measure_saes(t: Tables, column: str) -> Measurement:
    """A measure of the main SAE over its seeds; control: the best null dictionary."""
    return versus(by_seed(t, column), by_seed(t, column, best_null(t, column)))


def measure_matching(t: Tables) -> Measurement:
    """PW-MCC over pairs of seeds; control: that of the best null dictionary."""
    return versus(by_pair(t), by_pair(t, best_null(t, "pw_mcc")))


def measure_later(t: Tables, column: str) -> Measurement:
    """A measure of the committed SAE of the later block, as measured again here."""
    return Measurement(float(t["again"][column].iloc[1]), n=1)


def measure_loss(t: Tables) -> Measurement:
    """Loss of the model on held-out rows; control: token frequencies."""
    rows = t["losses"]
    found = [stats.cluster_bootstrap(v, seed=0) for v in (rows["model"], rows["unigram"])]
    gap = stats.cluster_bootstrap(rows["model"] - rows["unigram"], seed=0)
    return Measurement.of(*found, gap)


def measure_steering(t: Tables, settings: Settings) -> Measurement:
    """Rise of the latents' own tokens at the smallest dose; control: random directions."""
    dose = min(dose for dose in settings.doses if dose > 0)
    rows = t["steering"][t["steering"]["dose"] == dose].pivot(
        index="latent", columns="kind", values="own"
    )
    own, other = rows["latent"], rows["random"]
    found = [stats.cluster_bootstrap(v, seed=0) for v in (own, other, own - other)]
    return Measurement.of(*found)


def without_group(t: Tables) -> pd.DataFrame:
    """Answers to the prompt that names no group."""
    return t["survey"].query("group == 'no group'")


def measure_questions(t: Tables, column: str) -> Measurement:
    """Mean of a column over topics of questions, without a group prompt."""
    own = without_group(t)
    return Measurement.of(stats.cluster_bootstrap(own[column], own["topic"], seed=0))


def group_shifts(t: Tables, settings: Settings) -> pd.DataFrame:
    """Difference between each two neighbouring groups by question: the model's and people's."""
    by_group = t["survey"].pivot(
        index=["question", "topic"], columns="group", values=["answer", "people"]
    )
    parts = []
    for first, second in zip(settings.groups[::2], settings.groups[1::2], strict=True):
        gaps = by_group.xs(first, axis=1, level=1) - by_group.xs(second, axis=1, level=1)
        parts.append(gaps.reset_index().assign(pair=f"{first} - {second}"))
    return pd.concat(parts, ignore_index=True)


def measure_groups(t: Tables, settings: Settings) -> Measurement:
    """How far prompts move answers where people differ by one (a slope), topics as clusters."""
    gaps = group_shifts(t, settings)
    return Measurement.of(
        stats.bootstrap(
            lambda ours, theirs: np.polyfit(theirs, ours, 1)[0],
            gaps["answer"],
            gaps["people"],
            clusters=gaps["topic"],
            seed=0,
        )
    )


def measure_refusals(t: Tables, kind: str) -> Measurement | None:
    """Share of the reader's requests of a kind that are refused; without them nothing."""
    own = t["refusals"]["refused"][t["refusals"]["kind"] == kind]
    if own.empty:
        return None
    return Measurement.of(stats.wilson(int(own.sum()), len(own)))


def measure_claims(t: Tables, settings: Settings) -> dict[str, Measurement | None]:
    """What every claim of claims.yaml asks for."""
    return {
        "real_model.loss": measure_loss(t),
        "real_model.explained_variance": measure_saes(t, "explained_variance"),
        "real_model.without_largest": measure_saes(t, "ev_without_largest"),
        "real_model.ce_recovered": measure_saes(t, "ce_recovered"),
        "real_model.later_block": measure_later(t, "explained_variance"),
        "real_model.later_without_largest": measure_later(t, "ev_without_largest"),
        "real_model.later_block_ce": measure_later(t, "ce_recovered"),
        "real_model.pw_mcc": measure_matching(t),
        "real_model.token_rules": measure_saes(t, "token_rule_f1"),
        "real_model.steering": measure_steering(t, settings),
        "real_model.letter_mass": measure_questions(t, "mass"),
        "real_model.order": measure_questions(t, "order"),
        "real_model.groups": measure_groups(t, settings),
        "real_model.refuses_unsafe": measure_refusals(t, "unsafe"),
        "real_model.refuses_safe": measure_refusals(t, "safe"),
    }


def summarize(t: Tables, settings: Settings, verdicts: pd.Series) -> str:
    """The answer that opens the notebook, in Markdown."""
    found = {name.split(".")[1]: m for name, m in measure_claims(t, settings).items() if m}
    ev, rules = found["explained_variance"], found["token_rules"]
    matched, groups = found["pw_mcc"], found["groups"]
    again, later = t["again"].iloc[0], t["again"].iloc[1]
    gaps = group_shifts(t, settings)[["answer", "people"]].abs().mean()
    counts = verdicts.value_counts()
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    asked = "Requests were not tried, since XSTest's prompts are not here."
    if "refuses_unsafe" in found:
        asked = (
            f"It refuses {found['refuses_unsafe'].value:.0%} of unsafe and "
            f"{found['refuses_safe'].value:.0%} of safe requests of XSTest."
        )
    return "\n".join(
        [
            f"**A real model of 135 million weights and SAEs that everyone can rebuild** ({said}).",
            f"- The SAEs of block 10 explain {ev.value:.1%} of the residual's variance at 32 "
            f"active latents ({found['without_largest'].value:.1%} without the five largest "
            f"coordinates) and recover {found['ce_recovered'].value:.1%} of the cross-entropy. "
            "The best null "
            "dictionary, whose decoder stays near its random start, explains "
            f"{ev.control.value:.1%}, so the number alone says little.",
            f"- At block 20 the five largest coordinates hold {later['share_of_largest']:.0%} of "
            f"the variance: the SAE explains {later['explained_variance']:.1%} with and "
            f"{later['ev_without_largest']:.1%} without them.",
            "- The SAEs were trained on docstrings and serve docstrings: on text that the model "
            f"samples by itself, one explains {again['sampled_explained_variance']:.1%} and "
            f"recovers {again['sampled_ce_recovered']:.1%}.",
            f"- Two seeds share directions with a mean cosine of {matched.value:.2f} (nulls: "
            f"{matched.control.value:.2f}), and a rule on tokens describes a latent with an F1 of "
            f"{rules.value:.2f} (nulls: {rules.control.value:.2f}).",
            "- Asked survey questions, the model puts "
            f"{found['letter_mass'].value:.0%} on the letters. Prompts that name opposed groups "
            f"move its answers apart by {gaps['answer']:.3f} on a scale of 1, where people differ "
            f"by {gaps['people']:.2f}: a slope of {groups.value:.3f} [{groups.low:.3f}, "
            f"{groups.high:.3f}]. {asked}",
        ]
    )


def tabulate_quality(t: Tables) -> pd.DataFrame:
    """Every SAE with its measures, nulls below the trained ones."""
    q = t["quality"].copy()
    q["hook"] = q["hook"].str.removesuffix(".hook_resid_post")
    columns = {
        "latents": "latents",
        "l0": "L0",
        "explained_variance": "explained variance",
        "ev_without_largest": "without largest",
        "ce_recovered": "CE recovered",
        "dead_share": "dead",
        "token_rule_f1": "token-rule F1",
        "pw_mcc": "PW-MCC",
    }
    return q.set_index("role")[list(columns)].rename(columns=columns).round(3)


def dose_intervals(t: Tables, column: str) -> dict[str, list[stats.Interval]]:
    """A column of the steering table by dose, for latents and for random directions."""
    return {
        kind: [
            stats.cluster_bootstrap(list(rows[column]), seed=0) for _, rows in own.groupby("dose")
        ]
        for kind, own in t["steering"].groupby("kind")
    }


def tabulate_opinions(t: Tables) -> pd.DataFrame:
    """Letter mass, order sensitivity and mean answer by prompt, with that of the people."""
    columns = ["mass", "order", "answer", "people"]
    return t["survey"].groupby("group", sort=False)[columns].mean().round(3)


def null_intervals(t: Tables, columns: list[str]) -> dict[str, list[stats.Interval]]:
    """Mean and interval over seeds of some columns, for the trained SAE and each null."""
    return {
        null.replace("_", " ") or "trained": [
            stats.mean_interval(
                list(by_pair(t, null) if column == "pw_mcc" else by_seed(t, column, null))
            )
            for column in columns
        ]
        for null in ("", *NULLS)
    }
