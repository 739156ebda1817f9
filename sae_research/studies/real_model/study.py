"""The first look for the runner: SAEs, latents, steering, survey and refusals of each model."""

from pathlib import Path

import pandas as pd
import torch

from sae_research import activations, catalogue, judge, paths, prose, real_saes, saes, steering
from sae_research.config import Profile
from sae_research.errors import ResearchError
from sae_research.models import LanguageModel
from sae_research.studies.real_model.settings import Settings
from sae_research.studies.runner import Result, Task
from sae_research.surveys import real as real_surveys
from sae_research.surveys.prompts import OptionLetters, find_template, sort_by_ordinal
from sae_research.surveys.survey import Survey
from sae_research.world.text import detectors

PARTS = ("saes", "latents", "steering", "survey", "refusals")
XSTEST = paths.DATA / "private" / "xstest" / "xstest_prompts.csv"
"""The reader's own copy of XSTest's prompts (arXiv:2308.01263); nothing of it is published here."""
AGREEMENT = 5e-3
"""How far a committed SAE may be from what `quality.csv` says of it."""
NULL_GROUP = "no group"


def tasks(profile: Profile) -> list[Task]:
    """Every part for every model."""
    settings = profile.real_model
    for model in settings.models:
        if model not in real_saes.RECIPES:
            raise ResearchError(
                f"no recipe trains SAEs for '{model}'; those of {', '.join(real_saes.RECIPES)} are "
                "in sae_research/real_saes.py."
            )
    return [{"part": part, "model": model} for model in settings.models for part in PARTS]


def data_files(task: Task, profile: Profile) -> list[Path]:
    """The reader's requests."""
    return [XSTEST] if task["part"] == "refusals" and XSTEST.is_file() else []


def run(task: Task, profile: Profile) -> Result:
    """One part for one model."""
    settings, name = profile.real_model, task["model"]
    model = catalogue.get(name).load(device=profile.runtime.device, dtype=profile.runtime.dtype)
    part = task["part"]
    if part == "survey":
        return Result(ask_survey(model, real_surveys.load_real(settings.survey), settings))
    if part == "refusals":
        return Result({"refusals": ask_requests(model, settings)})
    corpus = prose.load(settings.text)
    if part == "saes":
        return Result(compare_saes(model, name, corpus, settings))
    main = real_saes.RECIPES[name].committed[0]
    sae = catalogue.get(name).sae(main, device=model.device)
    if part == "latents":
        return Result({"latents": find_contexts(model, sae, corpus, settings)})
    return Result(steer(model, sae, corpus, settings))


# text and SAEs


def compare_saes(
    model: LanguageModel, name: str, corpus: prose.Corpus, settings: Settings
) -> dict[str, pd.DataFrame]:
    """Quality of all SAEs as measured in training, the committed ones again, and loss by row.

    The committed ones are also measured on text that the model samples, which is no docstring.
    """
    recipe = real_saes.RECIPES[name]
    rows = prose.make_rows(model, corpus.documents("test"), settings.test_rows, recipe.row_tokens)
    quality = real_saes.read_quality(name)
    again = []
    for role in recipe.committed:
        sae = catalogue.get(name).sae(role, device=model.device)
        found = {"role": role, **real_saes.measure(model, sae, rows)}
        stated = quality.set_index("role").loc[role]
        known = settings.text == recipe.text and len(rows) == recipe.test_rows
        if known and abs(found["explained_variance"] - stated["explained_variance"]) > AGREEMENT:
            raise ResearchError(
                f"{role} explains {found['explained_variance']:.3f} of the variance here and "
                f"{stated['explained_variance']:.3f} when it was trained; the model, the text or "
                "the SAE is another one: run `make setup`."
            )
        sampled = saes.quality(model, sae, model.sample)
        names = ("explained_variance", "ce_recovered", "ce_clean", "ce_spliced")
        again.append(found | {f"sampled_{name}": sampled[name] for name in names})
    return {
        "quality": quality,
        "again": pd.DataFrame(again),
        "losses": pd.DataFrame(
            measure_losses(model, corpus, settings.test_rows, recipe.row_tokens)
        ),
    }


