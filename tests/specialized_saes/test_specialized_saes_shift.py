"""Circuits and SHIFT on a tiny model, against derivatives and ablations done by hand."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent.parent))

import miniatures  # noqa: E402
import pandas as pd  # noqa: E402

from sae_research import circuits, models  # noqa: E402
from sae_research.circuits import ERROR, Circuit, Probe  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402
from sae_research.studies.specialized_saes import shift  # noqa: E402
from sae_research.studies.specialized_saes.settings import Shift  # noqa: E402
from sae_research.world.text.bias_case import BiasData, Biographies  # noqa: E402

LOWER, UPPER = "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load_model(miniatures.save(tmp_path_factory.mktemp("m") / "tiny", "llama"))


@pytest.fixture(scope="module")
def circuit(model):
    torch.manual_seed(0)
    tokens = torch.randint(4, 64, (12, 8))
    tokens[:, 0] = model.bos
    saes = {
        hook: miniatures.random_sae("relu", 32, 40, seed=i) for i, hook in enumerate((LOWER, UPPER))
    }
    for sae in saes.values():
        sae.requires_grad_(False)
    probe = Probe(torch.randn(32) / 6, torch.zeros(1), torch.zeros(32))
    labels = torch.arange(12) % 2
    return Circuit(model, saes, probe, UPPER, tokens, labels)


def test_effects_at_the_probe_are_exact(circuit):
    """At the probe's own hook m is linear, so the effect is that of really ablating the latent."""
    effect, error = circuit.effects(UPPER, steps=3)
    acts, slack = circuit.split(UPPER)
    clean = circuit.metric(circuit.residuals[UPPER])
    for latent in effect.abs().topk(3).indices.tolist():
        without = acts.clone()
        without[..., latent] = 0
        ablated = circuit.metric(circuit._residual(UPPER, without, slack))
        assert effect[latent].item() == pytest.approx((ablated - clean).mean().item(), rel=1e-3)
    nothing = slack.clone()
    nothing[:, 1:] = 0
    ablated = circuit.metric(circuit._residual(UPPER, acts, nothing))
    assert error == pytest.approx((ablated - clean).mean().item(), rel=1e-3)


def test_integrated_gradients_add_up_below(circuit):
    """Completeness of integrated gradients: all effects sum to m(no latents) - m(clean)."""
    effect, _ = circuit.effects(LOWER, steps=200)
    acts, slack = circuit.split(LOWER)
    ablated = circuit._above(LOWER, circuit._residual(LOWER, acts * 0, slack), circuit.depth)
    gap = (circuit.metric(ablated) - circuit.metric(circuit.residuals[UPPER])).mean().item()
    assert effect.sum().item() == pytest.approx(gap, rel=0.05, abs=0.01)


def test_edges_of_a_path_sum_to_the_gradient_through_the_target(circuit):
    targets = circuit.effects(UPPER, 1)[0].abs().topk(2).indices.tolist()
    edges = circuit.edges(LOWER, UPPER, [0, 1, ERROR], targets)
    assert len(edges) == 6
    acts, slack = circuit.split(LOWER)
    leaf = acts.clone().requires_grad_()
    above = circuit._above(LOWER, circuit._residual(LOWER, leaf, slack), circuit.model.depth(UPPER))
    weight = circuit.saes[UPPER].W_dec[targets[0]] @ circuit.probe.weight / above[:, 1:].shape[1]
    through = -(
        circuit.sign[:, None] * weight * circuit.saes[UPPER].encode(above)[:, 1:, targets[0]]
    )
    (slope,) = torch.autograd.grad(through.sum(), leaf)
    expected = (slope * -acts).sum(1).mean(0)[1].item()
    row = edges[(edges.source == 1) & (edges.target == targets[0])]
    assert row.effect.item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_the_whole_circuit_is_faithful_and_nothing_is_not(circuit):
    every = pd.DataFrame(
        [(hook, latent, 1.0) for hook in circuit.saes for latent in (*range(40), ERROR)],
        columns=["hook", "latent", "effect"],
    )
    found = circuit.faithfulness(every)
    assert found["faithfulness"] == pytest.approx(1, abs=1e-3)
    assert found["completeness"] == pytest.approx(0, abs=1e-3)
    none = circuit.faithfulness(every.iloc[:0])
    assert none["faithfulness"] == pytest.approx(0, abs=1e-6)
    nodes = circuits.find_nodes(circuit, 2, 0.0)
    assert nodes.effect.abs().is_monotonic_decreasing


