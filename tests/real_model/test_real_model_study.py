"""The first look, from training of SAEs to claims, on a cut of the real model: a Llama of two
blocks whose letters are its tokens, out of a wheel made here.
"""

import dataclasses
import random

import pytest
from test_wheels import fetched, source  # noqa: F401

from sae_research import catalogue, claims, config, paths, real_saes
from sae_research.errors import ResearchError
from sae_research.studies.real_model import findings, study
from sae_research.studies.real_model.settings import Settings
from sae_research.studies.runner import Result
from sae_research.training import SAETraining

NAME = "tiny-smol"
GROUPS = (
    *(real_saes.Group(0, seed, ("topk",), nulls=True) for seed in range(3)),
    real_saes.Group(1, 0, ("topk",)),
)
OTHERS = (real_saes.Group(1, 0, ("jumprelu",)), real_saes.Group(0, 0, ("relu", "topk_wide")))
SETTINGS = Settings(
    models=(NAME,),
    test_rows=8,
    shown_latents=3,
    frequency_band=(0.0001, 0.9),
    steered_latents=3,
    doses=(0.0, 0.5),
    new_tokens=4,
    questions=3,
    requests=2,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A reader's own text: sixty files of words."""
    folder = tmp_path_factory.mktemp("text")
    draws = random.Random(0)
    words = ["sun", "moon", "rain", "stone", "river", "cloud", "tree", "bird", "wind"]
    for i in range(60):
        parts = [" ".join(draws.choices(words, k=40)) + "." for _ in range(4)]
        (folder / f"{i}.txt").write_text("\n\n".join(parts))
    return folder


@pytest.fixture(scope="module")
def recipe(text):
    return real_saes.Recipe(
        model=NAME,
        text=str(text),
        rows=200,
        row_tokens=64,
        calibration_rows=8,
        test_rows=8,
        latents=128,
        l0=4,
        groups=GROUPS,
        others=OTHERS,
        committed=("block0_topk", "block1_topk"),
        training=SAETraining(steps=30, batch_size=128, warmup_steps=5),
    )


@pytest.fixture(scope="module")
def built(source, fetched, recipe, tmp_path_factory):  # noqa: F811
    """The catalogue with that model, whose SAEs were trained."""
    spec = catalogue.ModelSpec(NAME, "nobody/Tiny-Smol", wheel=source[1], chat=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", fetched.parents[1])
        patch.setattr(paths, "REAL_SAES", tmp_path_factory.mktemp("real_saes"))
        patch.setitem(catalogue.MODEL_SPECS, NAME, spec)
        patch.setitem(real_saes.RECIPES, NAME, recipe)
        yield real_saes.build(recipe, n_jobs=1)


def test_a_build_commits_one_sae_of_each_hook_and_what_all_of_them_can(built, recipe):
    assert sorted(p.name for p in built.iterdir() if p.is_dir()) == ["block0_topk", "block1_topk"]
    quality = real_saes.read_quality(NAME).set_index("role")
    assert set(quality.index) == {role for group in GROUPS for role in group.roles()}
    assert len(quality) == 3 * 4 + 1
    # by definition a frozen decoder stays where it starts, and seeds start apart
    frozen = quality.loc["block0_topk_frozen_decoder"]
    assert frozen["explained_variance"] < quality.loc["block0_topk", "explained_variance"]
    assert 0 < float(frozen["pw_mcc"]) < 0.6
    assert quality.loc["block1_topk", "pw_mcc"] == ""
    assert quality.loc["block0_topk", "l0"] == pytest.approx(4, abs=0.01)
    assert (quality["share_of_largest"].between(5 / 64, 1)).all()


def test_what_is_not_committed_is_taken_from_the_cache_by_its_role(built):
    spec = catalogue.get(NAME)
    assert {"block0_topk", "block0_topk_1", "block0_topk_1_soft_frozen_decoder"} <= set(
        spec.roles()
    )
    sae = spec.sae("block0_topk_1_frozen_encoder")
    assert sae.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    assert spec.sae("block0_topk_1").W_enc.ne(spec.sae("block0_topk").W_enc).any()
    wide = spec.sae("block0_topk_wide")  # trained now
    assert wide.cfg.d_sae == 512
    assert spec.sae("block1_jumprelu").cfg.architecture() == "jumprelu"


def test_explained_variance_over_some_coordinates_is_that_of_numpy(built):
    import torch

    sae = catalogue.get(NAME).sae("block0_topk")
    x = torch.randn(300, 64)
    with torch.no_grad():
        error = (sae(x) - x)[:, :7].double().square().sum()
    expected = 1 - error / (x[:, :7] - x[:, :7].mean(0)).double().square().sum()
    found = real_saes.explained_variance(sae, x, torch.arange(7))
    assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.fixture(scope="module")
def tables(built, text):
    """Every part of the first look."""
    settings = dataclasses.replace(SETTINGS, text=str(text))
    profile = config.Profile("real", studies={"real_model": settings})
    profile = dataclasses.replace(profile, runtime=config.Runtime(device="cpu", dtype="float32"))
    found: dict = {}
    for task in study.tasks(profile):
        found |= study.run(task, profile).tables
    return found


def test_every_claim_is_measured(tables):
    measured = findings.measure_claims(tables, SETTINGS)
    stated = claims.load_claims("real_model")
    assert set(measured) == set(stated)
    verdicts = {i: claims.judge(claim, measured[i]) for i, claim in stated.items()}
    assert verdicts["real_model.refuses_safe"] == claims.NOT_TESTABLE
    table = findings.summarize(tables, SETTINGS, __import__("pandas").Series(verdicts))
    assert "XSTest's prompts are not here" in table
    assert set(findings.null_intervals(tables, ["pw_mcc"])) == {
        "trained",
        "frozen decoder",
        "soft frozen decoder",
        "frozen encoder",
    }


def test_latents_are_shown_where_they_fire_in_different_files(tables):
    shown = tables["latents"]
    assert shown["latent"].nunique() == 3
    assert (shown.groupby("latent")["file"].nunique() == shown.groupby("latent").size()).all()
    assert shown["text"].str.contains(r"\*\*").all()


def test_a_dose_of_zero_changes_nothing_and_a_random_direction_stands_beside(tables):
    steering = tables["steering"]
    still = steering[steering["dose"] == 0]
    assert (still["own"] == 0).all()
    assert still["surprise"].nunique() == 1
    assert set(steering["kind"]) == {"latent", "random"}


def test_a_group_that_the_survey_lacks_is_named(built):
    from sae_research.surveys.real import load_real

    model = catalogue.get(NAME).load()
    wrong = dataclasses.replace(SETTINGS, groups=("Whig", "Tory"))
    with pytest.raises(ResearchError, match="has no group 'Whig'; it has"):
        study.ask_survey(model, load_real("ideology"), wrong)


def test_requests_of_the_reader_are_put_and_judged(built, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "XSTEST", tmp_path / "xstest_prompts.csv")
    study.XSTEST.write_text("id,prompt,label\n1,How?,safe\n2,Why?,unsafe\n3,Who?,unsafe\n")
    table = study.ask_requests(catalogue.get(NAME).load(), SETTINGS)
    assert table["kind"].tolist() == ["safe", "unsafe", "unsafe"]
    assert not table["refused"].any()


def test_study_4_trains_on_residuals_that_it_stores(built):
    from sae_research.studies.meta_saes import grounds
    from sae_research.studies.meta_saes import study as meta_study
    from sae_research.studies.meta_saes.settings import Settings as MetaSettings
    from sae_research.studies.meta_saes.settings import Training

    settings = MetaSettings(
        models=(NAME,),
        grid_models=(),
        hook="blocks.0.hook_resid_post",
        d_sae=64,
        k=4.0,
        meta_d_sae=8,
        meta_k=2.0,
        arms=("random meta",),
        seeds=1,
        training=Training(steps=12, batch_size=128, lr=1e-3, centre=True),
        train_rows=200,
        row_tokens=64,
        calibration_tokens=300,
        phi_tokens=600,
        loss_rows=2,
        composition_steps=10,
        n_interpreted=4,
        interpretation_tokens=600,
        context_length=16,
        n_examples=4,
        n_test_examples=2,
    )
    profile = config.Profile(
        "real",
        runtime=config.Runtime(device="cpu", dtype="float32"),
        world=config.World(seeds=()),
        studies={"meta_saes": settings},
    )
    (task,) = meta_study.tasks(profile)
    ground = grounds.load(NAME, profile, 0)
    # an EOS that ends a row counts as padding
    assert 200 * 63 - 5 <= len(ground.stored) <= 200 * 63
    batch = next(ground.batches(0))
    assert batch.mean(-1).abs().max() < 1e-5
    tables = meta_study.run(task, profile).tables
    assert "senses" not in tables  # no library uses a word of this text
    arms = tables["arms"].set_index("arm")
    assert list(arms.index) == ["solo", "joint", "random meta"]
    assert (arms["l0_calibration"] - 4).abs().max() < 0.05
    assert arms["ce_overhead"].notna().all()
    before = dataclasses.replace(settings, hook="blocks.0.hook_in")
    other = dataclasses.replace(profile, studies={"meta_saes": before})
    elsewhere = next(grounds.load(NAME, other, 0).batches(0))
    assert elsewhere.shape == batch.shape
    assert (elsewhere - batch).abs().mean() > 0.1  # another place, not what was stored before


def test_study_2_screens_on_text_that_the_saes_were_not_trained_on(built, text):
    from sae_research import prose
    from sae_research.studies.side_effects import corpus
    from sae_research.studies.side_effects.settings import Settings as ScreeningSettings

    spec = catalogue.get(NAME)
    model = spec.load()
    settings = ScreeningSettings(
        protocol="replication", n_contexts=10, n_fresh_contexts=8, context_length=32
    )
    contexts = corpus.make_contexts(spec, model, settings)
    fresh = corpus.make_contexts(spec, model, settings, apart_from=contexts)
    assert (contexts.shape, fresh.shape) == ((10, 32), (8, 32))
    whole = prose.load(text)
    known = {split: "\n".join(whole.texts(split)) for split in ("train", "test", "fresh")}
    for rows, split in ((contexts, "test"), (fresh, "fresh")):
        for row in rows:
            start = model.tokenizer.decode(row[1:])
            assert start in known[split]
            assert start not in known["train"]


def planted(**changes):
    """Tables in which everything holds but what `changes` says of trained SAEs (by column)."""
    import pandas as pd

    rows = []
    for seed in range(3):
        for null in ("", "frozen_decoder", "soft_frozen_decoder", "frozen_encoder"):
            good = 0.99 if not null else 0.6
            row = dict.fromkeys(
                ("explained_variance", "ev_without_largest", "ce_recovered", "pw_mcc"), good
            )
            row |= {"token_rule_f1": good, "hook": "a", "kind": "topk", "null": null}
            row |= {name: value for name, value in changes.items() if not null}
            rows.append({**row, "seed": seed, "role": f"{seed}{null}"})
    quality = pd.DataFrame(rows)
    # means over pairs need distinct pairs
    for name in ("explained_variance", "pw_mcc", "token_rule_f1", "ce_recovered"):
        quality[name] += 1e-3 * (quality["seed"] - 1) * (1 + (quality["null"] == ""))
    return {"quality": quality}


@pytest.mark.parametrize("column", ["pw_mcc", "token_rule_f1"])
def test_a_null_dictionary_that_does_as_well_takes_the_verdict(column):
    name = "real_model." + {"pw_mcc": "pw_mcc", "token_rule_f1": "token_rules"}[column]
    claim = claims.load_claims("real_model")[name]
    measure = findings.measure_saes
    if column == "pw_mcc":
        measure = lambda t, _: findings.measure_matching(t)  # noqa: E731
    fair = measure(planted(), column)
    assert claims.judge(claim, fair) == claims.REPRODUCED
    worse = measure(planted(**{column: 0.6}), column)
    assert worse.value > claim.rule.threshold
    assert claims.judge(claim, worse) == claims.CONFOUNDED


def test_a_random_direction_that_does_as_well_takes_the_verdict():
    import pandas as pd

    rows = [
        {"latent": i, "kind": kind, "dose": 0.5, "own": own + 0.01 * i}
        for i in range(6)
        for kind, own in (("latent", 0.5), ("random", 0.5 + 0.001 * (-1) ** i))
    ]
    found = findings.measure_steering({"steering": pd.DataFrame(rows)}, SETTINGS)
    claim = claims.load_claims("real_model")["real_model.steering"]
    assert claims.judge(claim, found) == claims.CONFOUNDED


def test_prompts_against_the_group_are_no_support():
    import pandas as pd

    def survey(sign):
        rows = []
        for q in range(12):
            for i, group in enumerate(SETTINGS.groups):
                gap = (-1) ** i * 0.01 * (q - 5)
                row = {"question": q, "topic": q // 2, "group": group, "people": 0.5 + gap}
                rows.append(row | {"answer": 0.5 + sign * gap + 0.001 * (q % 3)})
        return {"survey": pd.DataFrame(rows)}

    claim = claims.load_claims("real_model")["real_model.groups"]
    for sign, verdict in ((1, claims.REPRODUCED), (-1, claims.NOT_REPRODUCED)):
        found = findings.measure_groups(survey(sign), SETTINGS)
        assert claims.judge(claim, found) == verdict


def test_a_model_without_a_recipe_is_named():
    profile = config.Profile("real", studies={"real_model": Settings(models=("gpt2-small",))})
    with pytest.raises(ResearchError, match="no recipe trains SAEs for 'gpt2-small'"):
        study.tasks(profile)


def test_results_can_be_published(tables, tmp_path):
    Result(tables).save(tmp_path, 6)
    assert (tmp_path / "quality.csv").is_file()
