"""Study 1 from outside: a shift is trained, saved, loaded and asked, with one's own model
and SAE.
"""

from dataclasses import replace

import pytest
import torch
from miniatures import random_sae

import sae_research as sr
from sae_research import saes, store
from sae_research.bases import sae_basis
from sae_research.errors import ResearchError
from sae_research.studies.opinion_qa.settings import ShiftTraining

HOOK = "blocks.0.hook_resid_post"
QUICK = ShiftTraining(
    kind="gated", lr=0.03, steps=4, calibration_steps=4, batch_size=6, n_documents=2, rank=2
)


@pytest.fixture(scope="module")
def own_sae(model):
    """An SAE of the model that says so."""
    return random_sae("topk", width=32, latents=96, k=12, metadata=saes.metadata(model, HOOK))


@pytest.fixture(scope="module")
def survey(small):
    """The planted survey with splits."""
    splits = ("train", "train", "validation")
    questions = tuple(replace(q, split=splits[i % 3]) for i, q in enumerate(small.questions))
    return replace(small, questions=questions)


@pytest.fixture(scope="module")
def fitted(model, own_sae, survey):
    with pytest.warns(UserWarning, match="may not belong"):  # its weights are random
        return sr.fit_shift(model, own_sae, survey, training=QUICK, template="toy")


def test_a_shift_for_an_own_survey_steers_each_group_otherwise(fitted, model, survey):
    question = survey.questions[0]
    answers = {group: fitted.answer(question, group) for group in fitted.shift.groups}
    for found in answers.values():
        assert list(found) == list(question.options)
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert len({tuple(found.values()) for found in answers.values()}) > 1
    plain = fitted.answer(question, "red", coefficient=0.0)
    assert plain != answers["red"]
    tokens = model.tokens(["i am red ."])
    with model.edited(fitted.edits("red")):
        inside = model.logits(tokens)
    assert torch.equal(inside, model.logits(tokens, fitted.edits("red")))


def test_saving_and_loading_is_the_identity_whatever_the_folder_is_called(
    fitted, model, own_sae, survey, tmp_path
):
    sr.save_shift(fitted, tmp_path / "shift")
    renamed = replace_name(model, "another name")
    again = sr.load_shift(tmp_path / "shift", renamed, own_sae)
    for name in ("shared", "axes", "scores"):
        assert torch.equal(getattr(again.shift, name), getattr(fitted.shift, name))
    question = survey.questions[3]
    assert again.answer(question, "old") == fitted.answer(question, "old")
    edits = [one.edit(sae_basis(own_sae), "old") for one in (fitted.shift, again.shift)]
    residual = model.residual(model.tokens(["i am old ."]), HOOK)
    assert torch.equal(*(edit(residual) for edit in edits))


def replace_name(model, name):
    """The same model under another name, as from a renamed folder."""
    import copy

    found = copy.copy(model)
    found.name = name
    return found


def test_another_model_or_sae_is_refused(fitted, model, own_sae, tmp_path):
    sr.save_shift(fitted, tmp_path / "shift", cards={"red": {"note": "one card is enough"}})
    with pytest.raises(ResearchError, match="has 64; load the SAE at"):
        sr.load_shift(tmp_path / "shift", model, random_sae("topk", width=32, latents=64, k=12))
    with pytest.raises(ResearchError, match="other latents than the one of the shift"):
        sr.load_shift(
            tmp_path / "shift", model, random_sae("topk", width=32, latents=96, k=12, seed=5)
        )
    other = sr.load_model("world-survey")
    with pytest.raises(ResearchError, match="the weights of 'world-survey' are others"):
        sr.load_shift(tmp_path / "shift", other, own_sae)
    with pytest.raises(ResearchError, match="did you mean 'red'"):
        fitted.answer("is it so?", "rad", options=("no", "yes"))
    (tmp_path / "shift" / store.CHECKSUMS).unlink()
    with pytest.raises(ResearchError, match="save the shift again with `save_shift`"):
        sr.load_shift(tmp_path / "shift", model, own_sae)


def test_a_survey_without_splits_is_told_how_to_make_them(model, own_sae, small):
    unsplit = replace(small, questions=tuple(replace(q, split="") for q in small.questions))
    with pytest.raises(ResearchError, match=r"in the train split; make splits with `survey.split"):
        sr.fit_shift(model, own_sae, unsplit, training=QUICK, template="toy")
    with pytest.raises(ResearchError, match="unknown prompt template 'toi'"):
        sr.fit_shift(model, own_sae, with_splits(small), training=QUICK, template="toi")


def with_splits(small):
    questions = tuple(
        replace(q, split=("train", "validation")[i % 2]) for i, q in enumerate(small.questions)
    )
    return replace(small, questions=questions)
