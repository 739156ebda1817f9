"""Reading answers: option letters from exact next-token logits, both option orders averaged (section 3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae_research.errors import ResearchError
from sae_research.surveys.survey import Question

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Letters:
    """The tokens that stand for each option letter, and what the model's logits say about the options."""

    def __init__(self, tokenizer, count: int):
        self.variants = [single_tokens(tokenizer, letter) for letter in ALPHABET[:count]]
        width = max(map(len, self.variants))
        self.tokens = torch.tensor([t + [t[0]] * (width - len(t)) for t in self.variants])
        self.real = torch.tensor([[i < len(t) for i in range(width)] for t in self.variants])

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """s_k = log sum over variants of exp(logit), from logits [..., vocabulary] to [..., letters]."""
        found = logits[..., self.tokens.to(logits.device)]
        return found.masked_fill(~self.real.to(logits.device), -torch.inf).logsumexp(-1)

    def unembedded(self, upper, states: torch.Tensor) -> torch.Tensor:
        """s_k from final states, without the rest of the vocabulary."""
        logits = upper.logits(states, self.tokens.flatten().to(states.device))
        logits = logits.unflatten(-1, self.tokens.shape)
        return logits.masked_fill(~self.real.to(logits.device), -torch.inf).logsumexp(-1)


def single_tokens(tokenizer, letter: str) -> list[int]:
    """Ids of the letter with and without a leading space, where that is one token."""
    found = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (letter, f" {letter}")
    ]
    ids = list(
        dict.fromkeys(ids[0] for ids in found if len(ids) == 1 and ids[0] != tokenizer.unk_token_id)
    )
    if not ids:
        raise ResearchError(
            f"the tokenizer has no single token for the option letter '{letter}'; use another model."
        )
    return ids


def option_log_probs(
    scores: torch.Tensor, ladder: torch.Tensor, reverse: torch.Tensor
) -> torch.Tensor:
    """log P_theta(k | q) by ordinal position from letter scores [rows, letters]; -inf beyond a question's options."""
    return by_ordinal(scores, ladder, reverse).log_softmax(-1)


def by_ordinal(scores: torch.Tensor, ladder: torch.Tensor, reverse: torch.Tensor) -> torch.Tensor:
    """Letter scores in the order of the options' ordinal values; -inf beyond a question's last option."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    ladder, reverse = ladder[:, None], reverse[:, None]
    source = torch.where(reverse & (places < ladder), ladder - 1 - places, places)
    return scores.gather(-1, source).masked_fill(places >= ladder, -torch.inf)


@dataclass(frozen=True)
class Reading:
    """What a model answers, and how far its letters can be trusted."""

    probabilities: np.ndarray
    """P(k | q) by ordinal position, both orders averaged, [..., questions, options]."""
    mass: np.ndarray
    """Probability of the letters among all tokens, [..., questions]."""
    order_sensitivity: np.ndarray
    """Total variation between the two orders, [..., questions]."""


def averaged(by_order: Sequence[np.ndarray], mass: Sequence[np.ndarray]) -> Reading:
    """Join the readings of the two option orders: probabilities are averaged, not logits."""
    first, second = by_order
    sensitivity = np.abs(first - second).sum(-1) / 2
    return Reading((first + second) / 2, np.mean(mass, axis=0), sensitivity)


def refusal_share(question_mass: np.ndarray, refusal_mass: np.ndarray) -> np.ndarray:
    """R_M = mass of the refusal option among all options offered; refusals never enter the distribution itself."""
    return refusal_mass / (question_mass + refusal_mass)


def most_options(questions: Sequence[Question]) -> int:
    """Letters that a survey needs."""
    return max(q.ladder for q in questions)
