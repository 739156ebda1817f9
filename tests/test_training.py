"""The SAE trainer: identical batches, bit-identical configs, clear failures, exports of
exact L0.
"""

import miniatures
import pytest

torch = pytest.importorskip("torch")

from sae_research import activations, catalogue, models, saes, training  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402

D, M, K = 16, 32, 3
SETTINGS = training.SAETraining(steps=60, batch_size=128, lr=3e-3, warmup_steps=5, dead_window=20)


@pytest.fixture(scope="module")
def sparse_data():
    """Activations that are sums of three of 24 directions, off centre."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=random), dim=-1)
    on = torch.rand(4000, 24, generator=random).argsort(-1) < 3
    return (on * (1 + 0.2 * torch.rand(4000, 24, generator=random))) @ directions * 5 + 1


def run(data, configs, settings=SETTINGS, **given):
    return training.train(
        configs,
        activations.batches(data, settings.batch_size, settings.steps, 0),
        settings,
        0,
        **given,
    )


def test_equal_saes_stay_bit_identical_beside_a_different_one(sparse_data):
    configs = {
        "one": training.topk(D, M, K),
        "other": training.relu(D, M),
        "two": training.topk(D, M, K),
    }
    trained = run(sparse_data, configs)
    for name, weight in trained["one"].state_dict().items():
        assert torch.equal(weight, trained["two"].state_dict()[name])
    alone = run(sparse_data, {"two": training.topk(D, M, K)})
    assert torch.equal(alone["two"].W_dec, trained["one"].W_dec)
    assert not torch.equal(trained["other"].W_dec, trained["one"].W_dec)


def test_all_saes_see_the_same_batches(sparse_data):
    seen = {"one": [], "two": []}

    def spy(name):
        def make(sae, settings):
            trainer = training.trainer(sae, settings)
            step = trainer.step
            trainer.step = lambda batch: (seen[name].append(batch.clone()), step(batch))[1]
            return trainer

        return make

    configs = {"one": training.topk(D, M, K), "two": training.jumprelu(D, M, K)}
    run(sparse_data, configs, trainers={name: spy(name) for name in configs})
    assert len(seen["one"]) == SETTINGS.steps
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_not_a_number_names_sae_and_step(sparse_data):
    batches = [sparse_data[:128], sparse_data[128:256], sparse_data[:128] * float("nan")]
    with pytest.raises(ResearchError, match="'one' is not finite at step 2"):
        training.train({"one": training.topk(D, M, K)}, batches, SETTINGS, 0)


def test_too_few_batches_are_refused(sparse_data):
    with pytest.raises(ResearchError, match="ended after 1 of 60"):
        training.train({"one": training.topk(D, M, K)}, [sparse_data[:128]], SETTINGS, 0)
    with pytest.raises(ResearchError, match="no activations"):
        training.train({"one": training.topk(D, M, K)}, [], SETTINGS, 0)


def test_training_explains_the_data_and_the_scale_is_folded_back(sparse_data):
    settings = training.SAETraining(
        steps=500, batch_size=256, lr=3e-3, warmup_steps=20, dead_window=50
    )
    sae = run(sparse_data, {"one": training.topk(D, M, K)}, settings)["one"]
    error = (sae(sparse_data) - sparse_data).square().sum()
    assert 1 - error / (sparse_data - sparse_data.mean(0)).square().sum() > 0.9
    assert sae.cfg.normalize_activations == "none"


def test_exports_have_exact_l0_and_survive_the_disk(sparse_data, tmp_path):
    settings = training.SAETraining(
        steps=300, batch_size=256, lr=3e-3, warmup_steps=20, dead_window=50
    )
    configs = {
        "topk": training.topk(D, M, K),
        "jumprelu": training.jumprelu(D, M, K),
        "relu": training.relu(D, M, coefficient=3.0),
    }
    trained = run(sparse_data, configs, settings, trainers={"relu": training.aimed_at(K)})
    for name, sae in trained.items():
        export = training.inference(sae, sparse_data, K)
        l0 = (export.encode(sparse_data) > 0).double().sum(-1).mean().item()
        assert l0 == pytest.approx(K, rel=0.25 if name == "relu" else 2e-3)
        assert export.cfg.metadata.calibrated_l0 == pytest.approx(l0, abs=1e-6)
        saes.save(export, tmp_path / name, half=True)
        loaded = saes.load_sae(tmp_path / name)
        assert loaded.W_dec.dtype == torch.float32
        assert torch.equal(loaded.encode(sparse_data), export.encode(sparse_data))
        assert loaded.cfg.architecture() == {"relu": "standard"}.get(name, name)


def test_thresholds_are_held_at_the_wanted_l0(sparse_data):
    """The penalty alone leaves far more latents active in the same number of steps."""
    settings = training.SAETraining(steps=150, batch_size=256, warmup_steps=10)
    configs = {name: training.jumprelu(sparse_data.shape[1], 64, 4) for name in ("held", "free")}
    batches = activations.batches(sparse_data, settings.batch_size, settings.steps, 0)
    trained = training.train(
        configs, batches, settings, 0, {"held": training.held_at(4, rate=0.02)}
    )
    l0 = {
        name: (sae.encode(sparse_data) > 0).sum(-1).float().mean().item()
        for name, sae in trained.items()
    }
    assert abs(l0["held"] - 4) < 1.5
    assert abs(l0["held"] - 4) < abs(l0["free"] - 4)


def test_train_sae_carries_its_model_and_hook(tmp_path):
    model = models.load_model(miniatures.save(tmp_path / "tiny-llama", "llama"))
    hook = "blocks.1.hook_resid_post"
    texts = [" ".join(f"w{(7 * i + j) % 60}" for j in range(20)) for i in range(60)]
    settings = training.SAETraining(steps=20, batch_size=64, warmup_steps=2)
    sae = training.train_sae(model, hook, texts, width=64, k=4, settings=settings, seed=0)
    assert sae.cfg.metadata.model_name == "tiny-llama"
    assert sae.cfg.metadata.hook_name == hook
    assert saes.check_fit(model, sae) == "blocks.1.hook_out"
    saes.save(sae, tmp_path / "sae")
    assert catalogue.load_sae(tmp_path / "sae", model=model).cfg.d_sae == 64
    again = training.train_sae(model, hook, texts, width=64, k=4, settings=settings, seed=1)
    assert not torch.equal(again.W_dec, sae.W_dec)


def test_null_dictionaries_keep_what_they_must(sparse_data):
    configs, trainers = training.with_nulls({"one": training.topk(D, M, K)})
    assert list(configs) == ["one", *(f"one_{null}" for null in training.NULLS)]
    trained = run(sparse_data, configs, trainers=trainers)
    torch.manual_seed(0)
    start = run(sparse_data, {"x": configs["one"]}, training.SAETraining(steps=1, lr=0.0))["x"]

    def turned(name, weight):
        at_start, now = (getattr(sae, weight) for sae in (start, trained[name]))
        dim = -1 if weight == "W_dec" else 0
        return torch.nn.functional.cosine_similarity(at_start, now, dim=dim).min().item()

    assert turned("one_frozen_decoder", "W_dec") == pytest.approx(1, abs=1e-5)
    assert turned("one_frozen_encoder", "W_enc") == pytest.approx(1, abs=1e-5)
    assert turned("one_soft_frozen_decoder", "W_dec") == pytest.approx(0.8, abs=1e-4)
    assert turned("one", "W_dec") < 0.7
    for name, weight in (
        ("one_frozen_decoder", "W_enc"),
        ("one_soft_frozen_decoder", "W_enc"),
        ("one_frozen_encoder", "W_dec"),
    ):
        assert turned(name, weight) < 0.99
    alone = run(sparse_data, {"one": training.topk(D, M, K)})["one"]
    assert torch.equal(alone.W_dec, trained["one"].W_dec)


def test_rows_are_turned_no_further_than_they_must():
    start = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    rows = 3 * torch.randn(50, 8)
    near = training.keep_near(rows, start)
    cosines = torch.nn.functional.cosine_similarity
    before = cosines(rows, start)
    assert torch.equal(near[before >= 0.8], rows[before >= 0.8])
    torch.testing.assert_close(near.norm(dim=-1), rows.norm(dim=-1))
    torch.testing.assert_close(cosines(near, start), before.clamp(min=0.8), rtol=0, atol=1e-5)


def test_matched_decoders_ignore_order_and_scale(sparse_data):
    trained = run(sparse_data, {"one": training.topk(D, M, K)})["one"]
    other = run(sparse_data, {"one": training.topk(D, M, K)})["one"]
    other.W_dec.data = other.W_dec[torch.randperm(M)] * (1 + torch.rand(M, 1))
    assert saes.match_decoders(trained, other) == pytest.approx(1.0, abs=1e-5)
    other.W_dec.data = torch.randn(M, D)
    assert saes.match_decoders(trained, other).mean() < 0.8
