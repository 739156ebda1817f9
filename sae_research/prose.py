"""Real English text: docstrings of the installed libraries, or what the reader gives.

Every installation holds the docstrings, and who wrote them had no SAE in mind. They are technical
English, so what is found on them says little about other registers.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research import docstrings, paths, store
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from torch import LongTensor

    from sae_research.models import LanguageModel

DOCSTRINGS = "docstrings"
"""The text that needs no network."""
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.1, "fresh": 0.1}
"""Share of the files in each split; `fresh` is for what is chosen on `test`."""
_HUB_ROWS = 100_000
"""Rows that are read of a corpus on the hub."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph and where it comes from."""

    text: str
    library: str
    """Import name of the library; a reader's own text is `own`."""
    file: str
    """Module file below site-packages, or the reader's file."""

    @property
    def subdomain(self) -> str:
        """The first two parts of the module's name, such as `sympy.physics`."""
        return ".".join(Path(self.file).with_suffix("").parts[:2])

    def is_in(self, subdomain: str) -> bool:
        """Whether it belongs to a library or subdomain; `` is all text."""
        return not subdomain or f"{self.subdomain}.".startswith(f"{subdomain}.")

    @property
    def split(self) -> str:
        """The split of its whole file, drawn by the file's name."""
        drawn = _draw(self.file)
        for name, share in SPLITS.items():
            drawn -= share
            if drawn < 0:
                return name
        return name


def _draw(name: str) -> float:
    """A number between 0 and 1 that a name always gives."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


@dataclass(frozen=True)
class Corpus:
    """Paragraphs in the order of their files."""

    paragraphs: tuple[Paragraph, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all paragraphs and labels, for the keys of runs."""
        return store.fingerprint([[p.library, p.file, p.text] for p in self.paragraphs])

    def texts(self, split: str, subdomain: str = "") -> list[str]:
        """The texts of a split, all or those of one library or subdomain."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS, "the corpus")
        return [p.text for p in self.paragraphs if p.split == split and p.is_in(subdomain)]

    def mixed(self, split: str) -> list[Paragraph]:
        """The paragraphs of a split, file after file in an order that mixes the libraries."""
        return sorted((p for p in self.paragraphs if p.split == split), key=lambda p: _draw(p.file))

    def documents(self, split: str) -> list[str]:
        """The files of a split, in an order that mixes the libraries."""
        files: dict[str, list[str]] = {}
        for p in self.mixed(split):
            files.setdefault(p.file, []).append(p.text)
        return ["\n\n".join(texts) for texts in files.values()]

    def sizes(self) -> dict[str, int]:
        """Characters by subdomain, the largest first."""
        found: Counter[str] = Counter()
        for p in self.paragraphs:
            found[p.subdomain] += len(p.text)
        return dict(found.most_common())


def load(source: str | Path = DOCSTRINGS) -> Corpus:
    """The corpus `docstrings`, a text file or a folder of them (paragraphs between blank lines), or
    a corpus of the hub as `owner/name` or `owner/name:configuration`.
    """
    if source == DOCSTRINGS:
        return _from_libraries()
    path = Path(source).expanduser()
    if path.is_dir():
        return Corpus(
            tuple(
                Paragraph(part, "own", file.relative_to(path).as_posix())
                for file in sorted(path.rglob("*.txt"))
                for part in _parts(file)
            )
        )
    if path.is_file():
        return _in_blocks(_parts(path), "own", path.name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(source)):
        return _from_hub(str(source))
    raise ResearchError(
        f"there is no text '{source}'; give `docstrings`, a text file, a folder of text files, or "
        "a corpus of the hub as `owner/name`."
    )


def make_rows(model: "LanguageModel", texts: Sequence[str], n: int, length: int) -> "LongTensor":
    """The texts as one stream in `n` rows of `length` tokens that begin with BOS."""
    rows = model.packed(list(texts), length)
    if len(rows) < n:
        raise ResearchError(
            f"the text gives {len(rows)} rows of {length} tokens and {n} are asked for; give more "
            "text, or ask for fewer or shorter rows."
        )
    return rows[:n]


# where text comes from


def _from_libraries() -> Corpus:
    """Taken from the cache, if made by this code from these versions."""
    versions = {row["library"]: row["version"] for row in docstrings.provenance()}
    key = {"versions": versions, "code": store.sha256(Path(docstrings.__file__))}

    def build(folder: Path) -> None:
        store.write_json(folder / "paragraphs.json", list(docstrings.find_paragraphs()))

    folder = store.resumed(paths.CACHE / "text" / DOCSTRINGS, key, build)
    rows = store.read_json(folder / "paragraphs.json")
    return Corpus(tuple(Paragraph(*row) for row in rows))


def _parts(path: Path) -> list[str]:
    """The paragraphs of a text file."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResearchError(f"{path.name} cannot be read as UTF-8 text ({error}).") from error
    plain = (" ".join(part.split()) for part in re.split(r"\n\s*\n", content))
    return [part for part in plain if part]


def _in_blocks(texts: Sequence[str], library: str, name: str) -> Corpus:
    """One long text, of which a hundred neighbours count as one file."""
    named = ((text.strip(), f"{name}/{i // 100}") for i, text in enumerate(texts))
    return Corpus(tuple(Paragraph(text, library, file) for text, file in named if text))


def _from_hub(source: str) -> Corpus:
    """The first rows of a corpus with a column `text`."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=f"train[:{_HUB_ROWS}]")
        return _in_blocks(found["text"], "hub", name)
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        raise ResearchError(
            f"the corpus {source} cannot be read ({str(error).splitlines()[0]}); check its name "
            "and the network, or use `docstrings`, which needs none."
        ) from error
