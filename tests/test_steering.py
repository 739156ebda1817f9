"""Edits in SAE space keep the error term, do nothing when asked for nothing, and never touch
BOS.
"""

import miniatures
import pytest

from sae_research import models, steering
from sae_research.errors import ResearchError

HOOK = "blocks.1.hook_resid_post"
KINDS = ("relu", "jumprelu", "topk")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.load_model(
        miniatures.save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    )


@pytest.fixture(scope="module")
def tokens(llama):
    import torch

    rows = torch.randint(4, 64, (5, 9), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = llama.bos
    return rows


@pytest.fixture(params=KINDS)
def sae(request):
    return miniatures.random_sae(
        request.param, **({"k": 9} if request.param == "topk" else {})
    ).requires_grad_(False)


def residual(dtype="float32"):
    import torch

    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(3)).to(
        getattr(torch, dtype)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_no_change_of_codes_changes_no_bit(sae, dtype, positions):
    x = residual(dtype)
    assert steering.edit(sae, lambda codes: codes, positions)(x).equal(x)
    assert steering.add_direction(x[0, 0], 0.0, positions)(x).equal(x)


def test_edit_is_the_new_reconstruction_plus_the_old_error(sae):
    x = residual()
    codes = sae.encode(x)
    expected = sae.decode(codes * 2) + (x - sae.decode(codes))
    edited = steering.edit(sae, lambda codes: codes * 2)(x)
    assert edited[:, 1:].allclose(expected[:, 1:], atol=1e-5)
    assert not edited[:, 1:].allclose(x[:, 1:], atol=1e-2)
    assert edited[:, 0].equal(x[:, 0])


def test_ablating_every_latent_leaves_error_and_bias(sae):
    x = residual()
    edited = steering.edit(sae, steering.clamp(list(range(128)), 0.0))(x)
    assert edited[:, 1:].allclose((x - sae.decode(sae.encode(x)) + sae.b_dec)[:, 1:], atol=1e-5)


def test_clamping_one_latent_moves_along_its_direction_only(sae):
    import torch

    x = residual()
    moved = (steering.edit(sae, steering.clamp([5], 3.0))(x) - x)[:, 1:]
    amount = 3 - sae.encode(x)[:, 1:, 5]
    assert moved.allclose(amount[..., None] * steering.directions(sae)[5], atol=1e-5)
    unit = torch.zeros(1, 128).index_fill(1, torch.tensor([5]), 1.0)
    assert steering.directions(sae)[5].allclose(
        sae.decode(unit)[0] - sae.decode(0 * unit)[0], atol=1e-6
    )


def test_positions_say_where(sae):
    import torch

    x = residual()

    def moved(positions):
        return (steering.edit(sae, steering.clamp([5], 9.0), positions)(x) != x).any(-1)

    everywhere, last = torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
    everywhere[:, 0], last[:, -1] = False, True
    some = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    some[0, 0] = True
    assert moved("all").equal(everywhere)
    assert moved("last").equal(last)
    assert moved(some).equal(some & everywhere)
    assert moved(some[0]).equal(some[0] & everywhere)


def test_bos_stays_even_when_it_is_the_last_position():
    x = residual()[:, :1]
    assert steering.add_direction(x[0, 0], 5.0, "last")(x).equal(x)


def test_added_direction_arrives_in_full(llama, tokens):
    import torch

    direction = torch.randn(llama.d_model, generator=torch.Generator().manual_seed(0))
    edits = {HOOK: steering.add_direction(direction, 2.0, "last")}
    change = llama.residual(tokens, HOOK, edits) - llama.residual(tokens, HOOK)
    assert change[:, -1].allclose((2 * direction).expand(5, -1), atol=1e-5)
    assert change[:, :-1].abs().max() == 0


def test_a_no_op_edit_leaves_every_logit(llama, tokens, sae):
    assert llama.logits(tokens, {HOOK: steering.edit(sae, lambda codes: codes)}).equal(
        llama.logits(tokens)
    )


def test_earlier_logits_never_see_an_edit_of_the_last_position(llama, tokens, sae):
    change = llama.logits(
        tokens, {HOOK: steering.edit(sae, steering.clamp([5], 9.0), "last")}
    ) - llama.logits(tokens)
    assert change[:, :-1].abs().max() == 0
    assert change[:, -1].abs().max() > 1e-3


def test_gradients_reach_what_the_edit_learns(llama, tokens, sae):
    import torch

    shift = torch.zeros(128, requires_grad=True)
    llama.losses(tokens, {HOOK: steering.edit(sae, lambda codes: codes + shift)}).mean().backward()
    assert shift.grad.abs().sum() > 0


def test_mistakes_are_named(sae):
    import torch

    x = residual()
    with pytest.raises(ResearchError, match="not 'first'"):
        steering.add_direction(x[0, 0], 1.0, "first")(x)
    with pytest.raises(ResearchError, match="the mask has 4 positions and the text 7"):
        steering.add_direction(x[0, 0], 1.0, torch.ones(3, 4, dtype=torch.bool))(x)
    with pytest.raises(ResearchError, match="normalises each token"):
        steering.edit(
            miniatures.random_sae("relu", normalize_activations="layer_norm"), lambda codes: codes
        )
