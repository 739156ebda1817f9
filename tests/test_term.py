"""TERM: identities of the tilted mean, its gradient, its forms, and training with SAELens."""

import pytest

torch = pytest.importorskip("torch")

from sae_research import activations, term, training  # noqa: E402
from sae_research.errors import ResearchError  # noqa: E402
from sae_research.tilt import Tilt  # noqa: E402

D, M, K = 16, 32, 3
SETTINGS = training.SAETraining(steps=40, batch_size=128, lr=3e-3, warmup_steps=5, dead_window=20)


@pytest.fixture(scope="module")
def losses():
    return torch.rand(200, generator=torch.Generator().manual_seed(0)) * 5 + 0.1


@pytest.fixture(scope="module")
def data():
    """Sums of three of 24 directions."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=random), dim=-1)
    on = torch.rand(2000, 24, generator=random).argsort(-1) < 3
    return (on * (1 + 0.2 * torch.rand(2000, 24, generator=random))) @ directions * 2


def train(data, tilts, settings=SETTINGS, kind="topk", sparsity=K, **given):
    configs = {name: term.config(kind, D, M, sparsity) for name in tilts}
    trainers = {name: term.tilted(tilt, **given) for name, tilt in tilts.items()}
    batches = activations.batches(data, settings.batch_size, settings.steps, 0)
    return training.train(configs, batches, settings, 0, trainers)


def test_tilted_mean_lies_between_mean_and_maximum(losses):
    assert term.tilted_mean(losses, 0) == losses.mean()
    assert term.tilted_mean(losses, 1e-4).item() == pytest.approx(losses.mean().item(), abs=1e-3)
    assert term.tilted_mean(losses, 1e9).item() == pytest.approx(losses.max().item(), abs=1e-6)
    values = [term.tilted_mean(losses, t).item() for t in (0, 0.1, 1, 10, 1e9)]
    assert values == sorted(values)
    for t in (0.5, 1e9):
        shifted = term.tilted_mean(losses + 7, t).item()
        assert shifted == pytest.approx(term.tilted_mean(losses, t).item() + 7, abs=1e-5)
        moved, still = (term.tilt_weights(x, t) for x in (losses + 7, losses))
        torch.testing.assert_close(moved, still, atol=1e-5, rtol=1e-4)


def test_weights_at_a_huge_tilt_are_finite_in_every_format(losses):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = term.tilt_weights(losses.to(dtype), 1e9)
        assert weights.dtype == torch.float32
        assert torch.isfinite(weights).all()
        assert weights.sum().item() == pytest.approx(1)
    assert term.tilt_weights(losses, 1e9).argmax() == losses.argmax()
    with pytest.raises(ResearchError, match="overflows"):
        term.tilt_weights(losses, float("nan"))


@pytest.mark.parametrize("t", [0.0, 0.3, 5.0, 1e9])
def test_gradient_of_the_weighted_sum_is_that_of_the_tilted_mean(t):
    random = torch.Generator().manual_seed(3)
    x, w = torch.randn(50, 8, generator=random), torch.randn(8, requires_grad=True)
    losses = (x @ w).square()
    (direct,) = torch.autograd.grad(term.tilted_mean(losses, t), w, retain_graph=True)
    weights = term.choose_weights(losses, Tilt(t=t))
    (ours,) = torch.autograd.grad((weights * losses).sum(), w)
    torch.testing.assert_close(ours, direct, atol=1e-6, rtol=1e-4)


def test_the_aimed_share_is_reached_whatever_the_scale(losses):
    for scale in (1e-4, 1.0, 1e4):
        for share in (0.9, 0.5, 0.1):
            tilt = Tilt(t=share, unit="effective sample size")
            weights = term.choose_weights(losses * scale, tilt)
            assert term.effective_share(weights).item() == pytest.approx(share, rel=0.06)
    relative = Tilt(t=2.0, unit="mean loss")
    first, second = (term.choose_weights(losses * s, relative) for s in (1.0, 1e3))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)
    assert term.describe(losses, first)["t_mean_loss"] == pytest.approx(2.0, rel=1e-3)


def test_bins_are_tilted_by_their_mean_loss():
    losses = torch.tensor([1.0, 3.0, 4.0, 4.0, 4.0])
    weights = term.choose_weights(losses, Tilt(t=1.0, bins=True), torch.tensor([0, 0, 2, 2, 2]))
    odds = torch.softmax(torch.tensor([2.0, 4.0]), 0)
    torch.testing.assert_close(weights, torch.cat([odds[:1].expand(2) / 2, odds[1:].expand(3) / 3]))


def test_no_tilt_trains_as_saelens_does(data):
    """The same weights, to rounding, as SAELens's own TopK and ReLU in the same lock-step."""
    plain = {"normalize_activations": "none"}
    for kind, own in (
        ("topk", training.topk(D, M, K)),
        ("relu", training.relu(D, M, coefficient=0.5)),
    ):
        own.normalize_activations = plain["normalize_activations"]
        sparsity = K if kind == "topk" else 0.5
        batches = activations.batches(data, SETTINGS.batch_size, SETTINGS.steps, 0)
        configs = {"own": own, "term": term.config(kind, D, M, sparsity)}
        trained = training.train(configs, batches, SETTINGS, 0, {"term": term.tilted(Tilt())})
        torch.testing.assert_close(trained["own"].W_dec, trained["term"].W_dec, atol=1e-3, rtol=0)


