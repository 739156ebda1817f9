"""The synthetic testbed as it is committed: whole, small, open to other tools, and good enough to
stand on.
"""

import shutil

import numpy as np
import pytest

from sae_research import claims, models, saes, stats, store
from sae_research.errors import ResearchError
from sae_research.paths import EMBEDDED
from sae_research.world import build, findings
from sae_research.world.checks import Check
from sae_research.world.survey import checks as survey_checks
from sae_research.world.survey import model as survey_model
from sae_research.world.text import checks as text_checks
from sae_research.world.text import demo
from sae_research.world.text import model as text_model

SLACK = 0.01
"""How far a number may fall below its bar on fewer documents than notebook 00 measures."""


@pytest.fixture(scope="module")
def checks():
    texts = text_checks.measure(
        build.model_folder("text"),
        build.saes_folder("text"),
        text_model.TextSettings(),
        seed=900,
        size=1000,
    )
    surveys = survey_checks.measure(
        build.model_folder("survey"),
        build.saes_folder("survey"),
        survey_model.SurveySettings(),
        seed=900,
    )
    return {"text": texts, "survey": surveys}


@pytest.mark.slow
def test_every_check_is_met(checks):
    missed = [
        f"{g.name}: {g.value:.4f}, bar {g.required}"
        for models_checks in checks.values()
        for g in models_checks
        if not g.meets(g.required, SLACK)
    ]
    assert not missed


def test_the_testbed_fits_in_sixteen_megabytes():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 16 * 2**20


@pytest.mark.parametrize("name", build.TOY_MODELS)
def test_models_and_saes_open_in_other_tools_and_fit(name):
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build.model_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).vocab_size == model.config.vocab_size
    adapter = models.load_model(folder)
    kinds = set()
    for path in build.sae_folders(name).values():
        sae = SAE.load_from_disk(path)
        assert saes.check_fit(adapter, sae).startswith("blocks.")
        kinds.add((sae.cfg.architecture(), saes.hook_of(sae)))
    assert len({hook for _, hook in kinds}) == 2
    assert {kind for kind, _ in kinds} == {"topk", "jumprelu", "standard"}


def test_an_altered_file_is_named(tmp_path):
    shutil.copytree(EMBEDDED / "survey", tmp_path / "survey")
    weights = tmp_path / "survey" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ResearchError, match=r"model\.safetensors"):
        build.model_folder("survey", tmp_path)
    (tmp_path / "survey" / "model" / store.CHECKSUMS).unlink()
    with pytest.raises(ResearchError, match="missing or incomplete"):
        build.model_folder("survey", tmp_path)


def test_the_worst_check_counts_whichever_side_it_is_on():
    high, low = Check("loss: a", 0.2, 0.1, at_most=True), Check("loss: b", 0.01, 0.1, at_most=True)
    assert findings.find_worst([low, high], "loss") is high
    good, bad = Check("facts: a", 0.99, 0.9), Check("facts: b", 0.5, 0.9)
    assert findings.find_worst([good, bad], "facts") is bad


def test_every_claim_about_the_world_has_a_check_and_is_judged(checks):
    assert set(findings.CHECKS) == set(claims.load_claims("world"))
    found = findings.measure_claims({0: checks, 1: checks})
    for name, claim in claims.load_claims("world").items():
        assert claims.judge(claim, found[name]) in claims.VERDICTS
        assert found[name].low == found[name].high == pytest.approx(found[name].value)


@pytest.fixture(scope="module")
def encoded():
    settings = text_model.TextSettings()
    toy = text_checks.ToyText(models.load_model(build.model_folder("text")), settings, 901, 400)
    sae = saes.load_sae(build.sae_folders("text")[settings.saes.first[settings.saes.hooks[0]]])
    return toy, sae, demo.encode_text(toy, sae, saes.hook_of(sae))


def test_steering_a_concept_beats_a_random_direction_and_no_dose_does_nothing(encoded):
    toy, sae, text = encoded
    found = demo.find_label_detectors(text)["concept_next"]
    best = found.f1.nan_to_num(-1.0).argsort(descending=True, stable=True)[:6].tolist()
    none, strong = demo.steer(
        toy, sae, saes.hook_of(sae), {c: int(found.latent[c]) for c in best}, [0.0, 0.8]
    )
    assert np.array_equal(none.mass, none.control)
    assert stats.mean_interval(strong.mass - strong.control).low > 0


def test_contexts_show_the_token_at_which_a_latent_fires_most(encoded):
    _, _, text = encoded
    latent = int(text.acts.latent[text.acts.value.argmax()])
    row = int(text.acts.token[text.acts.value.argmax()])
    content = text.texts.tokens[text.texts.tokens != 1]
    from sae_research.world.text.lexicon import lexicon

    word = ["", "", "", "", *lexicon().words][content[row]]
    assert f"[{word}]" in demo.find_contexts(text, latent)[0]
