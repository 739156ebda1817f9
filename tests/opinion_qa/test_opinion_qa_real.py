"""Study 1 on real settings: Gemma-2-2B and its tuned sibling, as miniature replicas, asked a
made-up OpinionQA.
"""

import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from sae_research import catalogue, claims, config, paths, saes
from sae_research.errors import ResearchError
from sae_research.shifts import load_shift
from sae_research.studies import runner
from sae_research.studies.opinion_qa import baselines, experiment, findings, methods, readers
from sae_research.studies.opinion_qa.settings import LoRATraining, Settings, ShiftTraining
from sae_research.surveys import group_prompts, prompts, published, scores
from sae_research.surveys.prompts import ENGLISH_TEMPLATE
from sae_research.surveys.survey import Group, Question, Survey

pytestmark = pytest.mark.usefixtures("offline_hub")

WAVES, UNSEEN = {26: 16, 34: 4}, (34,)
ATTRIBUTES = {"SEX": ("Male", "Female"), "AGE": ("18-29", "30-49", "65+")}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module", autouse=True)
def loaded_once(offline_hub):
    """A model of 26 blocks takes seconds to load, and the study loads it for every layer and seed:
    each is loaded once and, frozen as it is, shared.
    """
    load = catalogue.ModelSpec.load
    known: dict = {}

    def once(spec, **given):
        key = (spec.name, *sorted(given.items()))
        if key not in known:
            known[key] = load(spec, **given)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue.ModelSpec, "load", once)
        yield


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """OpinionQA's layout with made-up questions: twins of one wording in each wave, groups that
    truly differ.
    """
    data = tmp_path_factory.mktemp("data")
    folder, draws = data / "private" / "opinion_qa", np.random.default_rng(0)
    words = ["".join(draws.choice(list("abcdefghij"), 3)) for _ in range(200)]
    for wave, size in WAVES.items():
        place, items = folder / "human_resp" / f"American_Trends_Panel_W{wave}", []
        for n in range(size):
            if n % 2 == 0:
                stem = " ".join(draws.choice(words, 4, replace=False))
            options = ["No", "Perhaps", "Yes"][: 2 + n % 2]
            items.append(
                {
                    "key": f"Q{n}_W{wave}",
                    "question": f"{stem} {words[n]}?",
                    "references": str([*options, "Refused"]),
                    "option_ordinal": str([float(i + 1) for i in range(len(options))]),
                }
            )
        write_rows(place / "info.csv", items)
        write_rows(
            place / "metadata.csv",
            [{"key": k, "options": str(list(v))} for k, v in ATTRIBUTES.items()],
        )
        people = []
        for _ in range(400):
            who = {k: str(draws.choice(v)) for k, v in ATTRIBUTES.items()}
            trait = (who["SEX"] == "Male") - (who["AGE"] == "65+")
            row = {**who, f"WEIGHT_W{wave}": round(float(draws.uniform(0.5, 2)), 3)}
            for n, item in enumerate(items):
                top = 1 + n % 2
                side = 1 if n // 2 % 2 else -1
                row[item["key"]] = ["No", "Perhaps", "Yes"][
                    draws.binomial(top, 1 / (1 + np.exp(-side * trait)))
                ]
                if draws.random() < 0.02:
                    row[item["key"]] = "Refused"
            people.append(row)
        write_rows(place / "responses.csv", people)
    texts = [" ".join(draws.choice(words, 60)) for _ in range(20)]
    (folder / "passages.txt").write_text("\n".join(texts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "DATA", data)
        patch.setattr(Settings, "READERS_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module")
def profile():
    """The gpu profile's study with everything small that costs time, at deep layers, which leave
    little to rerun.
    """
    quick = replace(
        ShiftTraining(),
        steps=1,
        calibration_steps=1,
        batch_size=2,
        n_groups=3,
        n_documents=2,
        eval_every=1,
        rank=2,
        lr=0.03,
    )
    settings = replace(
        Settings(),
        waves=tuple(WAVES),
        unseen_waves=UNSEEN,
        sae="layer_20",
        layers=("layer_18", "layer_24"),
        training=quick,
        lora=LoRATraining(steps=1, batch_size=2),
        kl_weights=(1.0,),
        sparsity_weights=(0.1,),
        ranks=(1,),
        n_documents=2,
        coefficients=(0.0, 1.0),
        few_shot_sizes=(10,),
        few_shot_steps=1,
        top_latents=(1,),
        n_holdout_rounds=1,
        unseen_attributes=False,
        max_rows_per_forward=64,
        first_seed_only=(
            *(
                f"{space} {kind}"
                for space in ("random", "PCA")
                for kind in ("multiplicative", "gated", "additive")
            ),
            "SAE literal",
            "raw coordinates multiplicative",
            "dense vector, free",
            "per-token vector",
            "per-group vector",
            "two stages",
            "movement penalty",
            "last token only",
            "at layer_18",
            *(f"SAE {kind}, no KL term" for kind in ("multiplicative", "gated", "additive")),
            *(
                f"at layer_{n}, {what}"
                for n in (18, 24)
                for what in ("last token only", "dense vector")
            ),
        ),
    )
    # bfloat16, as a GPU would have it, where this processor multiplies in it: others take 20 times
    # as long
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = config.Runtime().dtype if native else "float32"
    runtime = replace(config.Runtime(), device="cpu", threads=1, seeds=2, dtype=dtype)
    return config.Profile("gpu", runtime=runtime, studies={"opinion_qa": settings})


def test_a_real_model_runs_from_reader_s_files_to_claims(private, profile, tmp_path):
    name = "gemma-2-2b"
    found = runner.run_study("opinion_qa", profile, tmp_path / "scratch")[name]
    facts, tables = found.facts, found.tables
    assert facts["noop"] < 1e-5
    assert facts["model"] == name
    assert facts["groups"] == 5
    assert facts["latents"] == 48
    assert 0 < facts["reliability"] < 1
    assert 0 < facts["sampling_noise"] < 0.1
    assert 0 < facts["refusal"] < 1
    layers = tables["layers"]
    assert layers["role"].tolist() == ["layer_20", "layer_18", "layer_24"]
    assert layers["blocks"].tolist() == [21, 19, 25]
    assert findings.deepest_layer(tables)["all"] == "at layer_24"
    topics = tables["topics"].query("method == 'no steering'").set_index("topic")["seen"].to_dict()
    assert topics == {"wave 26": True, "wave 34": False}
    assert tables["axes"].empty  # nothing is planted
    assert tables["composition"].empty
    assert len(tables["scores"].query("method == 'at layer_24'")) == 2
    assert len(tables["scores"].query("method == 'at layer_18'")) == 1
    assert np.isfinite(
        tables["scores"][["wd", "kl", "rho_dev", "slope", "swap", "skill"]].to_numpy()
    ).all()
    untold = tables["scores"].query("method in ['prompt QA', 'uniform']")["moved"]
    assert untold.isna().all()  # what was not measured is not printed as a number

    folder = paths.artefacts("gpu", "opinion_qa") / name
    text = "".join(path.read_text() for path in folder.rglob("*.csv"))
    items = published.load_opinion_qa(private, tuple(WAVES)).questions
    assert not any(question.key in text for question in items)  # no table holds Pew's items
    again = load_shift(
        folder / "files" / "shift",
        catalogue.get(name).load(dtype=profile.runtime.dtype),
        catalogue.get(name).sae("layer_20"),
    )
    assert again.shift.groups == ("Male", "Female", "18-29", "30-49", "65+")
    answer = again.answer(items[0], "Male")
    assert sum(answer.values()) == pytest.approx(1, abs=1e-4)
    measured = findings.measure_claims(tables, facts)
    stated = claims.load_claims("opinion_qa")
    verdicts = {i.removeprefix("opinion_qa."): claims.judge(stated[i], measured[i]) for i in stated}
    for planted in (
        "shift.negative_control",
        "h4.composition",
        "h4.correlated",
    ):
        assert verdicts[planted] == "not testable here"
    assert verdicts["real.gemma"] != "not testable here"


def test_the_tuned_model_is_steered_and_prompted_too(private, profile):
    exp = experiment.load_experiment(profile, "gemma-2-2b-it", 0)
    prompted = exp.group_prompts()
    choice = methods.choose_settings(exp, "SAE multiplicative", 0)
    outcomes = [
        methods.train_method(exp, "SAE multiplicative", choice.best, 0),
        readers.evaluate_probe(exp, prompted)[1],
        *baselines.evaluate_prompting(exp, {"BIO": prompted}),
        *readers.evaluate_lora(exp, prompted, 0),
    ]
    for outcome in outcomes:
        assert outcome.answers.shape == (5, len(exp.eval_set.questions), 3), outcome.name
        assert np.allclose(outcome.answers.sum(-1), 1, atol=1e-5), outcome.name
    assert methods.measure_noop(exp) == 0
    words = exp.cache.prompts.last
    told = (
        prompted.prompts[0].last - words
    )  # the note on the group comes on top of the same words and turns
    assert (told > 0).all()
    assert (group_prompts.shared_ending(prompted.prompts[0], exp.cache.prompts) < words).all()


def test_waves_families_and_small_groups_are_kept_apart(private, profile):
    exp = experiment.load_experiment(profile, "gemma-2-2b", 0)
    by_family = pd.DataFrame(
        {"family": exp.clusters, "split": [q.split for q in exp.survey.questions]}
    )
    assert (by_family.groupby("family")["split"].nunique() == 1).all()
    assert by_family["family"].nunique() == len(by_family) / 2  # twins
    assert {q.split for q in exp.survey.questions if q.topic == "wave 34"} == {"test"}
    assert exp.eval_set.clusters.max() + 1 == by_family.query("split == 'test'")["family"].nunique()
    assert [len(exp.cache.texts[split]) for split in experiment.SPLITS] == [2, 2, 2]


def test_the_tuned_model_is_asked_in_its_chat_template_and_answers_after_the_same_words(
    private, profile
):
    exp = experiment.load_experiment(profile, "gemma-2-2b-it", 0)
    tokenizer, first = exp.cache.model.tokenizer, exp.cache.prompts
    text = tokenizer.decode(first.tokens[0, : first.last[0] + 1])
    assert text.startswith("<bos><start_of_turn>user\nQuestion:")
    assert text.endswith("<end_of_turn>\n<start_of_turn>model\nAnswer:")
    assert text.count("<bos>") == 1
    assert exp.template.refusal_prompt(exp.survey.questions[0], False).count(prompts.REFUSAL) == 1
    group = exp.survey.groups[0]
    told = exp.template.group_prompt("BIO", group, exp.survey.groups[:2])(
        exp.survey.questions[0], False
    )
    assert told.index("<start_of_turn>user") < told.index("Male") < told.index("Question:")
    with pytest.raises(ResearchError, match="no chat template"):
        prompts.use_chat_template(ENGLISH_TEMPLATE, catalogue.get("gemma-2-2b").load().tokenizer)


def test_only_the_catalogue_may_put_saes_on_another_model():
    tuned = catalogue.get("gemma-2-2b-it")
    model = tuned.load()
    assert saes.check_fit(model, tuned.sae("primary")) == model.hook("blocks.12.hook_resid_post")
    with pytest.raises(
        ResearchError, match="trained on the model 'gemma-2-2b', not on 'google/gemma-2-2b-it'"
    ):
        saes.check_fit(model, catalogue.get("gemma-2-2b").sae("primary"))


def poll(counts, attributes):
    """A survey of as many two-option questions as `counts` [groups, questions, 2] has."""
    counts = np.array(counts)
    questions = tuple(
        Question(f"Q{i}", f"{i}?", ("No", "Yes"), (1, 2), split="test")
        for i in range(counts.shape[1])
    )
    groups = tuple(Group(a, f"{a}{i}", 0.5) for i, a in enumerate(attributes))
    shares = counts / counts.sum(-1, keepdims=True)
    return Survey(questions, groups, shares, shares.mean(0), counts=counts)


def test_groups_with_few_answers_and_those_that_then_stand_alone_are_left_out():
    many, few = [[30, 10], [10, 30]], [[30, 10], [2, 3]]
    kept = experiment.drop_small_groups(
        poll([many, many, few, many, few], ["a", "a", "a", "b", "b"]), 20
    )
    assert [g.name for g in kept.groups] == ["a0", "a1"]
    with pytest.raises(ResearchError, match="no attribute has two groups with 50 answers"):
        experiment.drop_small_groups(poll([many, many], ["a", "a"]), 50)


def test_groups_that_do_not_differ_are_refused():
    draws = np.random.default_rng(0)
    same = draws.multinomial(200, [0.5, 0.5], size=(4, 30))
    with pytest.raises(ResearchError, match="split-half reliability"):
        scores.make_eval_set(
            poll(np.repeat(same[:1], 2, 0) // 2 * 2, ["a", "a"]), [str(i) for i in range(30)]
        )


def test_a_reader_without_the_files_is_told_what_to_do(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(Settings, "READERS_DATA", str(tmp_path))
    with pytest.raises(ResearchError, match="put your own copy"):
        experiment.load_experiment(profile, "gemma-2-2b", 0)
