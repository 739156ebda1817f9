"""The penalty, the alternation and the architecture."""

from dataclasses import replace

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch.nn.functional import normalize

from sae_research import conversion, saes, training
from sae_research.studies.meta_saes import arms, decomposable, structure
from sae_research.studies.meta_saes.settings import Settings
from sae_research.training import SAETraining

D, N, K = 16, 48, 3
TRAINING = SAETraining(steps=40, batch_size=64, lr=1e-3, warmup_steps=0, decay=0.0, dead_window=5)
META = {"d_sae": 8, "k": 2.0, "n_primary_steps": 10, "n_meta_steps": 5}


def make_config(lambda2=0.3, **given):
    shape = {"d_in": D, "d_sae": N, "k": K, "decoder_init_norm": 1.0}
    return decomposable.DecompBatchTopKConfig(
        **shape, lambda2=lambda2, meta=META | given.pop("meta", {}), **given
    )


def joint(sae, settings):
    return training.trainer(sae, settings, decomposable.JointTrainer)


@pytest.fixture(scope="module")
def batches():
    random = torch.Generator().manual_seed(0)
    return list(torch.randn(40, 64, D, generator=random))


@pytest.fixture
def run():
    torch.manual_seed(0)
    return joint(decomposable.DecompBatchTopK(make_config()), TRAINING)


def loss_of(run, batch):
    found = run.sae.training_forward_pass(
        TrainStepInput(batch, {"decomposability": D * 0.3}, None, 0, False)
    )
    return found.losses["decomposability_loss"]


def test_only_the_decoder_has_a_gradient_and_it_is_tangential(run, batches):
    loss_of(run, batches[0]).backward()
    assert run.sae.W_enc.grad is None
    assert run.sae.b_dec.grad is None
    assert all(p.grad is None for p in run.meta.sae.parameters())
    rows, gradient = run.sae.W_dec.detach(), run.sae.W_dec.grad
    assert gradient.norm() > 1e-4
    assert (gradient * rows).sum(-1).abs().max() < 1e-6
    rebuilt = run.meta.sae(rows).detach()
    e = decomposable.reconstruction_errors(rows, rebuilt)
    p = (-e).exp()[:, None]
    away = rebuilt - (rebuilt * rows).sum(-1, keepdim=True) * rows
    assert torch.allclose(gradient, D * 0.3 * 2 / N * p * away, atol=1e-6)
    moved = normalize(rows - 1e-2 * gradient, dim=-1)
    assert (decomposable.reconstruction_errors(moved, rebuilt) >= e - 1e-7).all()


def test_bounds_of_the_penalty():
    e = torch.tensor([0.0, 0.4, 1.0])
    for sigma2 in (0.3, 1.0, 3.0):
        each = [decomposable.penalty(x[None], sigma2) for x in e]
        assert each[0] == 1
        assert each[2] == pytest.approx(torch.tensor(-1 / sigma2).exp().item())
        assert decomposable.penalty(e, sigma2) == pytest.approx(float(sum(each)) / 3)


def test_alternation_and_a_critic_outside_the_module_tree(run, batches):
    for batch in batches[:37]:
        run.step(batch)
        run.n_training_steps += 1
    assert run.n_meta_steps == 37 // 10 * 5 == run.meta.n_training_steps
    names = {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert dict(run.sae.named_parameters()).keys() == names
    assert run.sae.state_dict().keys() == names | {"topk_threshold"}
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 4
    assert type(run.meta.sae) is BatchTopKTrainingSAE


def test_a_penalty_of_zero_is_the_solo_sae_bit_for_bit(batches):
    config = make_config(lambda2=0.0)
    found = training.train(
        {"solo": make_config(), "penalty 0": config, "joint": make_config()},
        batches,
        TRAINING,
        seed=3,
        trainers={"penalty 0": joint, "joint": joint},
    )
    torch.manual_seed(3)
    given = {name: getattr(config, name) for name in ("d_in", "d_sae", "k", "decoder_init_norm")}
    stock = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**given))
    stock.b_dec.data = batches[0].mean(0)
    run = training.trainer(stock, TRAINING)
    for batch in batches:
        run.step(batch)
        run.n_training_steps += 1
    for name, value in stock.state_dict().items():
        solo = found["solo"].state_dict()[name]
        assert torch.equal(found["penalty 0"].state_dict()[name], solo)
        assert torch.allclose(solo, value, atol=1e-5)
    assert not torch.equal(found["joint"].W_dec, stock.W_dec)


