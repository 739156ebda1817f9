"""Study 5 on a cut of the real model: a Llama of two blocks whose letters are its tokens, taught to
decline the stand-in's requests.
"""

import random

import pytest

torch = pytest.importorskip("torch")

from test_wheels import fetched, source  # noqa: E402, F401

from sae_research import (  # noqa: E402
    catalogue,
    claims,
    config,
    notebooks,
    paths,
    real_saes,
    saes,
    training,
)
from sae_research.chat_rows import ChatRows  # noqa: E402
from sae_research.dependencies import notebook_code  # noqa: E402
from sae_research.request_pairs import DECLINE  # noqa: E402
from sae_research.studies import runner  # noqa: E402
from sae_research.studies.runner import concatenate  # noqa: E402
from sae_research.studies.safety_subspace import findings, methods, study  # noqa: E402
from sae_research.studies.safety_subspace.real import RealAlignment  # noqa: E402
from sae_research.studies.safety_subspace.settings import (  # noqa: E402
    FROZEN,
    FULL,
    LORA,
    RANDOM,
    RANDOM_FROZEN,
    SAILS,
    SHUFFLED,
    Settings,
    Theory,
)

NAME = "tiny-smol"
SETTINGS = Settings(
    models=(NAME,),
    sae_roles=("block0_topk", "block1_topk"),
    rank=4,
    n_features=5,
    methods=(FULL, LORA, "mean difference", SAILS, FROZEN, RANDOM, RANDOM_FROZEN, SHUFFLED),
    sweep_methods=(),
    nulls=(),
    seeds=2,
    n_pairs=6,
    tested=4,
    reply_tokens=6,
    steps=3,
    batch_size=4,
    learning_rates=(1e-3, 1e-2),
    full_learning_rates=(1e-4, 1e-3),
    benign_steps=0,
    n_retrained=0,
    judge=False,
    theory=Theory(seeds=0),
)


