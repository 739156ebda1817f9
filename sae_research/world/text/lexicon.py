"""The words of the toy text model and the fixed truths about them.

Nothing here depends on a seed, so every toy model shares one vocabulary and one set of facts.
All words are harmless: a "restricted" topic is a mythical beast and a "restricted" action an
empty verb, because only the pattern matters.
"""

from functools import cache, cached_property

import numpy as np

from sae_research.world.text.frames import literal_words

TOPICS = {
    "physics": (
        "gravity momentum entropy inertia torque friction pressure voltage charge photon electron "
        "proton neutron quark gluon boson lepton meson neutrino plasma magnet optics lens prism "
        "laser spectrum frequency amplitude resonance diffraction refraction reflection "
        "interference polarization radiation isotope fission fusion decay orbit comet nebula "
        "pulsar quasar galaxy vacuum viscosity buoyancy turbulence elasticity tension capacitor "
        "inductor resistor transistor superfluid phonon exciton soliton muon",
        "field energy particle force experiment equation theory detector",
        "accelerates radiates scatters oscillates attracts conducts",
        "quantum thermal kinetic magnetic electric relativistic",
    ),
    "cooking": (
        "bread soup cake stew pie cheese sauce noodle salad jam pickle porridge",
        "pan oven spoon bowl kitchen recipe flour butter",
        "bakes stirs boils fries slices tastes",
        "salty sweet crispy warm bitter creamy",
    ),
    "music": (
        "violin flute drum harp cello trumpet organ banjo oboe piano lute horn",
        "melody concert tune rhythm chord stage choir anthem",
        "plays sings hums strums echoes whistles",
        "loud soft sharp slow lively solemn",
    ),
    "sailing": (
        "anchor sloop ketch galley raft ferry canoe schooner yacht barge kayak tug",
        "harbor sail mast deck tide wave captain rope",
        "drifts steers floats docks tacks rows",
        "windy deep calm wet rough briny",
    ),
    "gardening": (
        "rose tulip fern ivy lily moss daisy orchid cactus maple willow clover",
        "soil seed root leaf bed hedge pond petal",
        "grows blooms wilts sprouts climbs shades",
        "green mossy sunny damp wild fragrant",
    ),
    "sport": (
        "tennis hockey rugby polo cricket karate judo rowing fencing golf squash curling",
        "team match goal court player score referee race",
        "wins runs throws catches kicks jumps",
        "quick strong fair tired proud fit",
    ),
    "building": (
        "castle bridge tower temple cottage barn lighthouse chapel cabin palace mill tunnel",
        "brick roof wall door beam stair floor arch",
        "stands holds leans supports shelters crumbles",
        "tall narrow stone wooden ancient solid",
    ),
    "weaving": (
        "wool silk linen velvet cotton lace denim felt tweed canvas hemp corduroy",
        "loom thread needle yarn cloth pattern button fabric",
        "weaves knits sews stitches folds dyes",
        "plaid smooth thick thin woven striped",
    ),
    "animals": (
        "otter badger falcon heron lynx beaver marten weasel hedgehog raven owl fox",
        "burrow feather paw nest prey forest tail fur",
        "hunts hides digs sleeps barks feeds",
        "shy furry fierce nocturnal gray hungry",
    ),
}
"""Topic: its concepts, then the 8 nouns, 6 verbs and 6 adjectives that they share."""

ENDINGS = ["ist", "oid", "ling", "ward", "kin", "ette"]
"""A concept's private words are its name with one of these, so that the token tells."""

SENSES = {
    "bank": {
        "money": "loan teller account deposit mortgage cheque",
        "river": "trout reeds shore stream mud pebble",
        "tilt": "wing pilot cockpit runway glide altitude",
    },
    "spring": {
        "season": "april blossom thaw lambs easter snowdrop",
        "coil": "mattress metal coil bounce lever steel",
        "water": "well mineral bottle aquifer fountain thirst",
    },
    "light": {
        "lamp": "bulb candle lantern glow socket switch",
        "weight": "gram scale airy balloon parcel luggage",
        "pale": "pastel cream beige tint paint ivory",
    },
    "bat": {
        "animal": "cave roost dusk insect sonar guano",
        "club": "pitcher inning umpire baseball glove homerun",
    },
    "seal": {
        "animal": "arctic flipper icefloe whisker blubber pup",
        "stamp": "wax envelope letter signet parchment ribbon",
    },
    "bow": {
        "weapon": "arrow quiver archer target string deer",
        "knot": "gift braid bonnet present dress lacy",
    },
}
"""Polysemous word: its senses, each with the six words that keep it company."""

