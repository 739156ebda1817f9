"""A real model that nobody in this project made: stories260K, next to the repository in
shared/real.
"""

import json

import pytest
from replicas import REAL

from sae_research import activations, conversion, models, saes

FOLDER = REAL / "models" / "stories260K"
TEXT = REAL / "text" / "tinystories_v1_first1000.json"
MISSING = [str(path) for path in (FOLDER, TEXT) if not path.exists()]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def stories():
    return models.load_model(FOLDER)


@pytest.fixture(scope="module")
def rows(stories):
    """Clean stories as one stream, each opened by BOS as in the model's training, cut into rows of
    256 tokens.
    """
    import torch

    texts = [
        text.replace("\n\n", "\n").strip()
        for text in json.loads(TEXT.read_text())
        if "â" not in text
    ]
    ids = stories.tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([i for story in ids for i in (stories.bos, *story)])
    return stream[: len(stream) // 256 * 256].view(-1, 256)


def test_half_precision_file_loads_in_float32(stories):
    import torch

    assert (stories.n_layers, stories.d_model, stories.d_vocab, stories.n_ctx) == (5, 64, 512, 512)
    assert all(weight.dtype == torch.float32 for weight in stories.bridge.parameters())
    assert stories.bridge.n_params_total == 260_032


def test_greedy_text_is_the_published_one(stories):
    tokens = stories.generate(stories.tokens([""]), 40)
    text = stories.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park."
    )


def test_logits_equal_hugging_face(stories, rows):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stories.logits(rows[:8]) - model(rows[:8]).logits).abs().max() < 1e-4


def test_loss_on_clean_stories(stories, rows):
    assert 1.45 < stories.losses(rows[::12]).mean() < 1.6


@pytest.mark.slow
def test_an_sae_of_ours_explains_it(stories, rows):
    """Trained on one part of the text, judged on another."""
    from sae_research import training

    acts = activations.collect(stories, rows[:400], HOOK)
    settings = training.SAETraining(steps=400, batch_size=1024)
    config = training.topk(64, 1024, k=24, metadata=saes.metadata(stories, HOOK))
    batches = activations.batches(acts, settings.batch_size, settings.steps, seed=0)
    sae = training.train({"topk": config}, batches, settings, seed=0)["topk"]
    export = training.inference(sae, acts[:20_000])
    assert saes.check_fit(stories, export) == "blocks.2.hook_out"
    result = saes.quality(stories, export, rows[-40:])
    assert result["explained_variance"] > 0.9
    assert result["ce_recovered"] > 0.95
    assert result["l0"] <= 24
    calibrated = conversion.exact_l0(sae, acts[:20_000], 24)
    assert calibrated.cfg.metadata.calibrated_l0 == pytest.approx(24, abs=1e-3)
    assert saes.quality(stories, calibrated, rows[-40:])["l0"] == pytest.approx(24, rel=0.1)
