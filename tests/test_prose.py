"""Prose is what an English reader would call so; labels and splits follow the file."""

import pytest

from sae_research import docstrings, prose
from sae_research.errors import ResearchError

DOCSTRING = """Return the shortest path between two nodes of a graph, if there is one.

Parameters
----------
source : node
    The node from which the path starts, as it was given to the :class:`~lib.Graph` [1]_.

Notes
-----
The ``weight`` of an edge may be negative but then the search can be slow.

>>> shortest_path(graph, 0, 4) is the path that the function finds for this graph.

| this | is a table of the costs and not a sentence that one would read. |

.. note:: This is a directive and the text that belongs to it is on its line.

Too short to be of use.
"""


def test_prose_keeps_sentences_without_markup_and_nothing_else():
    assert list(docstrings.prose(DOCSTRING)) == [
        "Return the shortest path between two nodes of a graph, if there is one.",
        "The node from which the path starts, as it was given to the lib.Graph.",
        "The weight of an edge may be negative but then the search can be slow.",
    ]


def test_code_is_read_and_never_run(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Of the module."""\nraise SystemExit\nclass A:\n    """Of the class."""\n'
        '    if True:\n        def f():\n            r"""Of the \\d method."""\n'
    )
    found = list(docstrings._read_docstrings(path))
    assert found == ["Of the module.", "Of the class.", "Of the \\d method."]
    path.write_text("def later(:\n")
    assert list(docstrings._read_docstrings(path)) == []


def test_every_library_is_installed_and_says_its_licence():
    rows = docstrings.provenance()
    assert [row["library"] for row in rows] == list(docstrings.LIBRARIES)
    assert all(row["version"] and row["licence"] for row in rows)
    assert {row["licence"] for row in rows} & {"BSD-3-Clause"}


@pytest.fixture
def corpus():
    files = [f"sympy/physics/file{i}.py" for i in range(300)] + ["sympy/core/a.py", "nltk/b.py"]
    given = (prose.Paragraph(f"{name} {n}", name[:5], name) for name in files for n in range(2))
    return prose.Corpus(tuple(given))


def test_a_file_lies_in_one_split_and_shares_are_kept(corpus):
    files = {split: {t.split()[0] for t in corpus.texts(split)} for split in prose.SPLITS}
    assert sum(map(len, files.values())) == 302 == len(set.union(*files.values()))
    for split, share in prose.SPLITS.items():
        assert len(files[split]) / 302 == pytest.approx(share, abs=0.06)
        assert len(corpus.documents(split)) == len(files[split])
    assert corpus.documents("train") != sorted(corpus.documents("train"))


def test_texts_are_taken_by_library_or_subdomain(corpus):
    def count(label):
        return sum(len(corpus.texts(split, label)) for split in prose.SPLITS)

    assert (count("sympy.physics"), count("sympy"), count("symp"), count("")) == (600, 602, 0, 604)
    assert corpus.sizes()["sympy.physics"] > corpus.sizes()["sympy.core"]
    with pytest.raises(ResearchError, match="did you mean 'validation'"):
        corpus.texts("validatio")


def test_the_fingerprint_follows_text_and_label(corpus):
    import dataclasses

    first, *others = corpus.paragraphs
    changed = dataclasses.replace(first, file="sympy/other.py")
    assert prose.Corpus((first, *others)).fingerprint == corpus.fingerprint
    assert prose.Corpus((changed, *others)).fingerprint != corpus.fingerprint


def test_the_readers_own_text_is_split_too(tmp_path):
    text = "\n\n".join(f"Paragraph {i}\nof  mine." for i in range(4000))
    (tmp_path / "mine.txt").write_text(text)
    (tmp_path / "other.txt").write_text("Another one.")
    own = prose.load(tmp_path / "mine.txt")
    assert own.paragraphs[7].text == "Paragraph 7 of mine."
    assert {p.split for p in own.paragraphs} == set(prose.SPLITS)
    both = prose.load(tmp_path)
    assert len(both.paragraphs) == 4001
    assert {p.file for p in both.paragraphs} == {"mine.txt", "other.txt"}
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ResearchError, match=r"other\.txt cannot be read as UTF-8"):
        prose.load(tmp_path)
    with pytest.raises(ResearchError, match="there is no text 'nowhere'"):
        prose.load("nowhere")


def test_too_little_text_is_said(tmp_path):
    import miniatures

    from sae_research import models

    model = models.load_model(miniatures.save(tmp_path / "tiny-llama", "llama"))
    assert prose.make_rows(model, ["w1 w2 w3 w4"] * 8, 5, 8).shape == (5, 8)
    with pytest.raises(ResearchError, match="gives 5 rows of 8 tokens and 9 are asked for"):
        prose.make_rows(model, ["w1 w2 w3 w4"] * 8, 9, 8)