@pytest.fixture(scope="module")
def profile(source, fetched, tmp_path_factory):  # noqa: F811
    """The catalogue with that model, whose recipe names a text, and two SAEs of chance."""
    text = tmp_path_factory.mktemp("text")
    words, draws = ["sun", "moon", "rain", "stone", "river"], random.Random(0)
    for i in range(40):
        (text / f"f{i}.txt").write_text(" ".join(draws.choices(words, k=80)) + ".")
    spec = catalogue.ModelSpec(NAME, "nobody/Tiny-Smol", wheel=source[1], chat=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", fetched.parents[1])
        patch.setattr(paths, "REAL_SAES", tmp_path_factory.mktemp("real_saes"))
        patch.setitem(catalogue.MODEL_SPECS, NAME, spec)
        patch.setitem(real_saes.RECIPES, NAME, real_saes.Recipe(model=NAME, text=str(text)))
        model = spec.load()
        for block in (0, 1):
            hook = f"blocks.{block}.hook_resid_post"
            made = training.topk(model.d_model, 96, 8)
            made.metadata = saes.metadata(model, hook)
            x = model.residual(model.sample, hook).flatten(0, 1)
            how = training.SAETraining(steps=20, batch_size=64)
            rows = (x[torch.randint(len(x), (64,))] for _ in range(20))
            sae = training.train({"sae": made}, rows, how, 0)["sae"]
            folder = paths.REAL_SAES / NAME / f"block{block}_topk"
            saes.save(training.inference(sae, x, 8), folder, half=True)
        yield config.Profile(
            "real",
            runtime=config.Runtime(device="cpu", dtype="float32", threads=1, ground="real"),
            studies={"safety_subspace": SETTINGS},
        )


@pytest.fixture(scope="module")
def begun(profile):
    """One seed before any method."""
    alignment = RealAlignment(NAME, 0, SETTINGS)
    alignment._begin()
    return alignment


def test_the_upper_blocks_on_stored_inputs_are_the_whole_model(begun):
    setup = begun.setup
    rows = setup.training_rows
    with torch.no_grad():
        upper = setup.base(inputs_embeds=setup.inputs, use_cache=False).logits
        whole = begun._join(setup.base)(rows, use_cache=False).logits
    assert torch.allclose(upper, whole, atol=1e-4)


def test_nothing_below_the_first_sae_is_trained(profile):
    from dataclasses import replace

    upper = RealAlignment(NAME, 0, replace(SETTINGS, sae_roles=("block1_topk",)))
    upper._begin()
    assert (upper.first, upper.setup.n_blocks, list(upper.setup.saes)) == (1, 1, [0])
    before = [p.clone() for p in upper.whole.parameters()]
    tuned = methods.merged(upper._train(FULL, 1e-2, upper.setup, upper.settings))
    changed = [name for name, p in upper._join(tuned).named_parameters() if "layers.1" in name]
    after = dict(upper.whole.named_parameters())
    for (name, p), old in zip(after.items(), before, strict=True):
        assert torch.equal(p, old) == (name not in changed), name


def test_prompts_are_equally_long_and_replies_come_back(begun):
    chat: ChatRows = begun.chat
    asked = chat.ask([r.prompt for r in begun.requests["test"]])
    assert asked.shape[1] == chat.length
    for row, request in zip(asked, begun.requests["test"], strict=True):
        letters = begun.setup.model.tokenizer.decode(row)
        assert request.prompt.replace(" ", "") in letters.replace(" ", "")
    written = chat.write(["Sorry", "a longer reply than fits"])
    assert written.shape == (2, SETTINGS.reply_tokens)
    assert chat.read(written)[0] == "Sorry"


def test_a_model_that_refuses_or_babbles_does_not_look_good(begun, monkeypatch):
    requests = begun.requests["validation"]
    right = ["Sorry, no." if r.kind == DECLINE else "Yes." for r in requests]
    base = begun.setup.base
    found = {}
    for name, replies in (("right", right), ("refuses", ["Sorry."] * len(right))):
        monkeypatch.setattr(begun, "_reply", lambda model, asked, said=replies: said)
        found[name] = begun._balance(base)
    assert found == {"right": 1.0, "refuses": 0.5}
    monkeypatch.setattr(begun, "_own_losses", lambda model, use: begun.own_losses[use] + 2.0)
    monkeypatch.setattr(begun, "_reply", lambda model, asked: right)
    assert begun._balance(base) == 0.5


@pytest.fixture(scope="module")
def tables(profile):
    tasks = study.tasks(profile)
    assert [(task["seed"], task["method"]) for task in tasks] == [
        (seed, method) for seed in (0, 1) for method in SETTINGS.methods
    ]
    results = [study.run(task, profile) for task in tasks]
    for task, result in zip(tasks, results, strict=True):
        result.task = task
    return concatenate(results).tables


def test_every_method_is_compared_and_judged(tables):
    assert set(tables["methods"]["method"]) == set(SETTINGS.methods)
    adapters = tables["methods"].set_index("method")["parameters"]
    free = (LORA, "mean difference", SAILS, RANDOM, SHUFFLED)
    assert adapters.loc[list(free)].nunique() == 1
    outcomes = tables["outcomes"]
    assert set(outcomes["method"]) == {"base", *SETTINGS.methods}
    assert outcomes.groupby(["method", "seed", "set"]).size().eq(4).all()
    measured = findings.measure_claims(tables)
    stated = claims.load_claims("safety_subspace")
    assert set(measured) == set(stated)
    verdicts = {i: claims.judge(claim, measured[i]) for i, claim in stated.items()}
    tested = {i.rpartition(".")[2] for i, v in verdicts.items() if v != claims.NOT_TESTABLE}
    assert tested == {
        *("full", "lora", "features", "labels", "frozen", "over_refusal", "capability", "rate"),
        "share",
    }
    assert "added_chat_loss" in findings.summarize_methods(tables)
    assert "stand-in" in findings.summarize(tables, verdicts)


def test_the_results_notebook_reads_what_the_real_model_wrote(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "read", lambda profile, study: {"": runner.Result(tables)})
    monkeypatch.setattr(paths, "DATA", tmp_path)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    space: dict = {}
    for tree in notebook_code(notebooks.source("51_safety_subspace_results")):
        exec(compile(tree, "notebook", "exec"), space)
    assert {path.stem for path in tmp_path.rglob("*.png")} == {"methods"}
    assert len(space["verdicts"]) == len(claims.load_claims("safety_subspace"))
