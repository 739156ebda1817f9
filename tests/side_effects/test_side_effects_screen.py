"""One SAE through the whole of study 2, where its contexts come from, and the claims of a run."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from side_effects_toys import HOOK, READ, SETTINGS, D, make_sae, unit
from test_last_token import tiny

from sae_research import catalogue, claims, config
from sae_research.errors import ResearchError
from sae_research.screening import pool, ridge
from sae_research.screening.screen import FORECASTS, LABELS, Fixed, Screen
from sae_research.studies import runner
from sae_research.studies.side_effects import (
    analysis,
    corpus,
    findings,
    study,
    tables,
)
from sae_research.studies.side_effects.settings import Settings


def test_an_sae_goes_through_the_whole_study(screened, tokens):
    frame = screened.frame
    assert len(frame) == 60
    further = ("C@2", "E@random", "S@a", "C@b", "C@tau2", "S@own", "C@own_random", "C@activation")
    further += ("output_score",)
    for name in (*LABELS, *FORECASTS, *further):
        assert np.isfinite(frame[name]).all(), name
    assert (frame["C@4"] >= frame["C@0.5"]).mean() > 0.9
    assert (frame["C@tau0.2"] >= frame["C"]).all()
    assert (frame["C"] >= frame["C@tau4"]).all()
    assert (frame["C@panel24"] <= frame["C@panel48"]).all()
    assert frame["C"].mean() == pytest.approx(0.02 * 96, rel=0.5)
    facts = screened.collect_facts()
    assert len(screened.contexts.unique()) == 12
    assert (screened.contexts == screened.contexts[0]).all()
    norms = screened.directions.norm(dim=1)
    assert norms.max() == pytest.approx(norms.min().item(), rel=1e-5)
    assert facts["step_norm"] == pytest.approx(0.2 * facts["residual_norm"], rel=0.05)
    fresh = screened.label_on(tokens[:20], np.array([0, 5]))
    assert list(fresh.index) == list(frame.index[[0, 5]])


def test_the_same_seed_gives_the_same_table(model, tokens, screened):
    again = Screen(model, screened.sae, screened.downstream, tokens, SETTINGS).run()
    pd.testing.assert_frame_equal(screened.frame, again.frame)


def test_a_bfloat16_model_is_labelled_in_float32(tokens):
    """Against a float32 twin: rounding below the hook chooses a few other contexts, no more."""
    frames = []
    for twin in (False, True):
        model = tiny("llama", torch.bfloat16)
        if twin:
            model.bridge.to(torch.float32, print_details=False)
        torch.manual_seed(18)
        sae, downstream = (
            make_sae(model, hook, unit(torch.randn(96, D)), bias=-0.1) for hook in (HOOK, READ)
        )
        settings = replace(SETTINGS, n_features=20)
        one = Screen(model, sae, downstream, tokens, settings, features=range(20))
        frames.append(one.run().frame)
    low, high = frames
    assert low["E"].mean() == pytest.approx(high["E"].mean(), rel=0.05)
    assert ridge.rank_correlation(low["E"].to_numpy(), high["E"].to_numpy()) > 0.8


def test_author_protocol_samples_frequencies_evenly(screened):
    found = screened.pool
    settings = replace(SETTINGS, n_features=20, protocol="author")
    chosen = pool.sample_features(found, settings, 0)
    assert len(set(chosen.tolist())) == 20
    frequency = found.frequency[pool.find_eligible(found, (0.01, 0.9))]
    assert float(found.frequency[chosen].max()) == float(frequency.max())
    assert float(found.frequency[chosen].min()) == float(frequency.min())


def test_bad_input_is_one_sentence(model, tokens, screened):
    sae, downstream = screened.sae, screened.downstream

    def start(sae=sae, downstream=downstream, tokens=tokens, features=None, **changes):
        Screen(model, sae, downstream, tokens, replace(SETTINGS, **changes), features=features)

    with pytest.raises(ResearchError, match="this SAE has features 0 to 95"):
        start(features=[3, 96])
    with pytest.raises(ResearchError, match="fewer than the 500 features"):
        start(n_features=500)
    with pytest.raises(ResearchError, match="below the edit"):
        start(sae=downstream, downstream=sae)
    with pytest.raises(ResearchError, match="reads 33 dimensions"):
        start(sae=make_sae(model, HOOK, torch.randn(10, D + 1)))
    with pytest.raises(ResearchError, match=r"no hook 'blocks\.9\.hook_resid_post'"):
        start(sae=make_sae(model, "blocks.9.hook_resid_post", torch.randn(10, D)))
    with pytest.raises(ResearchError, match="at least two tokens"):
        start(tokens=tokens[:, :1])
    with pytest.raises(ResearchError, match="too few for 12"):
        start(tokens=tokens[:10], n_features=3)


def test_a_wrong_sae_is_stopped_before_any_feature_is_steered(model, tokens, screened):
    found = screened.pool
    right = {"primary": found.l0[0], "downstream": found.l0[1]}
    spec = replace(catalogue.get("gpt2-small"), mean_l0=right, eligible=None)
    Screen(model, screened.sae, screened.downstream, tokens, SETTINGS, clean=found, expected=spec)
    wrong = replace(spec, mean_l0=right | {"primary": 2 * found.l0[0]})
    with pytest.raises(ResearchError, match=r"gpt2-small shows l0_primary .* is expected"):
        Screen(
            model, screened.sae, screened.downstream, tokens, SETTINGS, clean=found, expected=wrong
        )


# where contexts and SAEs come from


def test_saes_of_the_published_settings():
    primary_saes, downstream = corpus.choose_saes(catalogue.get("llama-3.1-8b"), Settings())
    assert list(primary_saes) == ["primary", "llama-3.1-8b-32x/primary"]
    assert primary_saes["llama-3.1-8b-32x/primary"][0].name == "llama-3.1-8b-32x"
    assert downstream == "downstream"
    gpt2 = list(corpus.choose_saes(catalogue.get("gpt2-small"), Settings())[0])
    assert gpt2 == ["primary", *(f"width_{768 * 2**i}" for i in range(8))]
    lacking = replace(Settings(), downstream_saes=("block3_topk",))
    with pytest.raises(ResearchError, match="but none of the primary_saes"):
        corpus.choose_saes(catalogue.get("gpt2-small"), lacking)


def test_the_authors_protocol_follows_each_script():
    paper = Settings()
    gpt2, llama = catalogue.get("gpt2-small"), catalogue.get("llama-3.1-8b")
    assert corpus.apply_departures(gpt2, paper).selector == "geometry_only"
    own = corpus.apply_departures(llama, paper)
    assert own.n_downstream_latents == 1024
    assert own.clean_score == "log_of_ratio"
    assert own.holdout_fraction == 0.3
    alike = replace(paper, protocol="replication")
    assert corpus.apply_departures(gpt2, alike) == alike
    assert corpus.apply_departures(llama, alike) == replace(alike, n_downstream_latents=1024)
    assert corpus.apply_departures(catalogue.get("world-text"), paper) == paper


def test_contexts_of_both_protocols(model):
    texts = [f"w{i} " + "w5 " * (i % 14) for i in range(10, 60)]
    stream = corpus.cut_texts(model, texts, replace(SETTINGS, protocol="author"), seed=0)
    begin = corpus.cut_texts(model, texts, SETTINGS, seed=0)
    assert stream.shape[1] == begin.shape[1] == 8
    assert min(len(stream), len(begin)) > 10
    assert (stream[:, 0] == model.bos).all()
    assert (begin[:, 0] == model.bos).all()
    assert (begin[:, -1] != model.pad).all()


def test_fresh_contexts_are_none_of_those_seen_before():
    """Documents of the survey model are short, so that fresh ones repeat others."""
    spec = catalogue.get("world-survey")
    model = spec.load()
    settings = replace(SETTINGS, n_contexts=600, n_fresh_contexts=60, context_length=40)
    contexts = corpus.make_contexts(spec, model, settings)
    seen = set(map(tuple, contexts.tolist()))
    drawn = corpus._make_toy_contexts("survey", model, 60, 40, corpus.FRESH_SEED)
    assert any(tuple(row) in seen for row in drawn.tolist())
    fresh = corpus.make_contexts(spec, model, settings, apart_from=contexts)
    assert len(fresh) == 60
    assert not any(tuple(row) in seen for row in fresh.tolist())


def test_null_dictionaries_are_a_task_of_their_own_and_seeds_know_each_other():
    profile = config.load("real")
    chosen = replace(profile.side_effects, models=("smollm2-135m-instruct",))
    profile = replace(profile, studies={**profile.studies, "side_effects": chosen})
    outputs = [task.get("output") for task in study.tasks(profile)]
    assert outputs == [None, None, None, study.NULLS, study.RANKING]
    roles = [*profile.side_effects.primary_saes, *profile.side_effects.null_saes]
    first, *others = profile.side_effects.primary_saes
    assert corpus.find_other_seeds(first, roles) == others
    assert corpus.find_other_seeds(others[0], roles) == [first, others[1]]
    assert corpus.find_other_seeds("primary", ["primary", "primary_wide"]) == []
    owner = SimpleNamespace(sae=lambda role, device: (role, device))
    places = {role: (owner, role) for role in roles}
    loaded = study._load_other_seeds(places, first, SimpleNamespace(device="cpu"))
    assert loaded == [(role, "cpu") for role in others]
    nulls = [tables.find_null(role) for role in roles]
    assert nulls == [None] * 3 + ["soft_frozen_decoder"] * 3
    assert tables.has_vote(pd.Series([*roles, "width_768"])).tolist() == [True] * 3 + [False] * 4


def test_features_that_other_seeds_find_are_told_apart(screened):
    """A decoder whose first half is found again, where the label is largest."""
    other = copy.deepcopy(screened.sae)
    half = len(other.W_dec) // 2
    torch.manual_seed(20)
    other.W_dec.data[half:] = unit(torch.randn(len(other.W_dec) - half, D))
    found = np.asarray(screened.frame.index < half, dtype=float)
    labels = {name: 1 + found for name in ("C", "C_per_E", "S_abs")}
    frame = screened.frame.assign(**labels)
    table = analysis.correlate_seed_cosine(frame, screened.sae, [other], 50, 0)
    rho = table.set_index(["label", "direction"]).rho
    assert rho["S_abs", "SAE"] > 0.8
    assert abs(rho["S_abs", "random"]) < 0.4


def test_contexts_longer_than_the_model_can_read_are_refused(model):
    toy = catalogue.get("world-text")
    for length in (model.n_ctx + 1, 100_000):
        with pytest.raises(ResearchError, match=f"`context_length` {length} is longer than"):
            corpus.make_contexts(toy, model, replace(SETTINGS, context_length=length))


def test_real_profiles_keep_the_papers_settings():
    for profile in ("laptop", "gpu"):
        settings = config.load(profile).side_effects
        assert settings.tau == 0.05
        assert settings.dose == 1.0
        assert settings.dose_norm_fraction is None
        assert (settings.n_features, settings.n_contexts) == (300, 2048)
        assert settings.n_downstream_latents == 2048


def test_a_setting_that_changed_its_name_says_so():
    with pytest.raises(ResearchError, match="is now called 'min_eligible_features'"):
        config.build(Settings, {"fewest": 100}, "profiles.cpu.side_effects")
    assert set(Settings.RENAMED.values()) <= set(vars(Settings())), "a new name does not exist"


# the tables of a run, and the claims


@pytest.fixture(scope="module")
def results(model, tokens, screened):
    """Two SAEs of one model, the second one wider, as the runner would give them."""
    torch.manual_seed(19)
    settings = replace(SETTINGS, n_splits=6, n_permutations=6, group_size=6)
    wide = make_sae(model, HOOK, unit(torch.randn(160, D)), bias=-0.1)
    fixed = Fixed(screened.panel, screened.tau)
    other = Screen(model, wide, screened.downstream, tokens, settings, fixed=fixed).run()
    assert torch.equal(other.panel, screened.panel)
    made = []
    for name, one in (("a_topk", screened), ("a_topk_wide", other)):
        found = {"facts": pd.DataFrame([one.collect_facts()]), "features": one.frame.reset_index()}
        found |= analysis.make_tables(one.frame, settings, 0)
        found |= analysis.confirm_on_fresh(one, tokens[:40], settings, 0)
        made.append(runner.Result(found, task={"model": "world-text", "sae": name, "seed": 0}))
    ranked = pd.DataFrame({"latent": [0]})
    made.append(runner.Result({"ranked": ranked}, task={"output": study.RANKING}))
    return study.summarise(made, config.load("smoke"))


def test_every_claim_is_measured_or_needs_real_weights(results):
    stated = claims.load_claims("side_effects")
    made = findings.make_tables(results)
    found = findings.measure_claims(made)
    assert set(found) == set(stated)
    for name, claim in stated.items():
        lacking = claim.needs.startswith(("real weights", "null", "SAEs of several"))
        assert (found[name] is None) == lacking, name
        assert claims.judge(claim, found[name]) in claims.VERDICTS
    verdicts = {name: claims.judge(claim, found[name]) for name, claim in stated.items()}
    answer = findings.summarize(made, verdicts)
    assert 3 <= len(answer.split("\n")) <= 6
    value = found["side_effects.predict.spread_over_frequency"].value
    assert f"{value:.2f}" in answer
    assert f"{value:.2f}" in findings.make_titles(made)["gains"]
    assert "text model" in answer


def test_null_dictionaries_are_compared_with_and_have_no_vote(results):
    made = findings.make_tables(results)
    n = len(tables.select(made["facts"], seed=0))
    for name in ("facts", "random"):
        rows = made[name][made[name]["sae"] == made["facts"]["sae"].iloc[0]]
        null = rows.assign(sae=rows["sae"] + "_soft_frozen_decoder")
        made[name] = pd.concat([made[name], null], ignore_index=True)
    found = findings.measure_claims(made)
    stated = claims.load_claims("side_effects")
    assert found["side_effects.nulls.spread"].value == 0
    verdicts = {name: claims.judge(claim, found[name]) for name, claim in stated.items()}
    answer = findings.summarize(made, verdicts)
    assert f"In {n} SAEs" in answer
    assert "null dictionaries is 0.00" in answer


PREDICTIONS = [f"{a}_over_{b}" for a in ("spread", "stability") for b in ("frequency", "magnitude")]


@pytest.mark.parametrize(
    ("name", "tables", "column"),
    [
        *((f"predict.{name}", ("gains", "gains_random"), "gain") for name in PREDICTIONS),
        ("predict.spread_residualised", ("random",), "rho"),
        ("predict.stability_residualised", ("random",), "rho"),
        ("width.signal", ("random",), "rho"),
    ],
)
def test_a_claim_falls_where_random_directions_show_the_same(results, name, tables, column):
    """Planted: a large effect in every SAE, and nearly or exactly as much in random directions.

    SAEs differ as much as claim and control do, so that only SAE by SAE the gap is clear.
    """
    made = findings.make_tables(results)
    claim = claims.load_claims("side_effects")[f"side_effects.{name}"]
    for in_control, verdict in ((0.35, claims.REPRODUCED), (0.4, claims.CONFOUNDED)):
        planted = dict(made)
        for table in tables:
            rows = made[table].copy()
            level = rows["sae"].map({"a_topk": 0.0, "a_topk_wide": 0.02})
            control = in_control + level + rows["sae"].map({"a_topk": 0.001, "a_topk_wide": -0.001})
            if table == "random":
                gap = 0.4 + level - control
                of = {"SAE": 0.4 + level, "random": control, "difference": gap}
                rows[column] = np.select([rows["direction"] == d for d in of], list(of.values()))
            else:
                rows[column] = control if table == "gains_random" else 0.4 + level
            rows["low"], rows["high"] = rows[column] - 0.04, rows[column] + 0.04
            planted[table] = rows
        found = findings.measure_claims(planted)[claim.id]
        assert claims.judge(claim, found) == verdict, (in_control, found)


def test_an_unsteady_payoff_falls_where_its_sign_errs_no_more_often(results):
    made = findings.make_tables(results)
    claim = claims.load_claims("side_effects")["side_effects.width.payoff"]
    for more, verdict in ((0.1, claims.DIRECTION), (0.0, claims.CONFOUNDED)):
        widths = made["widths"].copy()
        widths["instability"] = np.where(widths["wide"], 2.0, 1.0)
        widths["wrong"] = 0.2 + more * widths["wide"]
        found = findings.measure_width_instability({**made, "widths": widths})
        assert claims.judge(claim, found) == verdict


def test_random_directions_say_nothing_where_the_sae_says_as_little(results):
    made = findings.make_tables(results)
    claim = claims.load_claims("side_effects")["side_effects.controls.random_directions"]
    for size, verdict in ((0.5, claims.REPRODUCED), (0.02, claims.UNDECIDED)):
        rows = made["sensitivity"].copy()
        steps = 0.001 * np.arange(len(rows)) / len(rows)
        rows["rho"] = np.where(rows["value"] == "random", -0.02 - steps, size + steps / 2)
        found = findings.measure_random_directions({**made, "sensitivity": rows})
        assert claims.judge(claim, found) == verdict


def test_published_values_stand_beside_a_run_on_real_weights_and_only_there(results):
    made = findings.make_tables(results)
    assert tables.compare_published(made).empty
    real = {
        name: table.replace({"world-text": "gpt2-small", "a_topk": "primary"})
        for name, table in made.items()
    }
    found = tables.compare_published(real).set_index("quantity")
    facts = real["facts"].iloc[0]
    assert found.loc["L0, primary", "target"] == "71.8 (replication, within 1)"
    assert found.loc["L0, primary", "here"] == facts["l0_primary"]
    assert found.loc["eligible features", "target"].startswith("7532")
    for quantity in (
        "crowding and C, control none",
        "residualised C, full set",
        "reliability of C",
    ):
        assert np.isfinite(found.loc[quantity, "here"])


def test_width_tables_compare_the_pair(results):
    made = findings.make_tables(results)
    assert made["widths"]["wide"].tolist() == [False, False, True, True]
    effects = made["width_effects"].set_index(["direction", "which"]).rho
    difference = effects["SAE", "4x wide"] - effects["SAE", "base"]
    assert effects["SAE", "4x wide minus base"] == pytest.approx(difference)
    assert tables.is_wide("llama-3.1-8b-32x/primary", "primary")
    assert not tables.is_wide("primary")


def test_saes_have_names_that_a_reader_understands():
    assert tables.name_sae("world-text", "block1_topk_wide") == "text model, TopK, 4x wide"
    assert tables.name_sae("world-survey", "block0_jumprelu") == "survey model, JumpReLU"
    real = "smollm2-135m-instruct"
    assert tables.name_sae(real, "block10_topk_1") == "SmolLM2 135M, TopK, seed 1"
    null = tables.name_sae(real, "block10_topk_soft_frozen_decoder")
    assert null == "SmolLM2 135M, TopK, soft-frozen"
    assert tables.name_sae("gpt2-small", "primary") == "GPT-2 small"
    assert tables.name_sae("gpt2-small", "width_768") == "GPT-2 small, 768 latents"
    assert tables.name_sae("llama-3.1-8b", "llama-3.1-8b-32x/primary") == "Llama 3.1 8B, 4x wide"