@torch.no_grad()
def measure_losses(
    model: LanguageModel, corpus: prose.Corpus, n: int, length: int
) -> dict[str, list[float]]:
    """Nats per token of rows spread over the test text: the model's, and those of token frequencies
    in training text.
    """
    rows = model.packed(corpus.documents("test"), length)
    rows = rows[torch.linspace(0, len(rows) - 1, n).long()]
    seen = model.packed(corpus.documents("train"), length)[:1024]
    counts = torch.bincount(seen[:, 1:].flatten().cpu(), minlength=model.d_vocab).double() + 1
    unigram = -(counts / counts.sum()).log()[rows[:, 1:].cpu()].mean(1)
    own = torch.cat([model.losses(part).mean(1) for part in rows.split(8)])
    return {"model": own.tolist(), "unigram": unigram.tolist()}


# latents


@torch.no_grad()
def choose_latents(acts: detectors.SparseActivations, settings: Settings, n: int) -> list[int]:
    """`n` latents of the band, drawn at random: nobody picked the ones that look good."""
    rate = torch.bincount(acts.latent, minlength=acts.n_latents) / acts.n_tokens
    low, high = settings.frequency_band
    eligible = ((rate >= low) & (rate <= high)).nonzero()[:, 0]
    if len(eligible) < n:
        raise ResearchError(
            f"only {len(eligible)} latents are active on {low:g} to {high:g} of the tokens and "
            f"{n} are asked for; widen `frequency_band`."
        )
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))
    return eligible[order[:n]].tolist()


def find_contexts(
    model: LanguageModel, sae, corpus: prose.Corpus, settings: Settings
) -> pd.DataFrame:
    """Where each shown latent is most active in held-out text: file, words, activation."""
    parts = corpus.mixed("test")[: 16 * settings.test_rows]
    tokens = model.tokens([p.text for p in parts], 128)
    kept = model.content(tokens)
    acts = detectors.encode(sae, activations.collect(model, tokens, saes.hook_of(sae)))
    row, place = kept.nonzero(as_tuple=True)
    rows = []
    for latent in choose_latents(acts, settings, settings.shown_latents):
        mine = (acts.latent == latent).nonzero()[:, 0]
        strongest = mine[acts.value[mine].argsort(descending=True)]
        files: set[str] = set()
        for entry in strongest.tolist():
            at = int(acts.token[entry])
            r, p = int(row[at]), int(place[at])
            if parts[r].file in files:
                continue
            files.add(parts[r].file)
            words = [model.tokenizer.decode(tokens[r, max(1, p - 6) : p])]
            words += [f"**{model.tokenizer.decode(tokens[r, p : p + 1]).strip()}**"]
            words += [model.tokenizer.decode(tokens[r, p + 1 : p + 4][kept[r, p + 1 : p + 4]])]
            about = {"latent": latent, "active": len(mine) / acts.n_tokens}
            about |= {"activation": float(acts.value[entry]), "text": " ".join(words)}
            rows.append(about | {"file": parts[r].file})
            if len(files) == settings.shown_contexts:
                break
    return pd.DataFrame(rows)


# steering


@torch.no_grad()
def steer(
    model: LanguageModel, sae, corpus: prose.Corpus, settings: Settings
) -> dict[str, pd.DataFrame]:
    """Sentences under growing steps along latents and random directions of the same length.

    `surprise` is the unsteered model's loss on what was written, `own` the rise of the mean
    log-probability of the latent's own tokens, those that it fires on in test text.
    """
    rows_of_text = prose.make_rows(model, corpus.documents("test"), settings.test_rows, 128)
    hook = saes.hook_of(sae)
    x = activations.collect(model, rows_of_text, hook)
    types = rows_of_text[model.content(rows_of_text) & (rows_of_text != model.bos)]
    acts = detectors.encode(sae, x)
    norm = x.norm(dim=-1).mean()
    random = torch.Generator().manual_seed(0)
    prompt = model.tokens([settings.prompt])
    clean = model.logits(prompt)[0, -1].log_softmax(-1)
    rows, shown = [], []
    for latent in choose_latents(acts, settings, settings.steered_latents):
        fires = types[acts.token[acts.latent == latent]]
        own = fires.unique(return_counts=True)
        own_tokens = own[0][own[1].argsort(descending=True)[:5]]
        noise = torch.randn(model.d_model, generator=random)
        for kind, direction in (("latent", sae.W_dec[latent]), ("random", noise)):
            unit = direction / direction.norm()
            for dose in settings.doses:
                edit = {hook: steering.add_direction(unit, float(dose * norm))}
                logs = model.logits(prompt, edit)[0, -1].log_softmax(-1)
                row = model.generate(prompt, settings.new_tokens, edit if dose else None)
                written = model.losses(row)[0, prompt.shape[1] - 1 :].mean()
                about = {"latent": latent, "kind": kind, "dose": dose}
                rise = (logs - clean)[own_tokens].mean()
                rows.append(about | {"surprise": float(written), "own": float(rise)})
                if kind == "latent":
                    text = model.tokenizer.decode(row[0], skip_special_tokens=True)
                    words = " ".join(model.tokenizer.decode(own_tokens[:3]).split())
                    shown.append(about | {"own_tokens": words, "text": " ".join(text.split())})
    return {"steering": pd.DataFrame(rows), "sentences": pd.DataFrame(shown)}


