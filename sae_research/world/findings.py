"""Notebook 00's tables, figures' intervals and claims: what the testbed's checks say."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae_research import stats, store
from sae_research.claims import Measurement
from sae_research.world import build
from sae_research.world.checks import Check

if TYPE_CHECKING:
    from pandas import DataFrame

    from sae_research.config import Profile
    from sae_research.world.text.demo import Dose, Meaning

CHECKS = {
    "world.survey.answer_kl": "answer KL(exact || model)",
    "world.survey.rho_dev": "persona prompt: rho_dev",
    "world.survey.one_direction": "persona as one direction",
    "world.survey.eligible_latents": "latents eligible for screening",
    "world.text.loss_floor": "loss minus floor",
    "world.text.facts_top1": "physics facts top-1",
    "world.text.senses": "sense probe",
    "world.text.request_words": "request words right",
    "world.text.gender_probe": "gender probe",
    "world.text.original_worst": "profession, Original probe, worst group",
    "world.text.oracle_worst": "profession, Oracle probe, worst group",
    "world.text.refusal_harmful": "refusal where planted",
    "world.text.refusal_elsewhere": "refusal elsewhere",
    "world.text.concepts_head": "physics rank 1-5 with a latent",
    "world.text.concepts_general": "general concepts with a latent",
    "world.text.eligible_latents": "latents eligible for screening",
}
"""The checks that each claim speaks of, by how their names begin; the worst of them counts."""

SEED = 100
"""Added to the seed of a build for the fresh text that it is checked on."""

ChecksByModel = Mapping[str, Sequence[Check]]
"""Checks by the name of their toy model."""


# checks


def measure_testbed(profile: "Profile") -> dict[int, ChecksByModel]:
    """Every check by seed of the toy models and their SAEs."""
    from functools import partial

    from sae_research import parallel

    seeds = profile.world.seeds
    found = parallel.shards(
        partial(_measure, profile.world.passages), seeds, profile.runtime.n_jobs, desc="checks"
    )
    return dict(zip(seeds, found, strict=True))


def _measure(size: int, seed: int) -> ChecksByModel:
    from sae_research.world.survey import checks as survey_checks
    from sae_research.world.survey.model import SurveySettings
    from sae_research.world.text import checks as text_checks
    from sae_research.world.text.model import TextSettings

    text, survey = (
        (build.model_folder(named), build.saes_folder(named))
        for named in (build.folder_name(name, seed) for name in build.TOY_MODELS)
    )
    return {
        "text": text_checks.measure(*text, TextSettings(), seed + SEED, size),
        "survey": survey_checks.measure(*survey, SurveySettings(), seed + SEED),
    }


def find_worst(checks: Sequence[Check], name: str) -> Check:
    """The check farthest on the wrong side among those whose name begins with `name`."""
    found = [check for check in checks if check.name.startswith(name)]
    return max(found, key=lambda check: check.value if check.at_most else -check.value)


def measure_claims(by_seed: Mapping[int, ChecksByModel]) -> dict[str, Measurement]:
    """Mean over the seeds of each claim's worst check, with the range over the seeds."""
    found = {}
    for claim, name in CHECKS.items():
        model = claim.split(".")[1]
        values = [find_worst(checks[model], name).value for checks in by_seed.values()]
        found[claim] = Measurement(sum(values) / len(values), min(values), max(values), len(values))
    return found


def summarize(by_seed: Mapping[int, ChecksByModel]) -> str:
    """The answer that opens notebook 00, in Markdown."""
    checks = [check for models in by_seed.values() for found in models.values() for check in found]
    failed = [check for check in checks if not check.passed]
    names = ", ".join(sorted({check.name for check in failed}))
    claims = {name.split(".", 1)[1]: m.value for name, m in measure_claims(by_seed).items()}
    builds = "one build" if len(by_seed) == 1 else f"{len(by_seed)} builds"
    return (
        f"**{len(checks) - len(failed)} of {len(checks)} checks are met** in {builds} of the "
        f"testbed{f' (not met: {names})' if failed else ''}. "
        f"The text model is at most {claims['text.loss_floor']:.2g} nats per token above the "
        "entropy of any kind of text (allowed: 0.1), and completes "
        f"{claims['text.facts_top1']:.1%} of the facts about the rarest physics concepts. "
        "The survey model's answers are within "
        f"{claims['survey.answer_kl']:.2g} nats of the exact distributions, and adding the "
        "residual difference that a stated value makes steers questions that it was not made from "
        f"(correlation {claims['survey.one_direction']:.2f}). "
        f"With F1 of at least .7, a latent detects {claims['text.concepts_head']:.0%} of the five "
        "most frequent physics concepts in text about physics; with F1 of at least .5, "
        f"{claims['text.concepts_general']:.0%} of the general concepts. "
        "Each number is the mean over the builds of the worst check of its kind."
    )


