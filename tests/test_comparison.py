"""What a rerun changed: nothing, the last digits, or something that is named."""

import json

import pytest

from sae_research.comparison import AGREES, SAME, compare

LEDGER = {"value": 0.333333, "low": 1e-18, "verdict": "not reproduced", "n": 18}


def changed(**values):
    return json.dumps({**LEDGER, **values}).encode()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, SAME),
        ({"value": 0.333334}, AGREES),
        ({"low": -4e-18}, AGREES),
        ({"value": 0.3334}, "0.3334 in place of 0.333333"),
        ({"low": 1e-5}, "1e-05 in place of 1e-18"),
        ({"n": 19}, "19 in place of 18"),
        ({"value": None}, "in place of"),
        (
            {"verdict": "reproduced"},
            '\'"reproduced", "n":\' in place of \'"not reproduced", "n":\'',
        ),
    ],
)
def test_numbers_agree_within_a_tolerance_and_other_differences_are_named(values, says):
    found = compare("claims.json", changed(**values), changed())
    assert found == says if says in (SAME, AGREES) else says in found


def test_what_a_notebook_prints_may_differ_by_its_last_digit():
    def notebook(text):
        return json.dumps({"cells": [{"cell_type": "code", "source": text}]}).encode()

    assert compare("a.ipynb", notebook("0.54"), notebook("0.53")) == AGREES
    assert compare("a.ipynb", notebook("0.55"), notebook("0.53")) == "0.55 in place of 0.53"
    assert compare("a.json", b"0.54", b"0.53") == "0.54 in place of 0.53"
    assert compare("a.json", b"0.54 0.1", b"0.54") != AGREES


def test_notebooks_are_compared_by_sources_and_outputs_without_pictures():
    def notebook(text, picture):
        data = {"text/plain": text, "image/png": picture}
        cell = {"cell_type": "code", "source": "x", "outputs": [{"data": data}]}
        return json.dumps({"cells": [cell]}).encode()

    before = notebook("0.123456", "abc")
    assert compare("a.ipynb", notebook("0.123457", "abd"), before) == AGREES
    assert "in place of" in compare("a.ipynb", notebook("nan", "abc"), before)
    assert compare("a.png", b"1", b"2") == "another picture"
    assert compare("a.ipynb", b"{", before) == "not readable"