@pytest.fixture(scope="module")
def case(model):
    """Word 10 tells one gender, 11 the other; 20 and 21 the professions."""

    def texts(gender, profession):
        tokens = torch.randint(30, 64, (len(gender), 8))
        tokens[:, 0] = model.bos
        tokens[:, 2], tokens[:, 4] = 10 + gender, 20 + profession
        return Biographies(tokens, gender, profession)

    torch.manual_seed(1)
    both = torch.arange(200) % 2
    second = torch.arange(200) // 2 % 2
    data = BiasData(
        texts(both, both),
        texts(both, second),
        texts(both, second),
        frozenset({10, 11}),
        torch.tensor([20, 21]),
    )
    settings = Shift(
        probe_hook=UPPER,
        probe_seeds=2,
        probe_batch=16,
        examples=40,
        steps=2,
        skyline=3,
        node_threshold=0.0,
    )
    return shift.Case(model, data, settings)


def test_the_gender_rule_finds_a_latent_of_gender_and_a_person_can_overrule_it(case, tmp_path):
    sae = miniatures.random_sae("relu", 32, 40)
    hook = "blocks.0.hook_resid_pre"
    x = case.model.residual(torch.tensor([[case.model.bos, 10, 20, 40]]), hook)[0]
    own = torch.nn.functional.normalize(x[1] - x.mean(0), dim=0)
    with torch.no_grad():
        sae.W_enc[:, 0], sae.b_enc[0] = own, -0.9 * (x[1] @ own)
        sae.b_dec.zero_()
    judged = shift.judge_latents(case, "GSAE", {hook: sae.requires_grad_(False)})
    latent = judged.set_index("latent").loc[0]
    assert latent.gender
    assert latent.auroc > 0.95
    assert judged.gender.mean() < 0.5
    path = tmp_path / "overrides.yaml"
    path.write_text(f"- {{sae: GSAE, hook: {hook}, latent: 0, gender: false}}\n")
    table = shift._override(judged.copy(), str(path))
    assert not table.set_index("latent").loc[0].gender
    path.write_text("- {latent: 0}")
    with pytest.raises(ResearchError, match="give a list of rows"):
        shift._override(judged, str(path))


def test_a_table_has_all_rows_and_equal_counts(case):
    saes = [
        {
            hook: miniatures.random_sae("relu", 32, 40, seed=s + i).requires_grad_(False)
            for i, hook in enumerate((LOWER, UPPER))
        }
        for s in (0, 7)
    ]
    tables = shift.run_table(case, *saes)
    rows = tables["shift"]
    assert rows.method.nunique() == 17
    sizes = rows.groupby("method").size()
    assert sizes.pop("Random ablation") == 4
    assert (sizes == 2).all()
    counts = rows.groupby("method").n_ablated.first()
    assert counts["GSAE SHIFT"] == counts["SSAE SHIFT"] == counts["Random ablation"]
    assert (rows.worst_low <= rows.worst + 0.05).all()
    assert rows.worst.le(rows.profession + 1e-9).all()


def test_bias_shows_and_balance_repairs_it(case):
    """A probe on ambiguous text goes by both words; on balanced text by the profession alone."""
    x = case.features(case.data.test)
    fair = pd.DataFrame(case.grade(case.fit(case.data.balanced), x))
    biased = pd.DataFrame(case.grade(case.fit(case.data.ambiguous), x))
    assert fair.profession.mean() > biased.profession.mean()
    assert biased.gender.mean() > fair.gender.mean()