# tables


def tabulate_checks(by_seed: Mapping[int, ChecksByModel], model: str) -> "DataFrame":
    """The checks of one toy model: the number with each seed, both bars, and which are met."""
    import pandas as pd

    rows = []
    for same in zip(*(checks[model] for checks in by_seed.values()), strict=True):
        first = same[0]
        sign = "≤" if first.at_most else "≥"
        desired = first.desired is not None and all(c.meets(c.desired) for c in same)
        row = {"check": first.name}
        values = store.rounded([c.value for c in same])
        row |= {f"seed {seed}": f"{x:.3g}" for seed, x in zip(by_seed, values, strict=True)}
        row["required"] = f"{sign} {first.required:g}"
        row["desired"] = "" if first.desired is None else f"{sign} {first.desired:g}"
        row["met"] = "desired" if desired else "required" if all(c.passed for c in same) else "no"
        rows.append(row)
    return pd.DataFrame(rows).set_index("check")


def tabulate_saes(quality: Sequence[dict], truths: Mapping[str, tuple | str]) -> "DataFrame":
    """SAEs as rows: the usual measures, then the share of each kind of truth with a latent.

    `truths` maps a column's name to a key of `quality`, or to a text and a group of labels.
    """
    import pandas as pd

    rows = []
    for sae in quality:
        hook = sae["hook"].removesuffix(".hook_resid_post")
        row = {"SAE": f"{sae['kind']}, {sae['width']:,} at {hook}"}
        row["explained variance"] = f"{sae['explained_variance']:.3f}"
        row["CE recovered"] = f"{sae['ce_recovered']:.4f}"
        row["L0"] = f"{sae['l0']:.1f}"
        row["dead"] = f"{sae['dead_share']:.2f}"
        row["eligible"] = sae["eligible"]
        for column, key in truths.items():
            share = sae[key] if isinstance(key, str) else _find_truth(sae, *key)["F1 at least .7"]
            row[column] = f"{share:.2f}"
        rows.append(row)
    return pd.DataFrame(rows).set_index("SAE")


def _find_truth(sae: dict, text: str, group: str) -> dict:
    return next(t for t in sae["truth"] if (t["text"], t["group"]) == (text, group))


def tabulate_meanings(meanings: "Sequence[Meaning]") -> "DataFrame":
    """Latents with the label that each detects best, and where it fires most."""
    import pandas as pd

    rows = [(m.latent, m.truth, f"{m.f1:.2f}", " … ".join(m.contexts)) for m in meanings]
    columns = ["latent", "stands for", "F1", "fires most at"]
    return pd.DataFrame(rows, columns=columns).set_index("latent")


# figures


def make_band_intervals(
    quality: Sequence[dict], hook: str, text: str, bands: Sequence[str]
) -> dict[str, list[stats.Interval]]:
    """Share of physics concepts with a latent, by kind of SAE at a hook, for each frequency band.

    Intervals are Wilson's over the concepts of a band that occur in the text.
    """

    def measure(truth: dict) -> stats.Interval:
        n = truth["n"]
        share = truth["F1 at least .7"]
        return stats.wilson(round(share * n), n) if n else stats.Interval(0.0, 0.0, 0.0, 0)

    return {
        sae["kind"]: [measure(_find_truth(sae, text, f"physics {band}")) for band in bands]
        for sae in quality
        if sae["hook"] == hook
    }


def make_dose_intervals(effects: "Sequence[Dose]") -> dict[str, list[stats.Interval]]:
    """Mean over concepts of what each dose did, for the latents and for random directions."""
    return {
        "concept's latent": [stats.mean_interval(effect.mass) for effect in effects],
        "random directions": [stats.mean_interval(effect.control) for effect in effects],
    }
