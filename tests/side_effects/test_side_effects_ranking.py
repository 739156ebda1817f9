"""`screen_features` and the feature card, as somebody uses them on a model and SAE of their own."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from side_effects_toys import HOOK, READ, SETTINGS, D, make_sae, unit

from sae_research import feature_card, screen_features
from sae_research.errors import ResearchError
from sae_research.screening import card, predictors
from sae_research.screening.screen import LABELS

TEXTS = [" ".join(f"w{(i * j) % 90 + 3}" for j in range(1, 12)) for i in range(1, 300)]


@pytest.fixture(scope="module")
def ranking(model, tokens, screened):
    return screen_features(
        model,
        screened.sae,
        tokens,
        downstream=screened.downstream,
        settings=replace(SETTINGS, n_features=40),
    )


def test_the_ranked_table_forecasts_every_eligible_feature(ranking):
    table = ranking.table
    assert len(table) == ranking.screen.collect_facts()["eligible"]
    assert len(table) > 40
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    assert set(table["prediction"]) <= {"clean", "messy", "undecided"}
    assert table["C measured"].notna().sum() == 40
    inside = table.dropna()
    covered = inside["C measured"].between(inside["C low"], inside["C high"])
    assert covered.mean() > 0.8
    assert set(ranking.quality) == set(card.MEANINGS)
    assert not ranking.notes


def test_forecasts_and_intervals_stay_where_labels_can_lie(ranking):
    table = ranking.table
    for name, high in (("S_abs", 1), ("C", 96), ("E", float("inf")), ("C_per_E", float("inf"))):
        for column in (name, f"{name} low", f"{name} high"):
            assert table[column].between(0, high).all(), column
        assert (table[f"{name} low"] <= table[name]).all()


def test_the_card_is_complete_and_saved_by_its_ending(ranking, tmp_path):
    steered = int(ranking.screen.frame.index[0])
    other = int(ranking.table.index.difference(ranking.screen.frame.index)[0])
    for latent in (steered, other):
        found = ranking.card(latent)
        content = found.content
        assert [point["dose"] for point in content["doses"]] == [0.5, 1, 2, 4]
        assert set(content["predictors"]) == set(predictors.ALL)
        shown = {row["label"] for row in content["labels"]} | set(content["other_labels"])
        assert set(LABELS) <= shown
        assert all(row["measured"] == row["measured"] for row in content["labels"]), "not measured"
        page = found.save(str(tmp_path / "card.html"))
        text = page.read_text()
        assert text.startswith("<!doctype html>")
        assert "http" not in text
        assert "src=" not in text
        assert json.loads(found.save(tmp_path / "card.json").read_text()) == json.loads(
            json.dumps(content)
        )
        assert "<!doctype" not in found._repr_html_()
    row = next(r for r in ranking.card(steered).content["labels"] if r["label"] == "C")
    measured = ranking.screen.frame.loc[steered, "C"]
    assert row["measured"] == pytest.approx(measured, rel=1e-5)
    with pytest.raises(ResearchError, match="feature 4000 is out of range"):
        ranking.card(4000)
    with pytest.raises(ResearchError, match=r"saved as \.html or \.json"):
        ranking.card(steered).save("card.pdf")


def test_the_card_shows_the_contexts_in_which_the_feature_is_most_active(ranking, model, tokens):
    latent = int(ranking.table.index[0])
    acts = ranking.screen.sae.encode(model.residual(tokens, HOOK))[:, 1:, latent]
    best = acts.max(1).values.topk(6)
    shown = ranking.card(latent).content["top_contexts"]
    assert [c["activation"] for c in shown] == pytest.approx(best.values.tolist(), abs=1e-5)
    context = int(best.indices[0])
    position = int(acts[context].argmax()) + 1
    token = model.tokenizer.decode([int(tokens[context, position])])
    assert shown[0]["token"].strip() == token.strip()
    whole = shown[0]["before"] + shown[0]["token"] + shown[0]["after"]
    assert whole in model.tokenizer.decode(tokens[context, 1:].tolist())
    page = ranking.card(latent).to_html()
    assert f"<mark>{shown[0]['token']}</mark>" in page


def test_the_card_says_which_other_seeds_find_the_feature(ranking):
    latent = int(ranking.screen.frame.index[0])
    alone = ranking.card(latent)
    assert "other_seeds" not in alone.content
    assert "other SAE seeds" not in alone.to_html()
    sae = ranking.screen.sae
    same, blind = (copy.deepcopy(sae) for _ in range(2))
    row = sae.W_dec[latent]
    same.W_dec.data = 3 * sae.W_dec.flip(0)  # another order and length
    across = torch.linalg.svd(row[None])[2][1]  # a direction at right angles to it
    blind.W_dec.data = (0.6 * row + 0.8 * across).repeat(len(sae.W_dec), 1)
    found = replace(ranking, other_seeds=[same, blind]).card(latent)
    words = "found in 1 of 2 other SAE seeds (cosine 1.00, .60)"
    assert found.content["other_seeds"]["words"] == words
    assert found.content["other_seeds"]["cosines"] == pytest.approx([1, 0.6], abs=1e-4)
    assert f"<p>{words}</p>" in found.to_html()


def test_a_dose_is_shown_in_activations_and_in_the_residuals_norm(ranking):
    latent = int(ranking.screen.frame.index[3])
    point = next(p for p in ranking.card(latent).content["doses"] if p["dose"] == 2)
    screen = ranking.screen
    largest = float(screen.sae.encode(screen.engine.residual(screen.tokens))[:, 1:, latent].max())
    assert point["coefficient"] == pytest.approx(2 * screen.dose)
    assert point["max_activations"] == pytest.approx(2 * screen.dose / largest, rel=1e-4)
    assert point["percent_of_residual_norm"] == pytest.approx(40, rel=0.02), "rows have norm 1"


def test_labels_of_the_dose_chart_do_not_overlap(ranking):
    page = ranking.card(int(ranking.table.index[0])).to_html()
    charts = page.split("<svg")[1:]
    assert len(charts) == len(feature_card.DOSED)
    for chart in charts:
        places = [
            (float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"', chart)
        ]
        close = [
            (a, b)
            for i, a in enumerate(places)
            for b in places[:i]
            if abs(a[0] - b[0]) < 30 and abs(a[1] - b[1]) < 9
        ]
        assert not [pair for pair in close if pair[0][0] > 0 and pair[1][0] > 0]


def test_moved_tokens_are_text_that_moves_on_its_own(ranking, model):
    content = ranking.card(int(ranking.table.index[0])).content
    for name, sign in (("rising_tokens", 1), ("falling_tokens", -1)):
        changes = [sign * token["change"] for token in content[name]]
        assert changes == sorted(changes, reverse=True)
        assert min(changes) > 0
        assert len({round(c, 5) for c in changes}) == len(changes)
    special = {model.tokenizer.decode([i]) for i in model.tokenizer.all_special_ids}
    tokens = content["rising_tokens"] + content["falling_tokens"]
    assert not special & {token["token"] for token in tokens}


def test_sentencepiece_keeps_its_spaces_and_bytes_are_no_text():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁M": 1, "M": 2, "<0x41>": 3, "▁": 4, "<extra_id_0>": 5}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert feature_card.decode(tokenizer, [1]) == " M"
    assert feature_card.decode(tokenizer, [2]) == "M"
    assert [i for i in range(6) if feature_card.is_text(tokenizer, i)] == [1, 2]


def test_numbers_are_shown_as_people_write_them():
    assert feature_card.format_number(1024) == "1,024"
    assert feature_card.format_number(1024.4) == "1,024"
    assert feature_card.format_number(3.0) == "3"
    assert feature_card.format_number(0.12345) == "0.123"


# what people hand over


def test_texts_are_enough_and_a_small_corpus_says_what_it_gives(model, screened):
    settings = replace(SETTINGS, n_features=20)
    with pytest.warns(UserWarning, match=r"gives \d+ contexts of 8 tokens, not 9999"):
        found = screen_features(
            model, screened.sae, TEXTS, settings=replace(settings, n_contexts=9999)
        )
    assert found.table["C"].notna().all()
    assert str(found.screen.tokens.shape[0]) in found.notes[0]
    assert found.notes[0] in repr(found)


@pytest.mark.filterwarnings("ignore:The corpus gives")
def test_defaults_and_n_features_work_on_few_texts(model, screened):
    with pytest.warns(UserWarning, match=r"Each feature is steered in \d+ contexts, not 48"):
        found = screen_features(model, screened.sae, TEXTS[:80], n_features=25)
    assert "all of them are used" in found.notes[0]
    assert len(found.screen.features) == 25
    assert found.card(int(found.table.index[0])).content["notes"] == found.notes
    with pytest.raises(ResearchError, match="screening needs 12"):
        screen_features(model, screened.sae, TEXTS[:3])


def test_few_eligible_latents_are_all_steered(model, screened, tokens):
    settings = replace(SETTINGS, n_features=200)
    eligible = screened.collect_facts()["eligible"]
    assert 20 < eligible < 200
    with pytest.warns(UserWarning, match=f"Only {eligible} latents are eligible, not 200"):
        found = screen_features(model, screened.sae, tokens, settings=settings)
    assert found.table["C measured"].notna().all()


def test_wrong_kinds_of_input_are_one_sentence(model, screened):
    with pytest.raises(ResearchError, match="texts is one string; give a list"):
        screen_features(model, screened.sae, TEXTS[0])
    with pytest.raises(ResearchError, match=r"`sae_research\.load_model` returns, not a Llama"):
        screen_features(model.bridge.original_model, screened.sae, TEXTS)
    with pytest.raises(ResearchError, match=r"`sae_research\.load_sae` returns, not a dict"):
        screen_features(model, {}, TEXTS)


def test_other_seeds_read_the_same_hook(model, screened, tokens):
    with pytest.raises(ResearchError, match="`other_seeds` read another hook"):
        screen_features(model, screened.sae, tokens, other_seeds=[screened.downstream])


def test_a_large_step_is_warned_of(model, screened, tokens):
    settings = replace(SETTINGS, n_features=20, dose_norm_fraction=0.6)
    with pytest.warns(UserWarning, match=r"One dose is 60 % of the residual's norm"):
        found = screen_features(model, screened.sae, tokens, settings=settings)
    assert "60 %" in found.card(int(found.table.index[0])).to_html()


def test_a_topk_sae_with_few_active_latents_has_a_threshold_that_counts(model, screened, tokens):
    torch.manual_seed(21)
    downstream = make_sae(model, READ, unit(torch.randn(400, D)), kind="topk", k=2)
    settings = replace(SETTINGS, n_features=20, n_downstream_latents=400, tau_quantile=0.05)
    with pytest.warns(UserWarning, match="tau is the median of the changes"):
        found = screen_features(
            model, screened.sae, tokens, downstream=downstream, settings=settings
        )
    assert found.screen.tau > 1e-3
    assert found.screen.frame["C"].max() > 0