def test_the_penalty_makes_rows_harder_to_rebuild(batches):
    errors = {}
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        run = joint(decomposable.DecompBatchTopK(make_config(weight)), TRAINING)
        for batch in batches * 5:
            run.step(batch)
            run.n_training_steps += 1
        errors[weight] = run.errors().mean().item()
    assert errors[3.0] > 1.05 * errors[0.0]


def test_kinds_of_critic(batches):
    for meta in ({"kind": "random"}, {"kind": "shuffled"}, {"refresh_every": 10}):
        torch.manual_seed(0)
        run = joint(decomposable.DecompBatchTopK(make_config(meta=meta)), TRAINING)
        before = run.meta.sae.W_dec.detach().clone()
        for batch in batches[:10]:
            run.step(batch)
            run.n_training_steps += 1
        assert torch.equal(run.meta.sae.W_dec, before) == (meta.get("kind") == "random")
        rows = normalize(run.sae.W_dec.detach(), dim=-1)
        plain = run.meta.sae(rows).detach()
        if meta.get("kind") == "shuffled":
            assert torch.equal(run._rebuild(rows), plain[run._others])
    run.n_training_steps = 15
    assert torch.equal(run._rebuild(rows), run._rebuilt)
    assert not torch.equal(run._rebuild(rows), plain)


def test_warm_up_of_the_penalty():
    run = joint(decomposable.DecompBatchTopK(make_config(warm_up_steps=4)), TRAINING)
    values = []
    for _ in range(6):
        values.append(run.get_coefficients()["decomposability"])
        run.step(torch.randn(64, D))
    assert values == pytest.approx([D * 0.3 * share for share in (0, 0.25, 0.5, 0.75, 1, 1)])


def test_exports_open_in_stock_saelens_with_identical_codes(batches, tmp_path):
    found = training.train({"joint": make_config()}, batches, TRAINING, 0, {"joint": joint})
    x = torch.cat(batches)
    export = conversion.exact_l0(found["joint"], x, K)
    saes.save(export, tmp_path / "sae")
    opened = SAE.load_from_disk(tmp_path / "sae")
    assert opened.cfg.architecture() == "jumprelu"
    assert opened.cfg.metadata.training_architecture == "decomp_batchtopk"
    assert opened.cfg.metadata.training_architecture_details["lambda2"] == 0.3
    assert torch.equal(opened.encode(x), export.encode(x))
    _, hidden = found["joint"].encode_with_hidden_pre(x)
    codes = hidden * (hidden > export.threshold)
    assert torch.allclose(codes, opened.encode(x), atol=1e-5)
    assert (opened.encode(x) > 0).float().sum(1).mean() == pytest.approx(K, rel=0.01)


def test_checkpoints_load_as_the_same_architecture(tmp_path):
    sae = decomposable.DecompBatchTopK(make_config())
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is decomposable.DecompBatchTopK
    assert again.cfg.meta == META


def test_ortsae_pushes_nearest_rows_apart(batches):
    shape = {"d_in": D, "d_sae": N, "k": K, "decoder_init_norm": 1.0, "chunk": 24}
    configs = {
        str(gamma): decomposable.OrtBatchTopKConfig(**shape, gamma=gamma) for gamma in (0.0, 1.0)
    }
    found = training.train(configs, batches, TRAINING, 0)
    nearest = {
        name: decomposable.largest_cosine(normalize(sae.W_dec.detach(), dim=-1)).mean()
        for name, sae in found.items()
    }
    assert nearest["1.0"] < 0.95 * nearest["0.0"]
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert decomposable.largest_cosine(rows).tolist() == pytest.approx([0.6, 0.8, 0.8])


def test_meta_saes_and_evaluators_share_no_first_row_with_the_primary():
    settings = replace(Settings(), d_sae=N, k=K, meta_d_sae=8, meta_k=2.0)
    torch.manual_seed(7)
    primary = normalize(decomposable.DecompBatchTopK(make_config()).W_dec.detach(), dim=-1)
    shape = {"d_in": D, "d_sae": 8, "k": 2.0}
    for seed in (
        arms.make_config(arms.JOINT, settings, D, 7).meta["seed"],
        arms.make_config("random meta", settings, D, 7).meta["seed"],
        7 + structure.EVALUATOR,
    ):
        torch.manual_seed(seed)
        other = BatchTopKTrainingSAE(decomposable.meta_config(**shape))
        cosines = normalize(other.W_dec.detach(), dim=-1) @ primary.T
        assert cosines.abs().max() < 0.999
    torch.manual_seed(7)  # what the test would see if the seeds were the same
    copied = BatchTopKTrainingSAE(decomposable.meta_config(**shape))
    assert (normalize(copied.W_dec.detach(), dim=-1) @ primary.T).abs().max() > 0.999