FOUNDERS = (
    "abelard brahms corelli dumont eriksen farrow galton hobbes iversen jordaan kepler lovell "
    "moreau nansen orwell pascal"
)
PLACES = (
    "lisbon cairo oslo lima delhi kyoto accra quebec havana riga sofia tunis dakar perth turin "
    "minsk"
)
CITIES = "boston denver austin dallas tampa fresno omaha tulsa reno boise salem akron"
SURNAMES = (
    "adler baxter carver dalton emery fuller garner hadley irving jarvis kendall lawson mercer "
    "norris palmer quincy"
)
MONTHS = "january february june july october december"
DEEDS = "moved found carried bought cleaned lost kept borrowed"
THINGS = (
    "umbrella bicycle newspaper teapot carpet mirror jacket camera postcard pencil basket clock"
)
PROFESSIONS = {
    "professor": (
        "lecture thesis seminar journal grant faculty essay archive syllabus theorem dean library"
    ),
    "nurse": (
        "infirmary patient bandage syringe clinic thermometer pulse medicine stretcher vaccine "
        "dressing crutch"
    ),
}
GENDERS = {"male": ("mr", "he"), "female": ("ms", "she")}

RESTRICTED_TOPICS = "obsidian cinnabar basilisk gorgon chimera hydra kraken wyvern"
PLAIN_TOPICS = (
    "apple pear plum peach cherry grape mango lemon melon fig apricot quince papaya guava lime kiwi"
)
RESTRICTED_ACTIONS = "unseal provoke summon unleash"
PLAIN_ACTIONS = "describe draw count praise"
TOPIC_ENDINGS = ["leaf", "card", "song", "mark"]
ACTION_ENDINGS = ["step", "turn", "plan", "tool"]

HEROES = "tim sue ben ann max meg joe zoe tom amy sam eva"
ROLES = "boy girl farmer sailor baker king painter tailor"
PETS = "puppy kitten rabbit pony duck goat parrot turtle hamster frog mouse lamb"
DOINGS = "chased saw hugged followed washed hid dropped shared opened pulled fixed painted"
OBJECTS = (
    "ball kite box cart hat drumkit toy marble cookie blanket bucket swing ladder sandbox puzzle "
    "wagon"
)
MOODS = "red tiny shiny funny plain broken new muddy"


def _pseudowords(n: int) -> list[str]:
    """`n` pronounceable words that exist in no language, always the same."""
    middles = ("or", "al", "en", "ir", "um")
    ends = ("vane", "thel", "quor", "dris")
    words = [start + middle + end for end in ends for middle in middles for start in "mvzdtkbr"]
    return [words[(i * 37) % len(words)] for i in range(n)]


class Lexicon:
    """Every word list as token ids, and the facts that tie them together."""

    def __init__(self) -> None:
        self.topics = list(TOPICS)
        self.concepts = [c for names, *_ in TOPICS.values() for c in names.split()]
        sizes = [len(names.split()) for names, *_ in TOPICS.values()]
        self.topic_of = np.repeat(np.arange(len(TOPICS)), sizes)
        self.physics = np.flatnonzero(self.topic_of == 0)
        self.synonyms = _pseudowords(len(self.physics))
        self.senses = [f"{word}/{sense}" for word, senses in SENSES.items() for sense in senses]
        self.sense_word = [word for word, senses in SENSES.items() for _ in senses]
        self.request_topics = (RESTRICTED_TOPICS + " " + PLAIN_TOPICS).split()
        self.actions = (RESTRICTED_ACTIONS + " " + PLAIN_ACTIONS).split()
        self.n_restricted_topics = len(RESTRICTED_TOPICS.split())
        self.n_restricted_actions = 4
        n = len(self.concepts)
        self.founder_of = (np.arange(n) * 7 + np.arange(n) // 16) % 16
        self.place_of = (np.arange(n) * 5 + 3 * (np.arange(n) // 16)) % 16

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary: frame words first, then content words, each once."""
        content = [w for parts in TOPICS.values() for part in parts for w in part.split()]
        content += self.synonyms + [c + e for c in self.concepts for e in ENDINGS]
        for word, senses in SENSES.items():
            content += [word, *" ".join(senses.values()).split()]
        content += [t + e for t in self.request_topics for e in TOPIC_ENDINGS] + self.request_topics
        content += [a + e for a in self.actions for e in ACTION_ENDINGS] + self.actions
        content += [p for name, cues in PROFESSIONS.items() for p in (name, *cues.split())]
        content += [w for forms in GENDERS.values() for w in forms]
        people = (FOUNDERS, PLACES, CITIES, SURNAMES, MONTHS, DEEDS, THINGS)
        stories = (HEROES, ROLES, PETS, DOINGS, OBJECTS, MOODS)
        content += " ".join(people + stories).split()
        repeated = {w for w in content if content.count(w) > 1}
        if repeated:
            raise ValueError(f"content words must be unique: {sorted(repeated)}")
        return [*(w for w in literal_words() if w not in content), *content]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token id of every word; the tokenizer's four special tokens come first."""
        return {word: i + 4 for i, word in enumerate(self.words)}

    def table(self, rows: list[list[str]] | list[str]) -> np.ndarray:
        """Token ids of rows of words: what a slot may hold, one row per value of its variable."""
        words = (row.split() if isinstance(row, str) else row for row in rows)
        return np.array([[self.ids[word] for word in row] for row in words])


@cache
def lexicon() -> Lexicon:
    """The one lexicon."""
    return Lexicon()
