"""The recipe on a small toy ground: selections, equal budgets, the three ways, spliced losses."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sae_research import catalogue, conversion, term  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402
from sae_research.retrieval.tracin import TracIn  # noqa: E402
from sae_research.studies.specialized_saes import evaluate, grounds, specialize  # noqa: E402
from sae_research.studies.specialized_saes.settings import Settings, Training  # noqa: E402
from sae_research.tilt import Tilt  # noqa: E402

HOOK = "blocks.1.hook_resid_post"
SETTINGS = Settings(
    models=("world-text",),
    hook=HOOK,
    seed_chunks=20,
    pool_chunks=300,
    selected_chunks=16,
    general_chunks=60,
    test_chunks=40,
    loss_chunks=8,
    dense="lsa",
    latents=96,
    small_latents=32,
    l0s=(8,),
    main_l0=8,
    penalties=(0.3,),
    main_penalty=0.3,
    general=Training(steps=30, batch_size=128, lr=1e-3, centre=True),
    fine_tuning=Training(steps=5, batch_size=64, lr=1e-3),
    tilts={"500": Tilt(t=500.0), "bins": Tilt(t=1.0, unit="mean loss", bins=True)},
    paper_tilts=("500",),
    nulls=("frozen_decoder",),
)
NULL = "null: frozen_decoder"


@pytest.fixture(scope="module")
def ground():
    return grounds.make_toy_ground(catalogue.get("world-text").load(), HOOK, SETTINGS, 0)


@pytest.fixture(scope="module")
def general(ground):
    return specialize.train_general(ground, SETTINGS, 0)


def test_parts_share_no_document_and_seeds_use_no_synonym(ground):
    parts = [ground.seeds, ground.pool, *ground.tests.values()]
    numbers = np.concatenate([part.document for part in parts])
    assert len(numbers) == len(set(numbers))
    assert len(ground.in_domain) == len(ground.pool)
    assert 0 < ground.in_domain.mean() < 0.2
    assert all("please" in text for text in ground.tests["second register"].texts)
    assert not any("please" in text for text in ground.seeds.texts)


def test_residuals_of_general_text_have_unit_scale(ground):
    norm = ground.residuals(ground.general).norm(dim=-1).mean().item()
    assert norm == pytest.approx(ground.model.d_model**0.5, rel=0.02)


def test_selectors_rank_the_pool_and_the_domain_first(ground, general):
    ranked = specialize.rank_pool(ground, general["topk"], SETTINGS, 0)
    assert set(ranked) == set(SETTINGS.selectors) - {"general", "seed only"}
    for ranking in ranked.values():
        assert sorted(ranking) == list(range(len(ground.pool)))
    graded = specialize.grade_selectors(ground, ranked, SETTINGS).set_index("selector")
    assert graded.precision["oracle"] > graded.precision["bm25"] > graded.precision["random"]
    with pytest.raises(ResearchError, match="unknown selector"):
        specialize.choose_text(ground, "colbert", ranked, SETTINGS, 0)


def test_every_arm_sees_the_same_number_of_tokens(ground, general):
    arms = [arm for arm in specialize.make_arms(SETTINGS) if arm.selector == "dense"]
    assert {arm.way for arm in arms} == {"fine-tune", "residual", "direct", NULL}
    tokens = ground.pool.tokens[:16]
    acts = ground.residuals(tokens)
    types = tokens[ground.model.content(tokens) & (tokens != ground.model.bos)]
    found, log = specialize.specialize(arms, general, acts, types, SETTINGS, 0)
    assert set(found) == set(arms)
    assert set(log.tilt) == {"plain", "500", "bins"}
    for arm, sae in found.items():
        l0 = (sae.encode(acts) > 0).sum(1)
        if arm.kind == "topk":
            assert l0.max() <= 8, arm
        if arm.way == NULL:
            assert torch.equal(sae.W_dec, general[NULL].W_dec)
            assert not torch.equal(sae.W_enc, general[NULL].W_enc)
    few = SETTINGS.fine_tuning.plan(32)
    assert (few.batch_size, few.steps) == (32, 10)


def test_splicing_nothing_is_the_model_and_a_bad_sae_costs(ground, general):
    splicer = evaluate.Splicer(ground, 8)

    class Same(torch.nn.Module):
        def encode(self, x):
            return x

        def decode(self, acts):
            return acts

    clean, same = splicer.measure(None), splicer.measure(Same())
    for a, b in zip(clean, same, strict=True):
        assert a["ce"] == pytest.approx(b["ce"], abs=1e-4)
    rows = ground.tests["domain"].tokens[:8]
    assert clean[0]["ce"] == pytest.approx(ground.model.losses(rows).mean().item(), rel=1e-3)
    assert splicer.measure(general["topk"])[0]["ce"] > clean[0]["ce"]


def test_raw_units_change_nothing_but_the_scale(ground, general):
    x = ground.residuals(ground.seeds.tokens)[:50]
    raw = conversion.in_raw_units(general["topk"], ground.scale)
    rebuilt = raw.decode(raw.encode(x / ground.scale))
    torch.testing.assert_close(rebuilt * ground.scale, general["topk"](x), rtol=1e-3, atol=1e-3)
    assert raw.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 96, rel=1e-5)


def test_bins_hold_equally_many_types_and_influence_needs_unit_rows(ground, general):
    types = torch.tensor([5] * 100 + [7] * 10 + [9] * 3 + [11])
    assert term.bin_by_frequency(types, 2).unique_consecutive().tolist() == [1, 0]
    tracin = TracIn(conversion.unit_rows(general["topk"]))
    x = ground.residuals(ground.seeds.tokens)[:64]
    seeds = tracin.mean_gradient([x])
    norm = sum(block.square().sum() for block in vars(seeds).values())
    assert tracin.scores(x, seeds).mean().item() == pytest.approx(norm.item(), rel=1e-3)
