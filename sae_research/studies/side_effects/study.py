"""Study 2 for the runner: a task per model and seed, and one that ranks the features of an SAE."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from sae_research import catalogue, last_token
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.screening import labels, ranking
from sae_research.screening.screen import Fixed, Screen, check_hooks
from sae_research.studies.runner import Result, Task, concatenate
from sae_research.studies.side_effects import analysis, corpus

if TYPE_CHECKING:
    from sae_lens import SAE

RANKING, NULLS = "ranking", "nulls"
ENGINE_TOLERANCE = 1e-4


def tasks(profile: Profile) -> list[Task]:
    """Every model with every seed, its null dictionaries, and the ranking of the first model's
    main SAE.
    """
    settings = profile.side_effects
    models = settings.models
    screens = [{"model": m, "seed": s} for m in models for s in range(profile.runtime.seeds)]
    if settings.null_saes:
        screens += [{"model": m, "seed": 0, "output": NULLS} for m in models]
    return [*screens, {"model": models[0], "seed": 0, "output": RANKING}]


def run(task: Task, profile: Profile) -> Result:
    """Screen the SAEs of one model, or their null dictionaries: all of them for seed 0, the main
    one for the others.

    Contexts, panel and threshold are those of the main SAE throughout, so that two SAEs differ in
    nothing but themselves.
    """
    if task.get("output") == RANKING:
        return _rank_features(profile)
    seed = task["seed"]
    nulls = task.get("output") == NULLS
    runtime = profile.runtime
    spec, settings, model, primary_saes, downstream = _load(profile, task["model"], runtime.dtype)
    contexts = corpus.make_contexts(spec, model, settings, seed=seed)
    fresh = corpus.make_contexts(spec, model, settings, apart_from=contexts, seed=seed)
    prompt = None if spec.embedded else model.tokens([settings.output_score_prompt])
    fixed: Fixed | None = None
    results = []
    for name, (owner, role) in primary_saes.items():
        wanted = (name in settings.null_saes) == nulls
        if fixed and not wanted:
            continue
        sae = owner.sae(role, device=model.device)
        screen = Screen(
            model,
            sae,
            downstream,
            contexts,
            settings,
            seed=seed,
            folded=not spec.name.startswith("llama"),  # its published script reads the raw W_U
            fixed=fixed,
            expected=spec if fixed is None else None,
        )
        fixed = fixed or Fixed(screen.panel, screen.tau)
        if not wanted:
            continue
        screen.run(prompt)
        tables = {"facts": pd.DataFrame([screen.collect_facts()])}
        tables["features"] = screen.frame.reset_index()
        tables |= analysis.make_tables(screen.frame, settings, seed)
        tables |= analysis.confirm_on_fresh(screen, fresh, settings, seed)
        others = _load_other_seeds(primary_saes, name, model)
        if others:
            given = (screen.frame, sae, others, settings.n_bootstrap, seed)
            tables["seed_stability"] = analysis.correlate_seed_cosine(*given)
        where = {"model": task["model"], "seed": seed, "sae": name}
        results.append(Result(tables, task=where))
        if seed:
            break
    return concatenate(results)


def summarise(results: Sequence[Result], profile: Profile) -> dict[str, Result]:
    """All screens under one another, and the ranking."""
    ranked = [r for r in results if r.task.get("output") == RANKING]
    screens = [r for r in results if r not in ranked]
    # the name of an SAE says whether it is a null dictionary
    named = [{k: v for k, v in r.task.items() if k != "output"} for r in screens]
    published = concatenate([replace(r, task=t) for r, t in zip(screens, named, strict=True)])
    n_contexts = 3 * profile.side_effects.contexts_per_bucket
    noise = labels.simulate_noise(n_contexts)
    published.tables["noise"] = pd.DataFrame(noise).assign(n_contexts=n_contexts)
    published.facts = {}  # they stand in the table `facts`
    return {"": published, RANKING: ranked[0]}


def _load(profile: Profile, name: str, dtype: str = "float32") -> tuple:
    """A model: its entry, settings, the model, where its primary SAEs are, its downstream SAE.

    SAEs stay in float32 whatever the model runs in: thresholds and bfloat16 rounding do not mix.
    """
    spec = catalogue.get(name)
    settings = corpus.apply_departures(spec, profile.side_effects)
    model = spec.load(device=profile.runtime.device, dtype=dtype)
    primary_saes, role = corpus.choose_saes(spec, settings)
    return spec, settings, model, primary_saes, spec.sae(role, device=model.device)


def _load_other_seeds(primary_saes: dict, name: str, model: LanguageModel) -> "list[SAE]":
    """The SAE of this name from those other seeds that take part."""
    owner, role = primary_saes[name]
    roles = [r for o, r in primary_saes.values() if o is owner]
    return [owner.sae(r, device=model.device) for r in corpus.find_other_seeds(role, roles)]


def _load_first(profile: Profile) -> tuple:
    """The first model of a profile: settings, the model, where its primary SAEs are, the main one
    and the downstream SAE, contexts.
    """
    first = profile.side_effects.models[0]
    spec, settings, model, primary_saes, downstream = _load(profile, first)
    owner, role = next(iter(primary_saes.values()))
    sae = owner.sae(role, device=model.device)
    contexts = corpus.make_contexts(spec, model, settings)
    return settings, model, primary_saes, sae, downstream, contexts


def check_engine(profile: Profile) -> dict[str, float]:
    """The engine's largest difference from full passes, or an error above the tolerance."""
    _, model, _, sae, downstream, contexts = _load_first(profile)
    hook, read_hook = check_hooks(model, sae, downstream)
    directions = sae.W_dec[:6].detach().float()
    found = last_token.discrepancy(model, hook, (read_hook,), contexts[:16], directions)
    if not found["error"] < ENGINE_TOLERANCE * max(1.0, found["effect"]):
        raise ResearchError(f"the last-token engine is not exact on {model.name}: {found}.")
    return found


def _rank_features(profile: Profile) -> Result:
    """Every eligible feature of the first SAE ranked, with cards of the cleanest and messiest."""
    settings, model, primary_saes, sae, downstream, contexts = _load_first(profile)
    given = {"downstream": downstream, "settings": settings}
    given["other_seeds"] = _load_other_seeds(primary_saes, next(iter(primary_saes)), model)
    ranked = ranking.screen_features(model, sae, contexts, **given)
    latents = [int(ranked.table.index[i]) for i in (0, -1)]
    files = {}
    for latent in latents:
        card = ranked.card(latent)
        files[f"cards/feature_{latent}.html"] = card.to_html().encode()
        files[f"cards/feature_{latent}.json"] = card.to_json().encode()
    facts = {"cards": latents, "quality": ranked.quality}
    return Result({"ranked": ranked.table.reset_index()}, facts, files=files)
