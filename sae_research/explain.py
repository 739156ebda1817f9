"""What a latent stands for: by rules on tokens, deterministic and the same for all SAEs, or in the
words of a language model whose answers are recorded and replayed.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import LongTensor, Tensor

from sae_research import store
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.world.text.detectors import SparseActivations

TOP_TYPES = 5


def score_token_rules(
    acts: SparseActivations, tokens: LongTensor, previous: LongTensor, train: Tensor
) -> Tensor:
    """Token-rule F1 of every latent that fires in both halves [latents that do].

    The rule "fires on these five types", or on what follows them, is the better of the two on the
    training half; F1 is the expectation over a sample with as many firing tokens as others.
    """
    own, other = acts.of(train), acts.of(~train)
    rules = []
    for types in (tokens, previous):
        size = int(types.max()) + 1
        chosen = _strongest_types(own, types[train], size)
        fit, test = (
            _rule_f1(part, types[mask], chosen, size)
            for part, mask in ((own, train), (other, ~train))
        )
        rules.append((fit, test))
    fits, tests = (torch.stack(parts) for parts in zip(*rules, strict=True))
    best = tests.gather(0, fits.nan_to_num(-1).argmax(0)[None])[0]
    live = torch.bincount(own.latent, minlength=acts.n_latents) > 0
    return best[live & best.isfinite()]


def order_by_strength(owner: LongTensor, value: Tensor) -> tuple[LongTensor, LongTensor]:
    """Entries sorted by owner, strongest first, and the place of each within its owner's."""
    order = value.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    counts = torch.bincount(owner)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[owner[order]]
    return order, place