def test_a_tilt_lowers_the_maximum_and_raises_the_mean(data):
    settings = training.SAETraining(steps=300, batch_size=256, lr=3e-3, warmup_steps=5)
    tilts = {"plain": Tilt(), "tilted": Tilt(t=0.2, unit="effective sample size")}
    trained = train(data, tilts, settings)
    error = {n: (data - sae(data)).square().sum(-1) for n, sae in trained.items()}
    assert error["tilted"].quantile(0.999) < error["plain"].quantile(0.999)
    assert error["tilted"].mean() > error["plain"].mean()
    log = trained["tilted"].log
    assert [entry["effective_share"] for entry in log] == pytest.approx([0.2] * len(log), rel=0.1)
    assert all(entry["mean"] <= entry["p99"] <= entry["max"] for entry in log)


def test_warm_start_is_plain_until_the_tilt_sets_in(data):
    tilts = {"late": Tilt(t=1e9, start=0.5), "never": Tilt(t=1e9, start=1.0), "plain": Tilt()}
    trained = train(data, tilts)
    assert torch.equal(trained["never"].W_dec, trained["plain"].W_dec)
    assert not torch.equal(trained["late"].W_dec, trained["plain"].W_dec)
    shares = [entry["effective_share"] for entry in trained["late"].log]
    assert shares[0] == pytest.approx(1)
    assert shares[-1] < 0.05


def test_the_sampled_gradient_is_unbiased(data):
    """Mean over many draws against the exact gradient."""
    sae = train(data, {"one": Tilt()})["one"].train()
    from sae_lens.saes.sae import TrainStepInput

    step = TrainStepInput(data[:256], {}, None, 0, False)

    def gradient(tilt):
        sae.start_log(tilt, 10)
        return torch.autograd.grad(sae.training_forward_pass(step).loss, sae.W_dec)[0]

    tilt = Tilt(t=0.5, unit="effective sample size")
    exact = gradient(tilt)
    torch.manual_seed(0)
    sampled = Tilt(t=0.5, unit="effective sample size", sampled=0.25)
    mean = torch.stack([gradient(sampled) for _ in range(300)]).mean(0)
    assert ((mean - exact).norm() / exact.norm()).item() < 0.1


def test_fine_tuning_starts_from_given_weights_and_a_residual_sae_learns_the_error(data):
    general = train(data, {"one": Tilt()})["one"]
    still = training.SAETraining(
        steps=1, batch_size=128, lr=1e-12, warmup_steps=0, decay=0, centre=False
    )
    tuned = train(data, {"tuned": Tilt()}, still, start=general.state_dict())["tuned"]
    torch.testing.assert_close(tuned.W_dec, general.W_dec, atol=1e-6, rtol=0)
    settings = training.SAETraining(steps=300, batch_size=128, lr=3e-3, warmup_steps=5)
    residual = train(data, {"r": Tilt()}, settings, before=general)["r"]
    error = data - general(data)
    assert (error - residual(error)).square().sum() < 0.8 * error.square().sum()


def test_not_a_number_keeps_the_last_good_state(data):
    batches = [data[:128], data[128:256], data[:128] * float("nan")]
    kept = {}

    def spy(sae, settings):
        kept["sae"] = sae
        return term.tilted(Tilt(t=1.0))(sae, settings)

    with pytest.raises(ResearchError, match=r"not finite at step 2|overflows"):
        training.train({"x": term.config("topk", D, M, K)}, batches, SETTINGS, 0, {"x": spy})
    assert all(torch.isfinite(p).all() for p in kept["sae"].parameters())


def test_bfloat16_activations_and_exports(data, tmp_path):
    sae = train(data, {"one": Tilt(t=1e9)})["one"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts = sae.encode(data)
        out = sae.decode(acts)
        losses = sae._losses(data, out, acts, None)
    assert losses.dtype == torch.float32
    sae.save_inference_model(tmp_path)
    from sae_lens import SAE

    opened = SAE.load_from_disk(tmp_path)
    assert opened.cfg.architecture() == "topk"
    torch.testing.assert_close(opened(data), sae(data), atol=1e-5, rtol=1e-4)
    assert term.tilted_classes() is term.tilted_classes()
