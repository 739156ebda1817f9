"""Study 3 on real text: a cut of the real model, and a corpus with a domain, its second register
and other text in folders of their own.
"""

import dataclasses
import random

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from test_wheels import fetched, source  # noqa: E402, F401

from sae_research import catalogue, claims, config, notebooks, paths, prose, real_saes  # noqa: E402
from sae_research.dependencies import notebook_code  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402
from sae_research.studies import runner  # noqa: E402
from sae_research.studies.specialized_saes import findings, grounds, study  # noqa: E402
from sae_research.studies.specialized_saes.settings import (  # noqa: E402
    Settings,
    Synthetic,
    Training,
)
from sae_research.tilt import Tilt  # noqa: E402

NAME = "tiny-smol"
HOOK = "blocks.0.hook_resid_post"
SETTINGS = Settings(
    models=(NAME,),
    hook=HOOK,
    domain="alpha",
    register="beta.gamma",
    shift_model="",
    synthetic=Synthetic(vectors=0),
    chunk_tokens=24,
    file_chunks=4,
    seed_chunks=8,
    pool_chunks=120,
    selected_chunks=12,
    general_chunks=60,
    test_chunks=24,
    loss_chunks=8,
    selectors=("general", "bm25", "dense", "random", "oracle"),
    dense="lsa",
    nulls=("soft_frozen_decoder",),
    latents=64,
    small_latents=16,
    l0s=(4, 8),
    main_l0=8,
    penalties=(0.3,),
    main_penalty=0.3,
    seeds=2,
    tilts={"500": Tilt(t=500.0), "ess 0.9": Tilt(t=0.9, unit="effective sample size")},
    paper_tilts=("500",),
    general=Training(steps=20, batch_size=128, lr=1e-3, centre=True),
    fine_tuning=Training(steps=6, batch_size=64, lr=1e-3),
)
WORDS = {
    "alpha": ["median", "variance", "regression", "quantile", "sampler"],
    "beta/gamma": ["variance", "quantile", "moment", "kurtosis", "percentile"],
    "beta/other": ["river", "mountain", "cloud", "stone", "meadow"],
    "delta": ["engine", "bolt", "wheel", "piston", "gearbox"],
}
COUNTS = {"alpha": 60, "beta/gamma": 60, "beta/other": 60, "delta": 160}


@pytest.fixture(scope="module")
def profile(source, fetched, tmp_path_factory):  # noqa: F811
    """The catalogue with that model, whose recipe names that text."""
    folder = tmp_path_factory.mktemp("text")
    draws = random.Random(0)
    for part, words in WORDS.items():
        (folder / part).mkdir(parents=True)
        for i in range(COUNTS[part]):
            parts = [" ".join(draws.choices(words, k=9)) + "." for _ in range(2)]
            (folder / part / f"f{i}.txt").write_text("\n\n".join(parts))
    spec = catalogue.ModelSpec(NAME, "nobody/Tiny-Smol", wheel=source[1], chat=True)
    recipe = real_saes.Recipe(model=NAME, text=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", fetched.parents[1])
        patch.setitem(catalogue.MODEL_SPECS, NAME, spec)
        patch.setitem(real_saes.RECIPES, NAME, recipe)
        yield config.Profile(
            "real",
            runtime=config.Runtime(device="cpu", dtype="float32", threads=1, ground="real"),
            studies={"specialized_saes": SETTINGS},
        )


@pytest.fixture(scope="module")
def files(profile):
    """The paragraphs' files by number, as chunks name them."""
    return list(dict.fromkeys(p.file for p in prose.load(real_saes.RECIPES[NAME].text).paragraphs))


@pytest.fixture(scope="module", params=[0, 1])
def ground(profile, request):
    return grounds.load(NAME, SETTINGS, "cpu", request.param)


def test_no_file_is_in_two_parts_and_splits_are_kept(ground, files):
    parts = {"seeds": ground.seeds, "pool": ground.pool, **ground.tests}
    owners = {name: {files[i] for i in part.document} for name, part in parts.items()}
    every = [file for own in owners.values() for file in own]
    assert len(every) == len(set(every))
    general = set(map(tuple, ground.general.tolist()))
    assert not general & set(map(tuple, ground.pool.tokens.tolist()))
    split = {
        name: {prose.Paragraph("", "own", f).split for f in own} for name, own in owners.items()
    }
    assert split.pop("seeds") == {"validation"}
    assert split.pop("pool") == {"train"}
    assert all(own <= {"test", "fresh"} for own in split.values())


def test_labels_are_those_of_the_folders(ground, files):
    folders = {
        name: {files[i].rpartition("/")[0] for i in part.document}
        for name, part in {"seeds": ground.seeds, **ground.tests}.items()
    }
    assert folders["seeds"] == folders["domain"] == {"alpha"}
    assert folders["second register"] == {"beta/gamma"}
    assert folders["general"] == {"beta/other", "delta"}
    pool = np.array([files[i].rpartition("/")[0] for i in ground.pool.document])
    assert set(pool) == {"alpha", "beta/other", "delta"}
    assert (ground.in_domain == (pool == "alpha")).all()
    assert 0.1 < ground.in_domain.mean() < 0.5


def test_general_text_has_no_word_of_the_domain_and_chunks_have_one_length(ground):
    texts = ground.model.tokenizer.batch_decode(ground.general)
    assert not any(word in text for text in texts for word in WORDS["alpha"])
    assert ground.general.shape == (60, 24)
    for part in (ground.seeds, ground.pool, *ground.tests.values()):
        assert (part.tokens[:, 0] == ground.model.bos).all()
        _, counts = np.unique(part.document, return_counts=True)
        assert counts.max() <= SETTINGS.file_chunks
    assert any("variance" in text for text in ground.seeds.texts)


def test_another_seed_draws_other_text(profile):
    one, two, again = (grounds.load(NAME, SETTINGS, "cpu", seed) for seed in (0, 1, 0))
    assert torch.equal(one.pool.tokens, again.pool.tokens)
    assert set(one.pool.texts) != set(two.pool.texts)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"domain": ""}, "name parts of its corpus"),
        ({"domain": "omega"}, "gives 0 chunks of domain text in test and fresh, and 8 are needed"),
        ({"seed_chunks": 5000}, "chunks of domain text in validation, and 5000 are needed"),
    ],
)
def test_what_the_corpus_cannot_give_is_named(profile, changes, says):
    with pytest.raises(ResearchError, match=says):
        grounds.load(NAME, dataclasses.replace(SETTINGS, **changes), "cpu", 0)