def _strongest_types(acts: SparseActivations, types: LongTensor, size: int) -> LongTensor:
    """The five types with the largest activation mass of each latent; -1 where it has fewer."""
    pair, index = (acts.latent * size + types[acts.token]).unique(return_inverse=True)
    mass = torch.bincount(index, weights=acts.value.double())
    order, place = order_by_strength(pair // size, mass)
    kept = place < TOP_TYPES
    chosen = torch.full((acts.n_latents, TOP_TYPES), -1)
    chosen[pair[order[kept]] // size, place[kept]] = pair[order[kept]] % size
    return chosen


def _rule_f1(acts: SparseActivations, types: LongTensor, chosen: LongTensor, size: int) -> Tensor:
    """Expected F1 of "fires on the chosen types" on a balanced sample; NaN for latents at rest."""
    fires = torch.bincount(acts.latent, minlength=acts.n_latents)
    hit = (types[acts.token][:, None] == chosen[acts.latent]).any(1)
    hits = torch.bincount(acts.latent[hit], minlength=acts.n_latents)
    counts = torch.bincount(types, minlength=size)
    said = torch.where(chosen >= 0, counts[chosen.clamp(min=0)], 0).sum(1)
    right = hits / fires
    wrong = (said - hits) / (acts.n_tokens - fires).clamp(min=1)
    return 2 * right / (right + wrong + 1)


def context_diversity(acts: SparseActivations, x: Tensor, k: int = 16) -> Tensor:
    """1 minus the mean cosine between the residuals on which a latent is most active."""
    order, place = order_by_strength(acts.latent, acts.value)
    kept = order[place < k]
    unit = torch.nn.functional.normalize(x[acts.token[kept]] - x.mean(0), dim=1)
    total = torch.zeros(acts.n_latents, x.shape[1]).index_add_(0, acts.latent[kept], unit)
    n = torch.bincount(acts.latent[kept], minlength=acts.n_latents)
    several = n > 1
    cosine = (total.square().sum(1) - n)[several] / (n * (n - 1))[several]
    return 1 - cosine


Ask = Callable[[str], str]
"""A language model: a prompt in, its answer out."""


def recorded(ask: Ask | None, path: Path) -> Ask:
    """Answers from the file if they are there; others are asked for and kept. Without `ask`, an
    unrecorded prompt is an error.
    """
    answers = dict(store.read_json(path)) if path.is_file() else {}

    def replay(prompt: str) -> str:
        key = hashlib.sha256(prompt.encode()).hexdigest()[:16]
        if key not in answers:
            if ask is None:
                raise ResearchError(
                    f"{path.name} holds no answer to a prompt of this run; give a language model "
                    "to record it."
                )
            answers[key] = ask(prompt)
            store.write_json(path, answers)
        return answers[key]

    return replay


def ask_model(model: LanguageModel, n: int = 40) -> Ask:
    """A language model of this package as one that answers, greedily, in up to `n` tokens."""

    def ask(prompt: str) -> str:
        row = model.tokens([prompt])
        answer = model.generate(row, n)[0, row.shape[1] :]
        return model.tokenizer.decode(answer, skip_special_tokens=True)

    return ask


def explain_latents(
    ask: Ask, acts: SparseActivations, words: Sequence[str], train: Tensor, n: int
) -> pd.DataFrame:
    """A language model's explanation of n live latents, with the F1 of predictions from it on the
    other half of the text, and how diverse it finds their excerpts.

    `words` are the tokens of the text in reading order.
    """
    live = torch.bincount(acts.latent, minlength=acts.n_latents).nonzero()[:, 0].tolist()
    rows = []
    for latent in live[:: max(1, len(live) // n)][:n]:
        at = acts.token[acts.latent == latent]
        seen, tests = at[train[at]][:8].tolist(), at[~train[at]][:8].tolist()
        others = [i for i in (~train).nonzero()[:, 0].tolist()[::97] if i not in set(at.tolist())]
        if not seen or not tests:
            continue
        excerpts = [_excerpt(words, i) for i in seen]
        words_of_model = explain_latent(ask, excerpts)
        mixed = tests + others[: len(tests)]
        shown = [_excerpt(words, i) for i in mixed]
        fires = [i in tests for i in mixed]
        f1 = score_explanation(ask, words_of_model, shown, fires)
        rows.append((latent, words_of_model, f1, rate_diversity(ask, excerpts)))
    return pd.DataFrame(rows, columns=["latent", "explanation", "f1", "diversity"])


def _excerpt(words: Sequence[str], at: int, reach: int = 6) -> str:
    before, after = words[max(0, at - reach) : at], words[at + 1 : at + 1 + reach]
    return " ".join([*before, f"<<{words[at]}>>", *after])


def explain_latent(ask: Ask, examples: Sequence[str]) -> str:
    """One sentence on what examples have in common, whose active tokens stand in << >>."""
    listed = "\n".join(f"- {example}" for example in examples)
    return ask(
        "These excerpts all activate one latent of a sparse autoencoder, on the tokens in << >>.\n"
        f"{listed}\nSay in one sentence what the latent responds to."
    ).strip()


def score_explanation(
    ask: Ask, explanation: str, examples: Sequence[str], fires: list[bool]
) -> float:
    """F1 of a language model that is told the explanation and says where the latent fires."""
    listed = "\n".join(f"{i + 1}. {example}" for i, example in enumerate(examples))
    answer = ask(
        f"A latent of a sparse autoencoder responds to this: {explanation}\n{listed}\n"
        "List the numbers of the excerpts that activate it, separated by commas."
    )
    said = {int(number) - 1 for number in re.findall(r"\d+", answer)}
    hits = sum(fires[i] for i in said if i < len(fires))
    return 2 * hits / max(1, len(said) + sum(fires))


def rate_diversity(ask: Ask, examples: Sequence[str]) -> float:
    """How varied a language model finds a latent's excerpts, 0 to 100 (Fig. 4, Tables 2 and 3)."""
    listed = "\n".join(f"- {example}" for example in examples)
    answer = ask(
        f"Rate from 0 (all alike) to 100 (nothing in common) how diverse these are:\n{listed}\n"
        "Answer with the number alone."
    )
    number = re.search(r"\d+", answer)
    if number is None:
        raise ResearchError(f"the language model rated diversity as '{answer[:40]}'; ask again.")
    return min(100.0, float(number[0]))
