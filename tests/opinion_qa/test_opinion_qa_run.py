"""Study 1 from end to end on a toy model that was never trained, and what its claims measure."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from miniatures import random_sae

from sae_research import claims
from sae_research.studies import runner
from sae_research.studies.opinion_qa import experiment, findings, methods, study
from sae_research.studies.opinion_qa import tables as tables_of
from sae_research.studies.opinion_qa.settings import LoRATraining, Settings, ShiftTraining
from sae_research.surveys import intervals
from sae_research.surveys import scores as evaluate
from sae_research.surveys.prompts import TOY_TEMPLATE
from sae_research.surveys.scores import EvalSet

HOOK = "blocks.0.hook_resid_post"


def test_a_model_is_run_judged_saved_and_every_claim_measured(
    model, small, cache, fresh, population, tmp_path
):
    trained_saes = []
    for place in (HOOK, "blocks.1.hook_resid_post"):
        made = random_sae("topk", width=32, latents=64, k=8)
        made.cfg.metadata.hook_name, made.cfg.metadata.model_name = place, "world-survey"
        trained_saes.append(made)
    quick = ShiftTraining(
        kind="gated",
        calibration="axes",
        lr=0.03,
        steps=2,
        calibration_steps=2,
        batch_size=4,
        n_documents=2,
        n_kl_groups=2,
        eval_every=2,
        rank=2,
    )
    settings = Settings(
        training=quick,
        lora=LoRATraining(steps=1, batch_size=4),
        respondents=300,
        coefficients=(0.0, 1.0),
        ranks=(1,),
        few_shot_sizes=(2, 10),
        few_shot_steps=4,
        top_latents=(1, 5),
        kl_weights=(1.0,),
        sparsity_weights=(1.0,),
        layers=("block1",),
        lora_per_group=True,
    )
    splits = [("train", "validation", "test")[i % 5 // 3 + i % 5 // 4] for i in range(18)]
    questions = tuple(replace(q, split=s) for q, s in zip(small.questions, splits, strict=True))
    truth = replace(small, questions=questions)
    cut = slice(0, 18)
    pair = population.survey("party", "age")
    crossed = replace(
        pair,
        questions=questions,
        distributions=pair.distributions[:, cut],
        overall=pair.overall[cut],
        web=pair.web[cut],
    )
    names = [f"{q.topic} {q.verb}" for q in questions]
    exp, deeper = (
        experiment.make_experiment(
            settings, model, sae, TOY_TEMPLATE, truth, names, cache.texts, 0, fresh, [crossed]
        )
        for sae in trained_saes
    )
    assert methods.measure_noop(exp) < 1e-5
    assert exp.l0 == pytest.approx(8)
    assert methods.method_names(exp) == list(methods.METHODS)
    grid = replace(exp, settings=replace(settings, sparsity_weights=(0.0, 1e3)))
    choice = methods.choose_settings(grid, "SAE gated", 0)
    assert choice.sparse.sparsity_weight >= choice.best.sparsity_weight
    plan = methods.make_plan(
        {name: methods.choose_settings(exp, name, 0) for name in methods.method_names(exp)}
    )
    edits = {f"SAE {kind}": plan.choices[f"SAE {kind}"].loss for kind in methods.ERROR_KEEPING}
    assert plan.headline == min(edits, key=edits.get)
    parts = [study.measure_seed(exp, {"block1": deeper}, plan, seed) for seed in (0, 1)]
    results, tables = parts[0]
    headline = next(r for r in results if r.name == plan.headline)
    names = [r.name for r in results]
    layers = tables["layers"]
    assert layers["role"].tolist() == ["primary", "block1"]
    assert layers["blocks"].tolist() == [1, 2]
    assert set(layers[["all", "answer", "dense"]].to_numpy().ravel()) <= set(names)
    assert (layers["explained"] < 1).all()
    made = tables["composition"]
    assert made["kappa"].between(0.5, 1.2).all()
    assert (made["people's margins, added"] < made["population"]).mean() > 0.5
    assert "trained on them" in made
    assert "trained on them" not in parts[1][1]["composition"]
    left = tables["new_groups"]
    assert left.query("way == 'population'")["group"].nunique() == 12
    assert left.query("way == 'population, attribute unseen'")["group"].nunique() == 14
    assert len(names) == len(set(names))
    for row in results:
        assert row.answers.shape == (14, len(exp.eval_set.questions), 4), row.name
        assert np.allclose(row.answers.sum(-1), 1, atol=1e-5), row.name
        assert np.isnan(row.moved) or 0 <= row.moved <= 1, row.name
        assert np.isnan(row.silent) or 0 <= row.silent <= row.coordinates, row.name
        assert row.parameters >= 0, row.name
    silent = {row.name: row.cost.loss for row in results}
    assert silent["no steering"] == 0
    assert silent["SAE additive"] != 0
    assert silent["last token only"] == 0  # it leaves other text as it is

    saved = []
    for seed, (found, own) in enumerate(parts):
        packed, tensors = study._pack(found)
        result = runner.Result({**own, "results": packed}, {}, tensors, task={"seed": seed})
        folder = tmp_path / str(seed)
        folder.mkdir()
        result.save(folder)
        saved.append(runner.load_result(folder))
    again = study.unpack(saved[0])
    assert [r.name for r in again] == names
    for one, other in zip(again, results, strict=True):
        assert np.array_equal(one.answers, other.answers)
        assert one.cost == other.cost or np.isnan(other.cost.loss)
    cards = study.make_cards(exp, headline)
    assert set(cards) == set(headline.shift.groups)
    assert all(len(card["main_latents"]) <= 5 for card in cards.values())

    by_seed = {r.task["seed"]: study.unpack(r) for r in saved}
    tables = tables_of.make_tables(exp.eval_set, by_seed, plan) | tables_of.join_seeds(saved)
    prompt = next(name for name in names if name.endswith("(best on validation)"))
    about = {"headline": plan.headline, "prompt": prompt, "noop": 0.0, "model": "world-survey"}
    found = findings.measure_claims(tables, about)
    stated = claims.load_claims("opinion_qa")
    assert set(found) == set(stated)
    for name, claim in stated.items():
        assert claims.judge(claim, found[name]) in claims.VERDICTS
    verdicts = {name: claims.judge(claim, found[name]) for name, claim in stated.items()}
    words = findings.summarize(tables, about, verdicts)
    assert f"*{verdicts['opinion_qa.shift.fit']}*" in words


# choosing


def test_validation_decides_between_edits_and_ties_go_by_paired_errors():
    def choice(loss):
        return methods.Choice(ShiftTraining(), ShiftTraining(), loss, 0.0)

    losses = {
        "SAE gated": 0.3,
        "SAE multiplicative": 0.2,
        "SAE additive": 0.4,
        "SAE literal": 0.1,
        "PCA gated": 0.0,
    }
    plan = methods.make_plan({name: choice(loss) for name, loss in losses.items()})
    assert plan.headline == "SAE multiplicative"  # the literal edit and other spaces do not compete
    assert methods.within_one_error(np.zeros(4))
    assert methods.within_one_error(np.array([-1.0, 1.0, -1.0, 1.2]))
    assert not methods.within_one_error(np.full(4, 0.01))  # small, but the same everywhere


# findings


def rows(**columns):
    return pd.DataFrame(columns)


def test_composition_is_set_against_the_margin_that_is_better_on_average():
    table = rows(
        pair=["a|b"] * 4,
        seed=[0] * 4,
        cluster=[0, 1, 2, 3],
        **{
            "margin 1": [0.2, 0.2, 0.2, 0.2],
            "margin 2": [0.1, 0.5, 0.1, 0.5],
            "composed": [0.1, 0.1, 0.15, 0.05],
        },
    )
    found = findings.compare_composition({"composition": table})
    assert found.value == pytest.approx(-0.1)
    assert found.n == 4


def test_new_groups_are_compared_group_by_group_and_question_by_question():
    table = rows(
        way=["scores"] * 4 + ["population"] * 4,
        n_questions=[10] * 4 + [0] * 4,
        seed=[0] * 8,
        group=["x", "x", "y", "y"] * 2,
        cluster=[0, 1] * 4,
        wd=[0.1, 0.3, 0.2, 0.4, 0.2, 0.3, 0.4, 0.5],
    )
    found = findings.compare_new_groups({"new_groups": table}, ("scores", 10), ("population", 0))
    assert found.value == pytest.approx(-0.1)
    assert found.n == 2
    assert (
        findings.compare_new_groups({"new_groups": table}, ("scores", 50), ("population", 0))
        is None
    )


def test_the_quietest_attribute_is_the_one_that_truly_moves_least(small):
    eval_set = EvalSet(small, np.arange(18))
    true = intervals.quietest_share_interval(eval_set, eval_set.truth[None], 0)
    assert true.value < 1e-6  # hands answer alike
    names = np.array([g.attribute for g in small.groups])
    moved = eval_set.truth.copy()
    moved[names == "hand"] = eval_set.truth[names == "party"][:2]
    assert intervals.quietest_share_interval(eval_set, moved[None], 0).value > 0.3


def test_one_group_that_loses_is_seen(small):
    eval_set = EvalSet(small, np.arange(18))
    before = np.repeat(small.overall[None], 14, 0)
    after = eval_set.truth.copy()
    assert intervals.worst_change_interval(eval_set, after[None], 0, before[None]).value <= 0
    after[3] = small.uniform
    assert intervals.worst_change_interval(eval_set, after[None], 0, before[None]).value > 0.02


def test_slope_and_identification_with_intervals_are_those_of_the_scores(small):
    eval_set = EvalSet(small, np.arange(18))
    mean = np.tensordot(small.weights, eval_set.truth, 1)
    shrink_targets = mean + 0.5 * (eval_set.truth - mean)
    known = evaluate.compute_scores(eval_set, shrink_targets, np.repeat(small.uniform[None], 14, 0))
    for name in ("slope", "identification"):
        found = getattr(intervals, f"{name}_interval")(
            eval_set, np.stack([shrink_targets, shrink_targets]), 0
        )
        assert found.value == pytest.approx(getattr(known, name))
        assert found.low <= found.value <= found.high


def test_a_ratio_of_distances_is_exact_for_a_method_against_itself(small):
    eval_set = EvalSet(small, np.arange(18))
    uniform = np.repeat(small.uniform[None, None], 14, 1)
    assert intervals.wd_ratio_interval(eval_set, uniform, 0, uniform).low == pytest.approx(1)
    half = (uniform + eval_set.truth[None]) / 2
    found = intervals.wd_ratio_interval(eval_set, half, 0, uniform)
    assert found.value == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
