"""Tails, token rules, explanations and recall on activations whose readings are known."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sae_research import explain  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402
from sae_research.studies.specialized_saes import tails  # noqa: E402


class Dictionary(torch.nn.Module):
    """An SAE whose latents are the coordinates of the residual, above zero."""

    def __init__(self, d: int):
        super().__init__()
        self.cfg = SimpleNamespace(d_sae=d)
        self.W_dec = torch.eye(d)

    def encode(self, x):
        return x.clamp(min=0)

    def decode(self, acts):
        return acts


@pytest.fixture(scope="module")
def text():
    """Four token types; type v fires latent v, latent 4 fires on everything, a bit on type 0."""
    tokens = torch.tensor([0] * 40 + [1] * 20 + [2] * 12 + [3] * 4).repeat(2)
    x = torch.zeros(len(tokens), 6)
    x[torch.arange(len(tokens)), tokens] = 1.0 + tokens.float()
    x[:, 4] = torch.where(tokens == 0, 2.0, 1.9)
    x[:, 5] = -torch.arange(len(tokens)) / 100  # negative: never rebuilt
    train = torch.arange(len(tokens)) < len(tokens) // 2
    return tails.TestText(x, tokens, tokens.roll(1), train)


def test_definitions_of_a_token_with_a_feature(text):
    acts, _ = tails.read_latents(Dictionary(6), text.x)
    mass = tails.Mass.of(acts, text.tokens, 4)
    has = tails.find_types_with_feature(acts, text.tokens, mass)
    assert [h.tolist() for h in has.values()] == [[True] * 4] * 3
    without = text.x.clone()
    without[text.tokens == 3, 3] = 0  # only latent 4 is left on type 3
    acts, _ = tails.read_latents(Dictionary(6), without)
    has = tails.find_types_with_feature(acts, text.tokens, tails.Mass.of(acts, text.tokens, 4))
    assert [h[3].item() for h in has.values()] == [False, False, True]


def test_entropies_errors_and_counts(text):
    report = tails.tail_report(Dictionary(6), text)
    entropy = tails.Mass.of(report.acts, text.tokens, 4).entropy()
    assert entropy[:4].tolist() == pytest.approx([0] * 4, abs=1e-9)
    shares = torch.tensor([40 * 2.0, 20 * 1.9, 12 * 1.9, 4 * 1.9])
    shares = shares / shares.sum()
    assert entropy[4].item() == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)
    assert report.counts.tolist() == [80, 40, 24, 8, 152, 0]
    rare = (text.tokens >= 2).nonzero()[:, 0]
    assert report.summary["tail error maximum"] == pytest.approx((rare.max().item() / 100) ** 2)
    assert report.summary["tail D1"] == 1
    assert report.summary["live latents"] == pytest.approx(5 / 6)
    assert report.summary["cosine of decoder rows"] == 0
    assert report.coverage["D1"].iloc[-1] == 1


def test_token_rules_are_perfect_for_a_latent_of_one_type_and_poor_for_noise(text):
    acts, _ = tails.read_latents(Dictionary(6), text.x)
    f1 = explain.score_token_rules(acts, text.tokens, text.previous, text.train)
    assert f1[:4].tolist() == pytest.approx([1] * 4)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 200, (4000,), generator=random)
    noise = (torch.rand(4000, 3, generator=random) < 0.3).float()
    acts, _ = tails.read_latents(Dictionary(3), noise)
    half = torch.arange(4000) % 2 == 0
    assert explain.score_token_rules(acts, tokens, tokens.roll(1), half).max() < 0.1


def test_a_rule_on_the_previous_token_is_found():
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4000,), generator=random)
    previous = tokens.roll(1)
    acts, _ = tails.read_latents(Dictionary(1), (previous == 7).float()[:, None])
    half = torch.arange(4000) % 2 == 0
    assert explain.score_token_rules(acts, tokens, previous, half).tolist() == [1.0]


def test_context_diversity_is_zero_for_one_direction_and_one_for_orthogonal_ones():
    x = torch.cat([torch.eye(8) * 3, -torch.eye(8) * 3])
    acts, _ = tails.read_latents(Dictionary(8), x)
    assert len(explain.context_diversity(acts, x)) == 0  # every latent fires once
    one = torch.cat([torch.eye(8)[:1].repeat(5, 1), -torch.eye(8)[:1].repeat(5, 1)])
    acts, _ = tails.read_latents(Dictionary(8), one)
    assert explain.context_diversity(acts, one).tolist() == pytest.approx([0], abs=1e-6)


def test_count_ratios_are_smoothed_and_zero_for_equal_counts():
    counts = torch.tensor([0, 10, 100])
    assert tails.compare_counts(counts, counts).tolist() == [0, 0, 0]
    ratio = tails.compare_counts(torch.tensor([100, 10, 0]), counts)
    assert ratio[0] == -ratio[2]
    assert ratio[0].item() == pytest.approx(np.log(101))


def test_the_explainer_replays_what_was_recorded(tmp_path):
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return "70" if "Rate" in prompt else "1, 3" if "numbers" in prompt else "physics words"

    path = tmp_path / "answers.json"
    client = explain.recorded(ask, path)
    words = explain.explain_latent(client, ["the <<field>>"])
    f1 = explain.score_explanation(client, words, ["a", "b", "c"], [True, False, False])
    assert f1 == pytest.approx(2 / 3)
    assert explain.rate_diversity(client, ["a", "b"]) == 70
    replay = explain.recorded(None, path)
    assert explain.explain_latent(replay, ["the <<field>>"]) == words
    assert len(asked) == 3
    with pytest.raises(ResearchError, match="no answer"):
        explain.explain_latent(replay, ["another"])


def test_latents_are_explained_on_one_half_and_scored_on_the_other(text):
    acts, _ = tails.read_latents(Dictionary(6), text.x)
    words = [f"type{v}" for v in text.tokens.tolist()]
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        return "1" if "numbers" in prompt else "30" if "Rate" in prompt else "some type"

    found = explain.explain_latents(ask, acts, words, text.train, 3)
    assert len(found) == 3
    assert found.f1.between(0, 1).all()
    assert all("<<type" in prompt for prompt in prompts)