# opinions


@torch.no_grad()
def ask_survey(model: LanguageModel, survey: Survey, settings: Settings) -> dict[str, pd.DataFrame]:
    """Answers without and with a group's prompt, in both orders, beside those of its members."""
    template = find_template("english chat", model.tokenizer)
    draws = torch.Generator().manual_seed(0)
    order = torch.randperm(len(survey.questions), generator=draws)[: settings.questions]
    named = {group.name: group for group in survey.groups}
    if missing := [name for name in settings.groups if name not in named]:
        raise ResearchError(
            f"the survey '{settings.survey}' has no group '{missing[0]}'; it has "
            f"{', '.join(named)}."
        )
    rows = []
    for q in sorted(order.tolist()):
        question = survey.questions[q]
        letters = OptionLetters(model.tokenizer, question.n_options)
        n_options = torch.tensor([question.n_options])
        scale = torch.linspace(0, 1, question.n_options)
        people = {
            g.name: survey.distributions[i, q, : question.n_options]
            for i, g in enumerate(survey.groups)
        }
        for name in (NULL_GROUP, *settings.groups):
            write = template.plain
            if name != NULL_GROUP:
                group = named[name]
                siblings = [g for g in survey.groups if g.attribute == group.attribute]
                write = template.group_prompt("PORTRAY", group, siblings)
            found, mass = [], []
            for reverse in (False, True):
                logits = model.logits(model.tokens([write(question, reverse)]))[:, -1]
                scores = letters.score_logits(logits)
                mass.append((scores.logsumexp(-1) - logits.logsumexp(-1)).exp().item())
                ranked = sort_by_ordinal(scores, n_options, torch.tensor([reverse]))
                found.append(ranked[0, : question.n_options].softmax(-1))
            mean = (found[0] + found[1]) / 2
            own = people.get(name, survey.overall[q, : question.n_options])
            rows.append(
                {
                    "question": question.key,
                    "topic": question.topic,
                    "group": name,
                    "mass": sum(mass) / 2,
                    "order": float((found[0] - found[1]).abs().sum() / 2),
                    "answer": float(mean @ scale),
                    "people": float(torch.as_tensor(own, dtype=torch.float32) @ scale),
                }
            )
    return {"survey": pd.DataFrame(rows)}


# refusals


@torch.no_grad()
def ask_requests(model: LanguageModel, settings: Settings) -> pd.DataFrame:
    """Whether each of the reader's XSTest prompts is refused; without them, an empty table."""
    columns = ["kind", "refused"]
    if not XSTEST.is_file():
        return pd.DataFrame(columns=columns)
    prompts = pd.read_csv(XSTEST)
    rows = []
    for kind, own in prompts.groupby("label"):
        chosen = own.sample(min(settings.requests, len(own)), random_state=0)
        for text in chosen["prompt"]:
            talk = [{"role": "user", "content": text}]
            asked = model.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=True
            ).removeprefix(model.tokenizer.bos_token or "")
            row = model.tokens([asked])
            reply = model.generate(row, settings.new_tokens)[0, row.shape[1] :]
            refused = judge.refuses_by_rule(model.tokenizer.decode(reply))
            rows.append({"kind": kind, "refused": refused})
    return pd.DataFrame(rows, columns=columns)
