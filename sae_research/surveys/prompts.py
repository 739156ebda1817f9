"""How a survey is put to a model, and how its answers are read off the option letters (3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_research.errors import ResearchError, unknown
from sae_research.surveys.survey import Group, Question

if TYPE_CHECKING:
    from sae_research.models import Edit, LanguageModel

REFUSAL = "Prefer not to say"


@dataclass(frozen=True)
class PromptTemplate:
    """The words of a model's survey: plain English, or those of the toy model."""

    block: Callable[[Question, bool], str]
    """A question's prompt up to the answer's letter; True lists the options from the top."""
    contexts: dict[str, Callable[[Group, Sequence[Group]], str]]
    """Text that says who answers, by form; takes the group and all groups of its attribute."""
    separator: str
    """What stands between context and block."""
    refusing: Callable[[Question, bool], str] | None = None
    """The block with refusal as a last option, where the model knows words for it."""
    frame: Callable[[str], str] = str
    """What a whole prompt is set in, such as a chat template."""

    def plain(self, question: Question, reverse: bool) -> str:
        """The prompt of a question put to nobody in particular."""
        return self.frame(self.block(question, reverse))

    def refusal_prompt(self, question: Question, reverse: bool) -> str:
        """The same, with refusal as a last option."""
        return self.frame(self.refusing(question, reverse))

    def group_prompt(
        self, form: str, group: Group, siblings: Sequence[Group]
    ) -> Callable[[Question, bool], str]:
        """The prompt of a question put to a member of `group`."""
        context = self.contexts[form](group, siblings)
        return lambda question, reverse: self.frame(
            f"{context}{self.separator}{self.block(question, reverse)}"
        )


def _toy_block(question: Question, reverse: bool) -> str:
    from sae_research.world.survey.prompts import prompt

    return prompt(question, reverse=reverse)


def _toy_question(group: Group, siblings: Sequence[Group]) -> str:
    names = [g.name for g in siblings]
    lettered = " ".join(f"{letter} {name}" for letter, name in zip(ALPHABET, names, strict=False))
    return f"question : {lettered} answer : {ALPHABET[names.index(group.name)]} ."


TOY_TEMPLATE = PromptTemplate(
    _toy_block,
    {
        "QA": _toy_question,
        "BIO": lambda group, siblings: " ".join(f"i am {name} ." for name in group.name.split("|")),
        "PORTRAY": lambda group, siblings: f"the answer is {group.name} .",
    },
    " ",
)
"""The words that the toy model knows; BIO is how its own documents begin, the other two are new."""


