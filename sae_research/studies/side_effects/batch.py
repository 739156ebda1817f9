"""All dictionaries of a subject for one seed: the shard that a profile runs once for every subject and seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_research import catalogue, store
from sae_research.studies.side_effects import analysis, corpus, study

if TYPE_CHECKING:
    import pandas as pd

    from sae_research.config import Profile


@dataclass
class Part:
    """One dictionary, one seed."""

    key: dict[str, object]
    """Subject, primary dictionary and seed: the columns that tell its rows apart."""
    frame: "pd.DataFrame"
    """The feature table."""
    facts: dict[str, float]
    """What was loaded and chosen."""
    tables: dict[str, "pd.DataFrame"]
    """Everything that follows, see `analysis.tables`."""


def run(task: tuple[str, int], profile: "Profile") -> list[Part]:
    """Screen the dictionaries of `task` = (subject, seed): all of them for seed 0, the main one for the others.

    Contexts, downstream panel and threshold are those of the main dictionary throughout, so that two dictionaries
    differ in nothing but themselves.
    """
    name, seed = task
    subject = catalogue.get(name)
    settings = corpus.as_published(subject, profile.side_effects)
    lens = subject.load(device=profile.runtime.device, dtype=profile.runtime.dtype)
    primaries, role = corpus.dictionaries(subject, settings)
    downstream = corpus.load(subject, role, lens)
    pool, fresh = (
        corpus.contexts(subject, lens, settings, fresh=f, seed=seed) for f in (False, True)
    )
    prompt = None if subject.embedded else lens.tokens([settings.prompt])
    fixed: dict[str, torch.Tensor | float] = {}
    parts = []
    for primary, (owner, owned) in primaries.items():
        sae = corpus.load(owner, owned, lens)
        found = study.screen_dictionary(
            lens,
            sae,
            downstream,
            pool,
            settings,
            seed=seed,
            prompt=prompt,
            folded=_folded(name),
            expected=None if fixed else subject,
            **fixed,
        )
        if not fixed:
            fixed = {"panel": found.panel, "tau": found.facts["tau"]}
        tables = analysis.tables(found.frame, settings, seed)
        tables |= analysis.confirmation(found, downstream, fresh, settings, seed)
        key = {"subject": name, "primary": primary, "seed": seed}
        order = profile.side_effects.models.index(name) + len(parts) / 100  # as in the settings
        parts.append(Part(key, found.frame, found.facts | {"order": order}, tables))
        if seed:
            break
    return parts


def tasks(profile: "Profile") -> list[tuple[str, int]]:
    """Every subject with every seed."""
    return [
        (name, seed)
        for name in profile.side_effects.models
        for seed in range(profile.runtime.seeds)
    ]


def _folded(subject: str) -> bool:
    """Whether direct logits take in the final norm: the published Llama script reads the raw unembedding."""
    return not subject.startswith("llama")


def save(parts: list[Part], folder: Path) -> None:
    """Write parts as CSV and JSON, numbers to the last digit."""
    for part in parts:
        place = folder / "-".join(str(value).replace("/", "_") for value in part.key.values())
        place.mkdir(parents=True)
        store.write_json(place / "facts.json", {"key": part.key, "facts": part.facts})
        store.write_text(place / "features.csv", part.frame.to_csv())
        for name, table in part.tables.items():
            store.write_text(place / f"{name}.csv", table.to_csv(index=False))


def load(folder: Path) -> list[Part]:
    """Parts as `save` wrote them."""
    import pandas as pd

    parts = []
    for file in sorted(Path(folder).rglob("facts.json")):
        about, place = store.read_json(file), file.parent
        tables = {
            path.stem: pd.read_csv(path, float_precision="round_trip")
            for path in sorted(place.glob("*.csv"))
            if path.stem != "features"
        }
        frame = pd.read_csv(
            place / "features.csv", index_col="feature", float_precision="round_trip"
        )
        parts.append(Part(about["key"], frame, about["facts"], tables))
    return sorted(parts, key=lambda p: (p.key["seed"], p.facts["order"]))


def resumed(task: tuple[str, int], profile: "Profile", scratch: Path) -> list[Part]:
    """`run`, unless the same settings have already been run into `scratch`: a killed run goes on where it stopped."""
    key = {"task": task, "settings": profile.side_effects, "runtime": profile.runtime.dtype}
    key |= {
        "code": store.code(*Path(__file__).parent.glob("*.py")),
        "subject": catalogue.get(task[0]).content(),
    }
    return load(
        store.resumed(
            scratch / f"{task[0]}-{task[1]}", key, lambda folder: save(run(task, profile), folder)
        )
    )
