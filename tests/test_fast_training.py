"""The sparse training step takes SAELens's own steps, with gradients checked by autograd."""

import pytest

torch = pytest.importorskip("torch")

from sae_research import activations, fast_training, training  # noqa: E402
from sae_research.hub import quiet  # noqa: E402

D, LATENTS, K = 24, 256, 5
SETTINGS = training.SAETraining(steps=120, batch_size=64, lr=3e-3, warmup_steps=5, dead_window=10)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    return torch.randn(3000, 40, generator=random).relu() @ torch.randn(40, D, generator=random)


def make_config(kind, **given):
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    classes = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}
    return classes[kind](d_in=D, d_sae=LATENTS, k=K, dtype="float32", device="cpu", **given)


def take_steps(data, config, fast):
    from sae_lens import TrainingSAE

    torch.manual_seed(0)
    kind = TrainingSAE.get_sae_class_for_architecture(config.architecture())
    with quiet():
        sae = (fast_training.fast_class(kind) if fast else kind)(config)
    run = training.trainer(sae, SETTINGS)
    losses = []
    for batch in activations.batches(data, SETTINGS.batch_size, SETTINGS.steps, 0):
        losses.append(run.step(batch).loss.item())
        run.n_training_steps += 1
    return torch.tensor(losses), run


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_losses_dead_latents_and_weights_are_those_of_saelens(data, kind, rescaled):
    config = make_config(kind, rescale_acts_by_decoder_norm=rescaled)
    ours, fast = take_steps(data, config, True)
    theirs, slow = take_steps(data, config, False)
    assert (slow.n_forward_passes_since_fired > SETTINGS.dead_window).any()  # revived by the loss
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
    assert torch.equal(fast.n_forward_passes_since_fired, slow.n_forward_passes_since_fired)
    for name, weight in slow.sae.named_parameters():
        torch.testing.assert_close(
            dict(fast.sae.named_parameters())[name], weight, rtol=2e-2, atol=2e-3
        )


@pytest.mark.parametrize("dead", [3, 40, 250])
def test_gradients_of_one_step_are_exact_with_few_and_many_dead_latents(data, dead):
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE

    mask = torch.zeros(LATENTS, dtype=torch.bool)
    mask[:dead] = True
    given = TrainStepInput(
        sae_in=data[:64],
        coefficients={},
        dead_neuron_mask=mask,
        n_training_steps=0,
        is_logging_step=False,
    )
    grads = []
    for kind in (TopKTrainingSAE, fast_training.fast_class(TopKTrainingSAE)):
        torch.manual_seed(1)
        sae = kind(make_config("topk"))
        sae.W_dec.data *= torch.rand(LATENTS, 1) + 0.5
        sae.train().training_forward_pass(given).loss.backward()
        grads.append({name: p.grad for name, p in sae.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_largest_finds_what_topk_finds():
    x = torch.randn(7, 320)
    for k in (1, 4, 9, 40):
        found = x.gather(1, fast_training.largest(x, k)).sort(-1).values
        assert torch.equal(found, x.topk(k).values.sort(-1).values)


def test_a_subclass_with_its_own_loss_keeps_its_own_step():
    from sae_lens.saes.topk_sae import TopKTrainingSAE

    class Own(TopKTrainingSAE):
        pass

    assert fast_training.fast_class(Own) is Own