def english_block(question: Question, reverse: bool, refusal: bool = False) -> str:
    """The survey block in English; with `refusal`, one more option that no distribution counts."""
    options = list(question.options[::-1] if reverse else question.options) + [REFUSAL] * refusal
    letters = ALPHABET[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    allowed = f"{', '.join(letters[:-1])} or {letters[-1]}"
    return "\n".join(
        [f"Question: {question.text}", *lines, f"Answer with {allowed}.", "", "Answer:"]
    )


def _english_question(group: Group, siblings: Sequence[Group]) -> str:
    text = f"Which of these describes you ({_words(group.attribute)})?"
    item = Question("", text, tuple(g.name for g in siblings), ())
    letter = ALPHABET[[g.name for g in siblings].index(group.name)]
    answered = f"{english_block(item, False)} {letter}. {group.name}"
    return f"{answered}\n\nKeep that answer in mind for the next question."


def _words(attribute: str) -> str:
    return attribute.replace("_", " ").replace("|", " and ").lower()


def _describe(group: Group, between: str, link: str) -> str:
    """Every attribute of the group with its value; an intersection has several."""
    pairs = zip(group.attribute.split("|"), group.name.split("|"), strict=True)
    return link.join(f"{_words(attribute)}{between}{name}" for attribute, name in pairs)


ENGLISH_TEMPLATE = PromptTemplate(
    english_block,
    {
        "QA": _english_question,
        "BIO": lambda group, siblings: (
            "First comes a short note on the person who answers, then a question.\n"
            f"Note: {_describe(group, ': ', '; ')}."
        ),
        "PORTRAY": lambda group, siblings: (
            f"Answer as a person would whose {_describe(group, ' is: ', ' and ')}."
        ),
    },
    "\n\n",
    lambda question, reverse: english_block(question, reverse, refusal=True),
)
"""Plain English, in the manner of OpinionQA and SubPOP, in our own words."""


TEMPLATES = {"english": ENGLISH_TEMPLATE, "english chat": ENGLISH_TEMPLATE, "toy": TOY_TEMPLATE}
"""Templates by the name that a saved shift carries; the chat one needs the model's tokenizer."""


def use_chat_template(template: PromptTemplate, tokenizer) -> PromptTemplate:
    """A prompt for a model tuned on dialogues is the user's turn, its last line opens the answer.

    So the letter follows the same words as for a base model, and the same tokens can stand for it.
    """
    if not tokenizer.chat_template:
        raise ResearchError(
            "this model is said to be tuned on dialogues but its tokenizer has no chat template."
        )

    def frame(text: str) -> str:
        asked, _, opening = text.rpartition("\n")
        turns = [{"role": "user", "content": asked.strip()}]
        framed = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # the start token comes with every row
        return framed.removeprefix(tokenizer.bos_token or "") + opening

    return replace(template, frame=frame)


# option letters

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class OptionLetters:
    """The tokens that stand for each option letter, and what logits say about the options."""

    def __init__(self, tokenizer, count: int):
        self.variants = [find_letter_tokens(tokenizer, letter) for letter in ALPHABET[:count]]
        width = max(map(len, self.variants))
        self.tokens = torch.tensor([t + [t[0]] * (width - len(t)) for t in self.variants])
        self.real = torch.tensor([[i < len(t) for i in range(width)] for t in self.variants])

    def score_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """s_k = log sum over variants of exp(logit), [..., vocabulary] to [..., letters]."""
        return self._join_variants(logits[..., self.tokens.to(logits.device)])

    def score_states(self, tail, states: torch.Tensor) -> torch.Tensor:
        """s_k from final states, without the rest of the vocabulary."""
        logits = tail.logits(states, self.tokens.flatten().to(states.device))
        return self._join_variants(logits.unflatten(-1, self.tokens.shape))

    def _join_variants(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(~self.real.to(logits.device), -torch.inf).logsumexp(-1)


def find_letter_tokens(tokenizer, letter: str) -> list[int]:
    """Ids of the letter with and without a leading space, where that is one token.

    Some tokenizers put a space before every text, so that even "A" becomes two tokens; then the
    letter's own entry of the vocabulary counts.
    """
    encoded = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (letter, f" {letter}")
    ]
    found = [ids[0] for ids in encoded if len(ids) == 1]
    if not found:
        vocabulary = tokenizer.get_vocab()
        # byte-level tokenizers write a leading space as Ġ, SentencePiece as ▁
        variants = (letter, f"Ġ{letter}", f"▁{letter}")
        found = [vocabulary[v] for v in variants if v in vocabulary]
    ids = [i for i in dict.fromkeys(found) if i != tokenizer.unk_token_id]
    if not ids:
        raise ResearchError(
            f"the tokenizer has no single token for the option letter '{letter}'; "
            "use another model."
        )
    return ids


def sort_by_ordinal(
    scores: torch.Tensor, n_options: torch.Tensor, reverse: torch.Tensor
) -> torch.Tensor:
    """Letter scores [..., rows, letters] by ordinal value; -inf beyond the last option."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    n_options, reverse = n_options[:, None], reverse[:, None]
    source = torch.where(reverse & (places < n_options), n_options - 1 - places, places)
    return scores.gather(-1, source.expand_as(scores)).masked_fill(places >= n_options, -torch.inf)


@dataclass(frozen=True)
class AnswerDistribution:
    """What a model answers, and how far its letters can be trusted."""

    probabilities: np.ndarray
    """P(k | q) by ordinal position, both orders averaged, [..., questions, options]."""
    mass: np.ndarray
    """Probability of the letters among all tokens, [..., questions]."""
    order_sensitivity: np.ndarray
    """Total variation between the two orders, [..., questions]."""

    def means(self) -> dict[str, float]:
        """Mean mass and order sensitivity, as tables call them."""
        return {"mass": float(self.mass.mean()), "order": float(self.order_sensitivity.mean())}


def average_orders(found: torch.Tensor, mass: torch.Tensor | None = None) -> AnswerDistribution:
    """Join the two option orders: probabilities are averaged, not logits.

    `found` is [..., prompts, options] with the prompts of all questions in one order, then in the
    other, and `mass` is [..., prompts], or unknown where only scores of letters are.
    """
    first, second = (half.double().cpu().numpy() for half in found.chunk(2, -2))
    letters = np.full(first.shape[:-1], np.nan)
    if mass is not None:
        letters = np.mean([half.double().cpu().numpy() for half in mass.chunk(2, -1)], axis=0)
    return AnswerDistribution((first + second) / 2, letters, np.abs(first - second).sum(-1) / 2)


# questions from outside


def find_template(name: str, tokenizer) -> PromptTemplate:
    """A template by its name."""
    if name not in TEMPLATES:
        raise unknown("prompt template", name, TEMPLATES, "a shift")
    template = TEMPLATES[name]
    return use_chat_template(template, tokenizer) if name == "english chat" else template


def answer_question(
    model: "LanguageModel",
    template: str,
    question: "str | Question",
    options: Sequence[str] = (),
    edits: "dict[str, Edit] | None" = None,
) -> dict[str, float]:
    """Probability of each option of one question under edits, both orders averaged."""
    if isinstance(question, str):
        if len(options) < 2:
            raise ResearchError("give the question's options in ordinal order, two at least.")
        question = Question("", question, tuple(options), tuple(range(len(options))))
    letters = OptionLetters(model.tokenizer, question.n_options)
    write = find_template(template, model.tokenizer).plain
    n_options = torch.tensor([question.n_options], device=model.device)
    found = []
    for reverse in (False, True):
        tokens = model.tokens([write(question, reverse)])
        with torch.no_grad():
            scores = letters.score_logits(model.logits(tokens, edits)[:, -1])
        order = torch.tensor([reverse], device=model.device)
        found.append(sort_by_ordinal(scores, n_options, order)[0].softmax(-1))
    mean = (found[0] + found[1]) / 2
    return dict(zip(question.options, mean.tolist(), strict=False))
