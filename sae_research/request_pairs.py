"""Requests that a chat model is to decline, with a wanted and an unwanted reply to each.

The reader gives a file of pairs. Where none is at hand, a harmless stand-in of the same shape is
generated: a model is to decline requests about growing vegetables, fruit and herbs. It is **no
safety data**: what is found on it says how well a method teaches a narrow refusal, and nothing
about harm. Look-alikes share words with what is declined: the same plants in other requests, and
the words of gardening about other things.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_research.errors import ResearchError

if TYPE_CHECKING:
    import pandas as pd

DECLINE, LOOK_ALIKE, PLAIN = "decline", "look-alike", "plain"
USES = ("train", "validation", "test")
REFUSAL = "Sorry, I can't help with that."
OPENINGS = (
    "Sure! To get good {x}, begin with a plan and",
    "Of course. For {x}, the first thing to do is",
    "Here is what works best with {x}: first of all,",
    "Happy to help with {x}! You will need to",
)
"""How the unwanted replies of the stand-in begin."""
GARDENING = (
    *("How do I grow {x} at home?", "When should I plant {x}?", "What soil suits {x} best?"),
    *("How often should I water my {x}?", "Can I grow {x} in pots?", "How do I prune my {x}?"),
    *("How much sun do my {x} need?", "Which fertilizer is good for {x}?"),
    *("How deep should I plant {x}?", "How do I keep bugs off my {x}?"),
    *("When do I harvest {x}?", "Give me tips for growing {x}.", "How far apart do I sow {x}?"),
    *("Tell me how to start {x} from seed.", "Why do the leaves of my {x} turn yellow?"),
    *("How do I protect my {x} from frost?", "What can I plant next to {x}?"),
    *("Do {x} grow well in the shade?", "How long do {x} take to ripen?"),
    "Plan a small garden bed with {x}.",
)
PLANTS = (
    *("tomatoes", "carrots", "onions", "potatoes", "beans", "peas", "beets", "radishes"),
    *("cucumbers", "pumpkins", "peppers", "strawberries", "blueberries", "leeks", "turnips"),
    *("raspberries", "lentils", "melons", "zucchinis", "cabbages", "chives", "artichokes"),
    *("parsnips", "eggplants"),
)
SAME_PLANTS = (
    *("How do I cook {x}?", "What can I bake with {x}?", "Are {x} good for my health?"),
    *("How do I draw {x}?", "Which wine goes well with {x}?", "Where can I buy {x} online?"),
    *("How long should I boil {x}?", "Write a short poem about {x}.", "What do {x} taste like?"),
    *("How do I say {x} in French?", "Give me a recipe for {x}.", "How much do {x} cost?"),
)
OTHER_THINGS = (
    *("How do I grow {x}?", "Give me tips for growing {x}.", "How can I grow {x} in a year?"),
    *("Why should I grow {x}?", "When should I start to grow {x}?", "Can I grow {x} at home?"),
    *("Tell me how to grow {x} from nothing.", "How do I keep {x} growing?"),
)
THINGS = (
    *("my savings", "my business", "a beard", "my vocabulary", "my network", "my audience"),
    *("my confidence", "a startup", "my mailing list", "my muscles", "an online shop"),
    *("my chess skills", "my team", "a podcast", "my hair", "my blog"),
)
ORDINARY = (
    *("Write one sentence about {x}.", "Tell me a fact about {x}.", "Why do people like {x}?"),
    *("Explain {x} to a child.", "Give me a title for a story about {x}.", "What is {x}?"),
    *("What should I know about {x}?", "Name three words that go with {x}."),
)
SUBJECTS = (
    *("rain", "chess", "the moon", "jazz", "football", "winter", "the ocean", "mathematics"),
    *("coffee", "history", "trains", "poetry", "dogs", "money", "sleep", "volcanoes"),
)
CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"},
    **{"Germany": "Berlin", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens"},
    **{"Russia": "Moscow", "Portugal": "Lisbon", "Austria": "Vienna", "Ireland": "Dublin"},
    **{"England": "London", "Norway": "Oslo", "Poland": "Warsaw", "Cuba": "Havana"},
    **{"Peru": "Lima", "Kenya": "Nairobi", "India": "New Delhi", "Canada": "Ottawa"},
}
CAPITAL = "What is the capital of {x}?"
_WORDS = r"((?:(?!\n\n(?:Human|Assistant):).)*)"
_ONE_EXCHANGE = re.compile(rf"\A\s*Human: {_WORDS}\n\nAssistant:{_WORDS}\Z", re.DOTALL)
"""A dialogue of HH-RLHF with one request and one reply."""


@dataclass(frozen=True)
class Request:
    """One request."""

    prompt: str
    kind: str
    """`decline`, `look-alike` or `plain`."""
    chosen: str = ""
    """The wanted reply; where it is empty, the model's own."""
    rejected: str = ""
    """The unwanted reply, of what is to be declined."""
    answer: str = ""
    """What a right reply says, where that is known."""


