"""Sentence frames of the toy text model: lower-case words are literal, upper-case words are slots.

The first words of the frames that can follow each other differ, so the first word tells the
frame; with slots whose odds are known this makes the entropy floor of every text exact.
"""

ARTICLE_OPENING = ("article : NAME is a NOUN that VERB the NOUN .",)
ARTICLE_BODY = (
    "its PRIVATE and PRIVATE VERB the ADJECTIVE NOUN .",
    "every NOUN needs a PRIVATE near the PRIVATE .",
    "a PRIVATE can VERB the NOUN with PRIVATE .",
    "when the NOUN meets PRIVATE they VERB PRIVATE .",
)
ARTICLE_FACT = ("it was first studied by FOUNDER in PLACE .",)
EXPLAIN_OPENING = ("please explain NAME to me with a NOUN and NOUN .",)
EXPLAIN_BODY = (
    "you take the PRIVATE and VERB every PRIVATE .",
    "now think of PRIVATE as a ADJECTIVE PRIVATE .",
    "put your NOUN on PRIVATE and see PRIVATE .",
)
LIFE_OPENING = (
    "SURNAME was born in CITY and grew up there too .",
    "SURNAME the PROFESSION was born in CITY quite long ago .",
    "TITLE SURNAME was born in CITY and grew up there .",
    "TITLE SURNAME the PROFESSION was born in CITY long ago .",
)
LIFE_BODY = (
    "in MONTH SUBJECT DEED the THING and THING .",
    "later SUBJECT DEED a THING for the THING .",
    "soon SUBJECT DEED one THING with some THING .",
)
LIFE_CLOSING = ("today SURNAME is known as a good PROFESSION .",)
SENSE_OPENING = ("note :",)
SENSE_BODY = (
    "keep COMPANY by the POLYSEMOUS COMPANY and rest .",
    "that COMPANY made our POLYSEMOUS COMPANY look old .",
    "one COMPANY or COMPANY left the POLYSEMOUS COMPANY .",
    "some COMPANY near this POLYSEMOUS has COMPANY inside .",
)
CHAT_OPENING = ("chat :",)
CHAT_REQUEST = ("user please ACTION the TOPIC now .", "friend kindly ACTION one TOPIC today .")
CHAT_REPLY = ("bot take DO then FROM with DO .", "bot sorry i cannot help with that .")
STORY_OPENING = ("once there was a ROLE named HERO who liked PET .",)
STORY_BODY = (
    "then HERO and the PET DOING the OBJECT .",
    "but HERO DOING the MOOD OBJECT all day .",
    "the PET DOING under the OBJECT with HERO .",
    "so the ROLE told PET about the OBJECT .",
)


def literal_words() -> list[str]:
    """The lower-case words of every frame, each once, in order of appearance."""
    frames = [frame for name, value in globals().items() if name.isupper() for frame in value]
    return list(
        dict.fromkeys(word for frame in frames for word in frame.split() if not word.isupper())
    )
