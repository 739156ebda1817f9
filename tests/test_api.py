"""The public API as README shows it: the ten lines, on a toy model and on one nobody here made."""

import json
import subprocess
import sys
import warnings

import pytest
from replicas import REAL

import sae_research as sr
from sae_research import paths

STORIES = REAL / "models" / "stories260K"
TEXT = REAL / "text" / "tinystories_v1_first1000.json"


def ten_lines(model, sae, deep, texts, question, group, folder, fitted):
    """README's example, with a shift that is trained first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a small corpus is said to be one
        ranking = sr.screen_features(model, sae, texts, downstream=deep, n_features=30)
        latent = int(ranking.table.index[0])
        ranking.card(latent).save(str(folder / "card.html"))
    start = texts[0][:10]
    plain = model.generate(start, 12)
    with model.steer(sae, latent=latent, coefficient=40.0):
        steered = model.generate(start, 12)
    sr.save_shift(fitted, folder / "shift")
    shift = sr.load_shift(folder / "shift", model, sae)
    answer = shift.answer(question, group=group)
    assert plain != steered
    assert model.generate(start, 12) == plain
    assert sum(answer.values()) == pytest.approx(1, abs=1e-4)
    page = (folder / "card.html").read_text(encoding="utf-8")
    assert f"{latent}" in page
    return ranking


def survey_of(questions):
    """A survey of two groups that always answer otherwise."""
    import numpy as np

    from sae_research.surveys.survey import Group, Question, Survey

    items = tuple(
        Question(f"q{i}", text, ("no", "yes"), (0.0, 1.0), split=("train", "validation")[i % 2])
        for i, text in enumerate(questions)
    )
    counts = np.array([[[80, 20]] * len(items), [[20, 80]] * len(items)])
    groups = (Group("colour", "red", 0.5), Group("colour", "blue", 0.5))
    shares = counts / counts.sum(-1, keepdims=True)
    return Survey(items, groups, shares, shares.mean(0), counts=counts)


def fit_quickly(model, sae, survey, template):
    from sae_research.studies.opinion_qa.settings import ShiftTraining

    quick = ShiftTraining(kind="gated", lr=0.03, steps=3, calibration_steps=3, rank=1)
    return sr.fit_shift(model, sae, survey, training=quick, template=template)


def test_the_ten_lines_run_on_a_toy_model(tmp_path):
    from sae_research.world.survey.model import SurveySettings
    from sae_research.world.survey.population import Population
    from sae_research.world.survey.prompts import prompt

    model = sr.load_model("world-survey")
    sae = sr.load_sae("world-survey", "block0_topk", model=model)
    deep = sr.load_sae("world-survey", "block2_topk")
    planted = Population(SurveySettings().population).survey()
    texts = [prompt(q, [g.name]) for q in planted.questions[:40] for g in planted.groups]
    survey = planted.split(seed=0)
    fitted = fit_quickly(model, sae, survey, "toy")
    question = survey.questions[0]
    ranking = ten_lines(model, sae, deep, texts, question, "red", tmp_path, fitted)
    assert len(ranking.table) > 30


@pytest.mark.skipif(not (STORIES.exists() and TEXT.exists()), reason=f"needs {STORIES} and {TEXT}")
def test_the_ten_lines_run_on_stories260k(tmp_path):
    model = sr.load_model(STORIES)
    texts = [t for t in json.loads(TEXT.read_text()) if "â" not in t][:250]
    training = sr.SAETraining(steps=200, batch_size=512)
    made = {
        hook: sr.train_sae(model, hook, texts, width=256, k=8, settings=training)
        for hook in ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    }
    sae, deep = made.values()
    survey = survey_of(["Is the dog big?", "Is the cat big?", "Is the sun up?", "Is it fun?"])
    fitted = fit_quickly(model, sae, survey, "english")
    ten_lines(model, sae, deep, texts, survey.questions[0], "blue", tmp_path, fitted)


def test_every_name_of_the_api_is_there_and_documented():
    for name in sr.__all__:
        assert (getattr(sr, name).__doc__ or "").strip(), name
    assert set(sr.__all__) <= set(dir(sr))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sr.nothing  # noqa: B018


def test_readme_shows_lines_that_exist():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("load_model", "load_sae", "screen_features", "load_shift", "train_sae"):
        assert f"sr.{name}(" in readme
        assert name in sr.__all__


EXAMPLES = sorted((paths.ROOT / "examples").glob("*.py"))


RUN_ALL = """
import json, os, runpy, sys, traceback
from contextlib import redirect_stdout
from io import StringIO

said = {}
for path in sys.argv[1:]:
    os.mkdir(os.path.basename(path))
    os.chdir(os.path.basename(path))
    printed, wrong = StringIO(), ""
    sys.argv, sys.path[0] = [path, "--quick"], os.path.dirname(path)
    try:
        with redirect_stdout(printed):
            runpy.run_path(path, run_name="__main__")
    except (Exception, SystemExit):
        wrong = traceback.format_exc()
    said[path] = printed.getvalue(), wrong
    os.chdir("..")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """What each example printed and what went wrong, run as scripts in one process of their own:
    most of the time of a short script is the import of torch and SAELens.
    """
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, EXAMPLES)],
        cwd=tmp_path_factory.mktemp("examples"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_as_an_outsider_would_run_it(path, examples):
    printed, wrong = examples[str(path)]
    assert not wrong, wrong[-2000:]
    assert printed.strip()


def test_an_example_says_what_is_wrong_in_one_sentence(tmp_path):
    (path,) = [p for p in EXAMPLES if p.stem == "screen_your_sae"]
    done = subprocess.run(
        [sys.executable, str(path), "--model", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "holds no config.json" in done.stderr
    assert "Traceback" not in done.stderr