@pytest.fixture(scope="module")
def result(profile, tmp_path_factory):
    """Both seeds, as published and read again."""
    found = []
    for task in study.tasks(profile):
        found.append(study.run(task, profile))
        found[-1].task = task
    folder = tmp_path_factory.mktemp("published")
    runner.concatenate(found).save(folder, runner.DIGITS)
    return runner.load_result(folder)


def test_the_bias_case_study_and_the_synthetic_tier_are_left_out(profile):
    found = study.tasks(profile)
    assert [(task["part"], task["seed"]) for task in found] == [
        ("specialize", 0),
        ("specialize", 1),
    ]


def test_every_claim_is_measured_or_says_what_it_needs(result):
    tables = findings.make_tables({"": result}, SETTINGS)
    assert not {"recall", "shift", "synthetic"} & set(tables)
    measured = findings.measure_claims(tables)
    stated = claims.load_claims("specialized_saes")
    assert set(measured) == set(stated)
    verdicts = {name: claims.judge(claim, measured[name]) for name, claim in stated.items()}
    missing = {name.removeprefix("specialized_saes.") for name, m in measured.items() if m is None}
    assert missing == {
        *("selectors.tracin", "selectors.seed_register"),
        *("selectors.rare_concepts", "selectors.nulls", "proxies.coverage"),
        *("term.rare_concepts", "term.rare_concepts_mild"),
        *(name.removeprefix("specialized_saes.") for name in stated if ".shift." in name),
        *(name.removeprefix("specialized_saes.") for name in stated if ".synthetic." in name),
    }
    text = findings.summarize(tables, verdicts)
    assert "At one L1 coefficient" in text
    assert "rare concepts" not in text
    assert "bias case study" not in text
    assert "not testable here" not in text  # TracIn, which no selector uses, is left unsaid


def test_the_pareto_has_two_sparsities_and_the_null_stands_beside(result):
    losses = findings.make_tables({"": result}, SETTINGS)["losses"]
    topk = losses.query("kind == 'topk' and way == 'fine-tune' and selector != 'none'")
    assert set(topk["sparsity"]) == {4, 8}
    assert (topk["l0"] <= topk["sparsity"] + 1e-9).all()
    assert set(topk["tilt"]) == {"plain", "500", "ess 0.9"}
    assert (losses["way"] == "null: soft_frozen_decoder").any()
    assert set(losses["text"]) == {"domain", "second register", "general"}


def test_the_text_of_a_run_is_named():
    assert "`alpha`" in SETTINGS.describe()
    assert "physics" in Settings(models=("world-text",)).describe()
    real = config.load("real").specialized_saes
    assert "smollm2-135m-instruct, on docstrings" in real.describe()


def test_the_results_notebook_runs_without_what_this_ground_lacks(
    result, profile, tmp_path, monkeypatch
):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.setattr(runner, "read", lambda *_: {"": result})
    monkeypatch.setattr(config, "load", lambda *_: profile)
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    space: dict = {}
    for tree in notebook_code(notebooks.source("31_specialized_saes_results")):
        exec(compile(tree, "notebook", "exec"), space)
    drawn = {path.stem for path in tmp_path.rglob("*.png")}
    assert {"selectors", "pareto", "readings", "tails", "distributions", "training"} <= drawn
    assert not {"recall", "proxies", "tilts", "shift", "circuits"} & drawn
    assert isinstance(space["verdicts"], pd.DataFrame)
