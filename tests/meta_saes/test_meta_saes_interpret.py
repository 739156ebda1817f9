"""Judges and planted senses on latents whose meaning is known."""

from types import SimpleNamespace

import miniatures
import pytest
import torch

from sae_research import catalogue, paths, store
from sae_research.studies.meta_saes import interpret, senses, study
from sae_research.studies.meta_saes.settings import Settings

N, LENGTH = 400, 8


@pytest.fixture(scope="module")
def tokens():
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 20, (N, LENGTH), generator=random)


def reader(tokens, judge=None):
    return interpret.Interpreter(tokens, judge or interpret.TokenRule(), 30, 20, 0)


def test_a_latent_of_one_token_is_explained_and_a_random_one_is_not(tokens):
    own = torch.where(tokens == 3, 2.0, 0.0)
    near = (tokens == 4).any(1)
    found = reader(tokens).score(own, near, 7)
    assert found["detection"] == 1
    assert found["fuzzing"] > 0.85
    random = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1))
    noise = torch.where(random < 0.05, 1.0, 0.0)
    found = reader(tokens).score(noise, torch.ones(N, dtype=torch.bool), 7)
    assert found["detection"] < 0.7
    assert reader(tokens).score(torch.zeros(N, LENGTH), near, 7) is None


def test_neighbours_punish_a_broad_explanation(tokens):
    """A latent of token 3 after low tokens only, beside a latent of token 3: the rule says 3."""
    after = torch.zeros(N, LENGTH, dtype=torch.bool)
    after[:, 1:] = (tokens[:, 1:] == 3) & (tokens[:, :-1] < 10)
    own = after.float()
    easy, hard = (
        reader(tokens).score(own, near, 1)["detection"]
        for near in ((tokens != 3).all(1), (tokens == 3).any(1))
    )
    assert easy > 0.9
    assert hard == pytest.approx(0.5, abs=0.1)


def test_strength_ranks_graded_activations(tokens):
    graded = torch.where(tokens < 5, tokens.float() + 1, 0.0)
    graded[:, :-1] = graded[:, :-1].where(tokens[:, :-1] < 5, 0.0)
    assert reader(tokens).score(graded, (tokens >= 5).any(1), 2) is None  # active nearly everywhere
    rare = torch.where(tokens < 2, tokens.float() + 1, 0.0)
    assert reader(tokens).score(rare, (tokens == 9).any(1), 2)["strength"] > 0.9
    assert interpret.rank_correlation([1, 2, 3], [5, 5, 5]) == 0


def test_a_language_judge_goes_through_one_function(tokens):
    asked = []

    def ask(prompt):
        asked.append(prompt)
        if "Say in one sentence" in prompt:
            return " the word w3 "
        text = prompt.split("Text: ")[1].split("\n")[0].split(" ")
        if "How strongly" in prompt:
            return "strength: 7.5"
        if "<<" in prompt:
            return "1" if "<<w3>>" in text else "0"
        return "1 yes" if "w3" in text else "0 no"

    judge = interpret.LanguageJudge(ask, lambda ids: [f"w{i}" for i in ids.tolist()])
    own = torch.where(tokens == 3, 2.0, 0.0)
    found = reader(tokens, judge).score(own, (tokens == 4).any(1), 7)
    assert found["detection"] == 1
    assert found["fuzzing"] > 0.85
    assert found["strength"] == 0
    assert len(asked) == 1 + 40 + 40 + 20
    assert "<<w3>>" in asked[0]


def test_answers_of_a_language_model_are_kept_and_replayed(tmp_path, monkeypatch):
    """A miniature babbles, but always the same, and is asked once only."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    folder = miniatures.save(tmp_path / "model", "llama", context=256)
    model = catalogue.load_model(folder)
    ground = SimpleNamespace(model=model)
    assert isinstance(study._choose_judge(ground, Settings()), interpret.TokenRule)
    asked = Settings(explainer=str(folder))
    context = interpret.Context(torch.arange(5, 9), torch.ones(4))
    said = study._choose_judge(ground, asked).explain([context])
    (kept,) = tmp_path.rglob("*-meta_saes.json")
    (answer,) = store.read_json(kept).values()
    assert answer.strip() == said
    store.write_json(kept, dict.fromkeys(store.read_json(kept), "recorded"))
    assert study._choose_judge(ground, asked).explain([context]) == "recorded"


def test_purity_and_splits_of_planted_senses():
    sense = torch.tensor([4] * 50 + [5] * 50)
    split = torch.stack([sense == 4, sense == 5], 1)
    whole = torch.ones(100, 1, dtype=torch.bool)
    assert senses.purity(split, sense) == 1
    assert senses.purity(whole, sense) == 0.5
    assert senses.purity(~torch.ones(100, 2, dtype=torch.bool), sense) == 0.5


def test_comparison_counts_splits_and_merges():
    import pandas as pd

    before = pd.DataFrame({"f1": [0.9, 0.5, 0.5, 0.8]})
    after = pd.DataFrame({"f1": [0.9, 0.8, 0.9, 0.5]})
    assert senses.compare(before, after, 0.7) == {"split": 0.5, "merged": 0.25}
    assert senses.compare(after, before, 0.7) == {"split": 0.25, "merged": 0.5}
