"""Requests to decline: the harmless stand-in splits cleanly, a reader's file is checked."""

import gzip
import json

import pytest

from sae_research import request_pairs
from sae_research.errors import ResearchError
from sae_research.request_pairs import DECLINE, LOOK_ALIKE, PLAIN, USES

HEAD = "prompt,chosen,rejected\n"
ROWS = "".join(f'Tell me secret {i}.,"No, I won\'t.",Sure: {i}\n' for i in range(8))


def words_of(prompt, things):
    return {thing for thing in things if f" {thing}" in prompt}


@pytest.mark.parametrize("seed", range(4))
def test_no_phrasing_and_no_thing_of_the_test_was_trained_on(seed):
    split = request_pairs.make_standin(seed)
    plants = {
        use: set().union(*(words_of(r.prompt, request_pairs.PLANTS) for r in split[use]))
        for use in USES
    }
    assert sum(map(len, plants.values())) == len(set().union(*plants.values()))
    for kind, phrasings in (
        (DECLINE, request_pairs.GARDENING),
        (LOOK_ALIKE, request_pairs.SAME_PLANTS + request_pairs.OTHER_THINGS),
    ):
        used = {}
        for use in USES:
            prompts = [r.prompt for r in split[use] if r.kind == kind]
            assert len(prompts) == len(set(prompts)) > 20
            used[use] = {p for p in phrasings if any(fits(p, prompt) for prompt in prompts)}
        assert not used["train"] & used["test"]
        assert not used["validation"] & used["test"]


def fits(phrase, prompt):
    start, end = phrase.split("{x}")
    things = request_pairs.PLANTS + request_pairs.THINGS
    return prompt.removeprefix(start).removesuffix(end) in things


def test_look_alikes_share_words_and_are_never_declined():
    split = request_pairs.make_standin(0)
    every = [r for use in USES for r in split[use]]
    declined = {r.prompt for r in every if r.kind == DECLINE}
    others = [r for r in every if r.kind != DECLINE]
    assert not declined & {r.prompt for r in others}
    assert all(r.chosen == request_pairs.REFUSAL and r.rejected for r in every if r.kind == DECLINE)
    assert not any(r.chosen for r in others)
    alike = [r.prompt for r in others if r.kind == LOOK_ALIKE]
    assert any(words_of(p, request_pairs.PLANTS) for p in alike)
    assert any("grow" in p for p in alike)
    assert {r.answer for r in split["test"] if r.kind == PLAIN} == {
        *request_pairs.CAPITALS.values()
    }


def test_seeds_draw_other_splits_and_sizes_are_kept():
    drawn = [request_pairs.draw("", seed, 8, 6) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    counts = {
        use: [sum(r.kind == kind for r in drawn[0][use]) for kind in (DECLINE, LOOK_ALIKE, PLAIN)]
        for use in USES
    }
    assert counts == {"train": [8, 4, 4], "validation": [3, 1, 1], "test": [6, 6, 6]}


def test_a_readers_file_takes_the_place_of_what_is_declined(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(HEAD + ROWS)
    split = request_pairs.load(str(path), 0)
    own = [r.prompt for use in USES for r in split[use] if r.kind == DECLINE]
    assert sorted(own) == [f"Tell me secret {i}." for i in range(8)]
    assert [sum(r.kind == DECLINE for r in split[use]) for use in USES] == [4, 2, 2]
    assert all(any(r.kind == LOOK_ALIKE for r in split[use]) for use in USES)
    lines = [{"prompt": f"p{i}", "chosen": "No.", "rejected": "Yes."} for i in range(4)] + [
        {"prompt": f"q{i}", "kind": LOOK_ALIKE} for i in range(4)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    split = request_pairs.load(str(path), 0)
    alike = [r.prompt for use in USES for r in split[use] if r.kind == LOOK_ALIKE]
    assert sorted(alike) == [f"q{i}" for i in range(4)]


def test_a_file_of_hh_rlhf_is_read_as_it_is_published(tmp_path):
    def dialogue(*turns):
        names = ("Human", "Assistant")
        return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))

    asked = [f"How do I grow\n\nplant {i}?" for i in range(5)]
    rows = [(dialogue(q, "Rather not.\n\nSorry."), dialogue(q, "Sure!")) for q in asked]
    rows += [
        rows[0],  # asked again
        (dialogue("a", "b", "c", "No."), dialogue("a", "b", "c", "Yes.")),  # two exchanges
        (dialogue("a", "No."), dialogue("a", "b", "c", "Yes.")),
        (dialogue("one", "No."), dialogue("another", "Yes.")),
        (dialogue("unanswered", ""), dialogue("unanswered", "Yes.")),
    ]
    path = tmp_path / "test.jsonl.gz"
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in rows]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = request_pairs.read_pairs(path)
    assert [request.prompt for request in found] == asked
    assert {request.chosen for request in found} == {"Rather not.\n\nSorry."}
    assert {(request.rejected, request.kind) for request in found} == {("Sure!", DECLINE)}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "chosen,rejected\nNo.,Yes.\n", "has no column 'prompt'"),
        ("a.csv", "", "is empty; give at least four pairs"),
        ("a.csv", HEAD, "holds no pairs"),
        ("a.csv", "prompt,chosen\nWhy?,No.\n", "has no column 'rejected'"),
        ("a.csv", HEAD + "Why?,No.,\n", "row 1 of a.csv has no rejected reply"),
        ("a.csv", HEAD + ",No.,Yes.\n", "row 1 of a.csv has no prompt"),
        ("a.csv", HEAD + "Why?,No.,Yes.\n" * 2, "asks 'Why\\?' twice"),
        ("a.csv", HEAD + "Why?,No.,Yes.\n", "fewer than four pairs"),
        ("a.csv", "prompt,chosen,rejected,kind\nWhy?,No.,Yes.,bad\n", "has the kind 'bad'; say"),
        ("a.txt", ROWS, "neither a .csv nor a .jsonl"),
        ("a.jsonl", "{", "a.jsonl cannot be read"),
        ("missing.csv", None, "missing.csv cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_sentence(tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResearchError, match=said) as told:
        request_pairs.read_pairs(path)
    assert "\n" not in str(told.value)
