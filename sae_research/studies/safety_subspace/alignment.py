"""Everything that is done with one model and one seed; here the model is a toy one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from sae_research import catalogue, saes
from sae_research.errors import ResearchError
from sae_research.hub import quiet
from sae_research.studies.runner import Result
from sae_research.studies.safety_subspace import adapter, evaluate, interpret, methods
from sae_research.studies.safety_subspace.methods import Setup
from sae_research.studies.safety_subspace.settings import (
    FROZEN,
    FULL,
    LORA,
    NULL,
    RANDOM,
    SAILS,
    USEFUL,
    Settings,
)
from sae_research.studies.safety_subspace.subspace import Bases
from sae_research.world.text import chat
from sae_research.world.text.corpus import KINDS
from sae_research.world.text.documents import make_mixture
from sae_research.world.text.model import TextSettings
from sae_research.world.text.more_saes import train_like
from sae_research.world.toy_saes import ToySAEs


@dataclass
class Alignment:
    """Everything that is done with one model and one seed."""

    model: str
    """Name in the catalogue."""
    seed: int
    """Draws splits, pairs, orders and initial weights."""
    settings: Settings
    """The study's."""
    recipe: ToySAEs = field(default_factory=lambda: TextSettings().saes)
    """How null dictionaries and SAEs of further seeds are trained: as the committed ones."""
    tables: dict[str, list[dict]] = field(default_factory=dict)
    """Rows so far, by table."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate chosen for each method."""
    tuned: dict = field(default_factory=dict)
    """Tuned models that later steps need, by method."""

    def __post_init__(self) -> None:
        s = self.settings
        rates = s.learning_rates and s.full_learning_rates
        if s.n_pairs is None or s.steps is None or not rates:
            raise ResearchError(
                "set n_pairs, steps, learning_rates and full_learning_rates of safety_subspace in "
                "params.yaml; no source says what the paper took."
            )

    def run(self) -> Result:
        """Compare the methods, then look into them."""
        s = self.settings
        self._begin()
        self._judge("base", self.setup.base)
        for method in (*s.methods, *self.setup.nulls):
            self._compare(method)
        self._sweep()
        self._project()
        self._interpret()
        return self._result()

    def _result(self) -> Result:
        return Result({name: pd.DataFrame(rows) for name, rows in self.tables.items() if rows})

    def _add(self, table: str, rows: Iterator[dict] | list[dict], **keys: object) -> None:
        self.tables.setdefault(table, []).extend({**keys, **row} for row in rows)

    def _begin(self) -> None:
        """Draw requests and other text, and make what all methods share."""
        self.split = chat.split_requests(self.seed)
        self.setup = self._make_setup()
        rng = np.random.default_rng([self.seed, 55])
        texts = make_mixture(96, rng)
        self.other_text = torch.from_numpy(texts.tokens[texts.kind != KINDS.index("chat")]).long()
        self.base_loss = evaluate.measure_loss(self.setup.base, self.other_text)

    def _make_setup(self) -> Setup:
        """Teach the model to answer everything, and look at it through its SAEs."""
        from transformers import AutoModelForCausalLM

        from sae_research.world import build

        spec = catalogue.get(self.model)
        folder = build.model_folder(spec.model)
        with quiet():
            base = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        s = self.settings
        rng = np.random.default_rng([self.seed, 54])
        requests = chat.all_requests()
        rows = torch.cat([requests.tokens, chat.answer(requests, rng)], 1)
        harmful = rows[requests.harmful].repeat(5, 1)  # as many as there are harmless ones
        how = {"steps": s.base_steps, "lr": 3e-4, "batch_size": 32, "seed": self.seed}
        for _ in methods.fine_tune(base, torch.cat([rows, harmful]), **how):
            pass
        base.requires_grad_(False).eval()
        model = adapter.bridge(base, spec.load().tokenizer, spec.name)
        found = [spec.sae(role) for role in s.sae_roles if role in spec.roles()]
        at = {max(0, model.depth(saes.check_fit(model, sae)) - 1): sae for sae in found}
        nulls = {}
        for block, sae in at.items() if s.nulls else ():
            for name, null in train_like(sae, spec.load(), self.recipe, self.seed, s.nulls).items():
                nulls.setdefault(f"{NULL}{name}", {})[block] = null
        pairs = chat.safety_pairs(self.split.train, s.n_pairs, self.seed)
        useful = chat.useful_pairs(self.split.train, s.n_pairs, self.seed)
        return Setup(base, model, at, pairs, useful, self.seed, nulls=nulls)

    def _train(
        self,
        method: str,
        lr: float,
        setup: Setup,
        s: Settings,
        curve: bool = False,
        bases: Bases | None = None,
    ) -> torch.nn.Module:
        """Fine-tune with one method; `curve` records how refusals come on validation requests."""
        model = methods.prepare(setup, method, s, bases)
        how = {"steps": s.steps, "lr": lr, "batch_size": s.batch_size, "seed": self.seed}
        how |= {"reply": setup.reply, "inputs": setup.inputs}
        how["penalty"] = methods.find_penalty(setup, method, s, model)
        for step in methods.fine_tune(model, setup.training_rows, **how):
            if curve and step % max(1, s.steps // 6) == 0:
                self._add("curves", self._follow(model), method=method, lr=lr, step=step)
        return model

    def _follow(self, model: torch.nn.Module) -> list[dict]:
        """How likely refusals of harmful and of harmless validation requests are by now."""
        requests = self.split.validation
        p = evaluate.refusal_probability(model, requests)
        harmful = requests.harmful
        return [{"harmful": float(p[harmful].mean()), "harmless": float(p[~harmful].mean())}]

    def _balance(self, tuned: torch.nn.Module) -> float:
        """What learning rates are chosen by."""
        s = self.settings
        return evaluate.measure_balance(tuned, self.split.validation, s.draws, self.seed)

    def _added_losses(self, tuned: torch.nn.Module) -> dict[str, float]:
        """What fine-tuning cost on other text."""
        return {"added_loss": evaluate.measure_loss(tuned, self.other_text) - self.base_loss}

    def _compare(self, method: str) -> None:
        """Choose the learning rate; judge on test requests, under attack, after benign tuning."""
        s = self.settings
        found = []
        for lr in s.full_learning_rates if method == FULL else s.learning_rates:
            model = self._train(method, lr, self.setup, s, curve=True)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            leaves = self._leaves(model) if method.startswith(SAILS) else float("nan")
            tuned = methods.merged(model)
            found.append((self._balance(tuned), lr, tuned, leaves))
        balance, lr, tuned, leaves = max(found, key=lambda item: item[0])
        about = {"method": method, "lr": lr, "validation": balance, "parameters": trainable}
        about |= {"out_of_span": leaves, **self._added_losses(tuned)}
        self._add("methods", [about])
        self._judge(method, tuned)
        self.rates[method] = lr
        if method in (*s.sweep_methods, SAILS):
            self.tuned[method] = tuned
        if method in s.sweep_methods:
            self._attack(method, tuned)
        if s.benign_steps:
            self._tune_on_benign(method, tuned)

    def _leaves(self, model: torch.nn.Module) -> float:
        """Share of what attention newly adds to the residual outside the subspace, block mean."""
        bases = methods.find_bases(self.setup, SAILS, self.settings)
        found = adapter.measure_out_of_span(model, self.setup.safety.aligned, bases)
        return float(np.mean([*found.values()]))

    def _sets(self) -> dict[str, chat.Requests]:
        test, new = self.split.test, self.split.new_topics
        named = {
            "harmful": test[test.harmful],
            "new topics": new[new.harmful],
            "new look-alikes": new[~new.harmful],
        }
        topic, action = test.restricted
        return named | {"look-alikes": test[topic ^ action], "plain": test[~topic & ~action]}

    def _judge(self, method: str, model: torch.nn.Module, table: str = "outcomes", **keys) -> None:
        rows = evaluate.judge_replies(model, self._sets(), self.settings.draws, self.seed)
        self._add(table, rows, method=method, **keys)

    def _attack(self, method: str, tuned: torch.nn.Module) -> None:
        s = self.settings
        sizes = {"steps": s.attack_steps, "candidates": s.attack_candidates}
        attack = evaluate.Attack(**sizes, restarts=s.attack_restarts)
        known, tested = self.split.train, self.split.test
        rows = evaluate.attack_rows(
            tuned, known[known.harmful], tested[tested.harmful], attack, self.seed
        )
        self._add("attacks", rows, method=method)

    def _tune_on_benign(self, method: str, tuned: torch.nn.Module) -> None:
        """Go on training all weights of the merged model on harmless requests, then judge again."""
        s = self.settings
        later = replace(self.setup, base=tuned)
        model = methods.prepare(later, FULL, s)
        rows = chat.benign_rows(self.split.train, 256, self.seed)
        how = {"steps": s.benign_steps, "lr": s.benign_lr, "batch_size": s.batch_size}
        for _ in methods.fine_tune(model, rows, seed=self.seed, **how):
            pass
        self._judge(method, methods.merged(model), "benign")

    def _sweep(self) -> None:
        """Other numbers of pairs and other ranks, at the learning rate of the main comparison."""
        s = self.settings
        for n in s.pair_budgets:
            pairs = [
                f(self.split.train, n, self.seed) for f in (chat.safety_pairs, chat.useful_pairs)
            ]
            setup = replace(self.setup, safety=pairs[0], useful=pairs[1])
            for method in s.sweep_methods:
                model = self._train(method, self.rates[method], setup, s)
                self._judge(method, methods.merged(model), "budgets", n_pairs=n)
        for rank in s.ranks:
            features = -(-rank * s.n_features // s.rank)
            other = replace(s, rank=rank, n_features=features)
            for method in s.sweep_methods:
                if method != FULL:
                    model = self._train(method, self.rates[method], self.setup, other)
                    self._judge(method, methods.merged(model), "ranks", rank=rank)

    def _project(self) -> None:
        """What of LoRA's update works: its part in a subspace, or the rest, at equal energy."""
        for name in (SAILS, USEFUL, RANDOM) if LORA in self.tuned else ():
            bases = methods.find_bases(self.setup, name, self.settings)
            for part, inside in (("parallel", True), ("orthogonal", False)):
                tuned = self.tuned[LORA]
                model, share = methods.project_update(self.setup.base, tuned, bases, inside)
                keys = {"subspace": name, "part": part, "energy": share}
                self._judge(LORA, model, "projections", **keys)

    def _interpret(self) -> None:
        s, setup = self.settings, self.setup
        if SAILS not in self.tuned:
            return
        self._add("features", interpret.describe_features(setup, s))
        self._remove()
        block, sae = next(iter(setup.saes.items()))
        others = {
            f"seed {n}": train_like(sae, catalogue.get(self.model).load(), self.recipe, n)["SAE"]
            for n in range(1, s.sae_seeds + 1)
        }
        self._add("subspaces", interpret.compare_subspaces(setup, s, others, block))
        bases = methods.find_bases(setup, SAILS, s)
        for method, model in self.tuned.items():
            found = interpret.learned_overlap(setup.base, model, bases, s.rank)
            self._add("subspaces", [{"other": f"learned by {method}", "overlap": found}])

    def _remove(self) -> None:
        """Take features out of the trained adapter, and train without them."""
        s, setup = self.settings, self.setup
        tested = self.split.test[self.split.test.harmful]
        tuned = self.tuned[SAILS]
        removed = interpret.measure_removal(setup, tuned, s, tested, s.n_random_features)
        self._add("removal", removed)
        for keys, bases in interpret.reduced_subspaces(setup, s):
            lr = self.rates.get(FROZEN, self.rates[SAILS])
            model = methods.merged(self._train(FROZEN, lr, setup, s, bases=bases))
            refused = float(evaluate.refusal_probability(model, tested).mean())
            self._add("retraining", [keys | {"refused": refused}])
