"""How a survey is put to a model: the block of a question, and the group contexts of the prompting baselines (3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa.letters import ALPHABET
from sae_research.surveys.survey import Group, Question

FORMS = ("QA", "BIO", "PORTRAY")
REFUSAL = "Prefer not to say"


@dataclass(frozen=True)
class Dialect:
    """The words of a model's survey: plain English, or those of the embedded specimen."""

    block: Callable[[Question, bool], str]
    """A question's prompt up to the answer's letter; the second argument lists the options from the top."""
    contexts: dict[str, Callable[[Group, Sequence[Group]], str]]
    """Text before the block that says who answers, by form; takes the group and all groups of its attribute."""
    joint: str
    """What stands between context and block."""
    refusing: Callable[[Question, bool], str] | None = None
    """The block with refusal as a last option, where the model knows words for it."""
    frame: Callable[[str], str] = str
    """What a whole prompt is set in, such as a chat template."""

    def plain(self, question: Question, reverse: bool) -> str:
        """The prompt of a question put to nobody in particular."""
        return self.frame(self.block(question, reverse))

    def offering_refusal(self, question: Question, reverse: bool) -> str:
        """The same, with refusal as a last option."""
        return self.frame(self.refusing(question, reverse))

    def prompted(
        self, form: str, group: Group, siblings: Sequence[Group]
    ) -> Callable[[Question, bool], str]:
        """The prompt of a question put to a member of `group`."""
        context = self.contexts[form](group, siblings)
        return lambda question, reverse: self.frame(
            f"{context}{self.joint}{self.block(question, reverse)}"
        )


def _specimen_block(question: Question, reverse: bool) -> str:
    from sae_research.world.survey.prompts import prompt

    return prompt(question, reverse=reverse)


def _specimen_question(group: Group, siblings: Sequence[Group]) -> str:
    names = [g.name for g in siblings]
    lettered = " ".join(f"{letter} {name}" for letter, name in zip(ALPHABET, names, strict=False))
    return f"question : {lettered} answer : {ALPHABET[names.index(group.name)]} ."


SPECIMEN = Dialect(
    _specimen_block,
    {
        "QA": _specimen_question,
        "BIO": lambda group, siblings: " ".join(f"i am {name} ." for name in group.name.split("|")),
        "PORTRAY": lambda group, siblings: f"the answer is {group.name} .",
    },
    " ",
)
"""The words that the survey specimen knows; BIO is how its own documents begin, the other two forms are new to it."""


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
    return f"{english_block(item, False)} {letter}. {group.name}\n\nKeep that answer in mind for the next question."


def _words(attribute: str) -> str:
    return attribute.replace("_", " ").replace("|", " and ").lower()


ENGLISH = Dialect(
    lambda question, reverse: english_block(question, reverse),
    {
        "QA": _english_question,
        "BIO": lambda group, siblings: (
            f"First comes a short note on the person who answers, then a question.\nNote: {_words(group.attribute)}: "
            f"{group.name}."
        ),
        "PORTRAY": lambda group, siblings: (
            f"Answer as a person would whose {_words(group.attribute)} is: {group.name}."
        ),
    },
    "\n\n",
    lambda question, reverse: english_block(question, reverse, refusal=True),
)
"""Plain English, in the manner of OpinionQA and SubPOP, in our own words."""


def in_chat(dialect: Dialect, tokenizer) -> Dialect:
    """The dialect for a model tuned on dialogues: a prompt is the user's turn, its last line opens the model's answer.

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
        return (
            framed.removeprefix(tokenizer.bos_token or "") + opening
        )  # the start token comes with every row

    return replace(dialect, frame=frame)