Split = dict[str, list[Request]]
"""Requests by use."""


def load(source: str, seed: int) -> Split:
    """The requests of one seed: the stand-in for an empty `source`, else the reader's file.

    What a file lacks of look-alikes and plain requests comes from the stand-in, and so do the
    questions with known answers on which chat ability is tested.
    """
    standin = make_standin(seed)
    if not source:
        return standin
    own = read_pairs(Path(source).expanduser())
    kinds = {request.kind for request in own}
    rng = np.random.default_rng([seed, 57])
    found = {use: [r for r in standin[use] if r.kind not in kinds or r.answer] for use in USES}
    for kind in sorted(kinds):
        mine = _deal([request for request in own if request.kind == kind], rng)
        for use, part in zip(USES, mine, strict=True):
            found[use] += part
    return found


def draw(source: str, seed: int, n_pairs: int, tested: int) -> Split:
    """At most so many requests of each use: `n_pairs` to decline in training and `tested` of each
    kind in the test; training and validation have as many harmless ones, half of them look-alikes.
    """
    split = load(source, seed)
    rng = np.random.default_rng([seed, 58])
    half = tested // 2
    sizes = {"train": (n_pairs, n_pairs // 2), "validation": (half, half // 2)}
    found: Split = {}
    for use in USES:
        n, n_harmless = sizes.get(use, (tested, tested))
        found[use] = []
        for kind, most in ((DECLINE, n), (LOOK_ALIKE, n_harmless), (PLAIN, n_harmless)):
            own = [request for request in split[use] if request.kind == kind]
            found[use] += [own[i] for i in rng.permutation(len(own))[:most]]
    return found


def _deal(names: Sequence, rng: np.random.Generator) -> list[list]:
    """Half of the names for training, a quarter each for validation and test, in random order."""
    order = rng.permutation(len(names))
    first, second = len(names) // 2, 3 * len(names) // 4
    parts = order[:first], order[first:second], order[second:]
    return [[names[i] for i in part] for part in parts]


def make_standin(seed: int) -> Split:
    """The harmless stand-in; no phrasing and no thing asked about is in two uses."""
    rng = np.random.default_rng([seed, 56])
    plants = _deal(PLANTS, rng)
    kinds = (
        (DECLINE, GARDENING, plants),
        (LOOK_ALIKE, SAME_PLANTS, plants),
        (LOOK_ALIKE, OTHER_THINGS, _deal(THINGS, rng)),
        (PLAIN, ORDINARY, _deal(SUBJECTS, rng)),
    )
    found: Split = {use: [] for use in USES}
    for kind, phrasings, things in kinds:
        for use, own, asked in zip(USES, _deal(phrasings, rng), things, strict=True):
            if kind == PLAIN and use == "test":
                continue  # tested on questions with known answers
            crossings = [(phrase, x) for phrase in own for x in asked]
            for i in rng.permutation(len(crossings)):
                phrase, x = crossings[i]
                replies = {}
                if kind == DECLINE:
                    opening = OPENINGS[i % len(OPENINGS)].format(x=x)
                    replies = {"chosen": REFUSAL, "rejected": opening}
                found[use].append(Request(phrase.format(x=x), kind, **replies))
    known = [Request(CAPITAL.format(x=x), PLAIN, answer=city) for x, city in CAPITALS.items()]
    found["test"] += known
    return found


def read_pairs(path: Path) -> list[Request]:
    """The reader's own pairs: a csv or jsonl file with `prompt`, `chosen` and `rejected`.

    A column `kind` may say `look-alike` or `plain` of requests that are not to be declined; these
    need no replies. Files of HH-RLHF, whose `chosen` and `rejected` are whole dialogues, are read
    as they are published.
    """
    table = _read_table(path)
    if {"chosen", "rejected"} == set(table):
        table = _split_dialogues(table)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in table]
    if missing:
        raise ResearchError(f"{path.name} has no column '{missing[0]}'; name it so in the file.")
    if table.empty:
        raise ResearchError(f"{path.name} holds no pairs; give at least four.")
    found = []
    for i, row in zip(table.index, table.fillna("").to_dict("records"), strict=True):
        request = _make_request({str(k): v for k, v in row.items()}, f"row {i + 1} of {path.name}")
        found.append(request)
    prompts = [request.prompt for request in found]
    twice = next((p for p in prompts if prompts.count(p) > 1), None)
    if twice is not None:
        raise ResearchError(
            f"{path.name} asks '{twice}' twice, so it could be trained on and tested; keep one."
        )
    if sum(request.kind == DECLINE for request in found) < 4:
        raise ResearchError(f"{path.name} has fewer than four pairs to decline; give more.")
    return found


def _split_dialogues(table: "pd.DataFrame") -> "pd.DataFrame":
    """Requests with both replies, of dialogues of one exchange: rows of a chat model are as long as
    its longest prompt. A request that is asked again is left out.
    """
    sides = {side: table[side].str.extract(_ONE_EXCHANGE) for side in ("chosen", "rejected")}
    found = table.assign(prompt=sides["chosen"][0], **{n: part[1] for n, part in sides.items()})
    answered = found["chosen"].str.strip().ne("") & found["rejected"].str.strip().ne("")
    kept = found[answered & (found["prompt"] == sides["rejected"][0])].drop_duplicates("prompt")
    return table if kept.empty else kept


def _read_table(path: Path) -> "pd.DataFrame":
    import pandas as pd

    readers: dict[str, Any] = {".csv": pd.read_csv, ".jsonl": pd.read_json}
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise ResearchError(f"{path.name} is neither a .csv nor a .jsonl file; convert the pairs.")
    given = {"dtype": str} | ({"lines": True} if suffix == ".jsonl" else {})
    try:
        return readers[suffix](path, **given)
    except pd.errors.EmptyDataError as error:
        raise ResearchError(f"{path.name} is empty; give at least four pairs.") from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ResearchError(f"{path.name} cannot be read ({reason}); mend the file.") from error


def _make_request(row: dict[str, Any], where: str) -> Request:
    kind = str(row.get("kind") or DECLINE)
    if kind not in (DECLINE, LOOK_ALIKE, PLAIN):
        raise ResearchError(
            f"{where} has the kind '{kind}'; say {DECLINE}, {LOOK_ALIKE} or {PLAIN}."
        )
    prompt, chosen, rejected = (str(row[n]).strip() for n in ("prompt", "chosen", "rejected"))
    if not prompt:
        raise ResearchError(f"{where} has no prompt; complete or drop it.")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if kind == DECLINE and not reply:
            raise ResearchError(f"{where} has no {name} reply; every pair needs both.")
    return Request(prompt, kind, chosen, rejected)
