"""Sparse feature circuits (Marks et al., 2025, section 3): which latents a probe's decision goes
through, by integrated gradients, with edges between two places of the residual stream.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import LongTensor, Tensor

from sae_research.model_tail import ModelTail
from sae_research.models import Edit, LanguageModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from sae_lens import SAE

ERROR = -1
"""The number that the SAE's error has among the nodes of a hook."""


@dataclass
class Probe:
    """A linear probe on the mean residual over text."""

    weight: Tensor
    bias: Tensor
    centre: Tensor

    def logits(self, pooled: Tensor) -> Tensor:
        return (pooled - self.centre) @ self.weight + self.bias


def pool(residual: Tensor) -> Tensor:
    """Mean over all positions but the start token's [rows, d]."""
    return residual[:, 1:].mean(1)


class Circuit:
    """Effects of the latents of several SAEs on m = -logit sign(label): larger is worse."""

    def __init__(
        self,
        model: LanguageModel,
        saes: "Mapping[str, SAE]",
        probe: Probe,
        probe_hook: str,
        tokens: LongTensor,
        labels: LongTensor,
    ):
        """`saes` by hook, lowest first; their decoders must add f_i W_i, without rescaling."""
        self.model, self.saes, self.probe = model, saes, probe
        self.probe_hook, self.tokens = probe_hook, tokens
        self.sign = 2.0 * labels - 1
        self.depth = model.depth(probe_hook)
        self.tails = {hook: ModelTail(model, hook) for hook in saes}
        self.residuals = {hook: model.residual(tokens, hook) for hook in saes}

    def metric(self, residual: Tensor) -> Tensor:
        """m of every example from the residual at the probe."""
        return -self.sign * self.probe.logits(pool(residual))

    def _above(self, hook: str, residual: Tensor, depth: int) -> Tensor:
        tail = self.tails[hook]
        (found,), _ = tail.run(residual, **tail.causal(residual), read_layers=(depth,))
        return found

    @torch.no_grad()
    def split(self, hook: str) -> tuple[Tensor, Tensor]:
        """Activations [rows, positions, latents] and error at a hook; none at the start token."""
        x, sae = self.residuals[hook], self.saes[hook]
        acts = sae.encode(x)
        error = x - sae.decode(acts)
        acts[:, 0] = 0
        error[:, 0] = x[:, 0] - sae.b_dec
        return acts, error

    def _residual(self, hook: str, acts: Tensor, error: Tensor) -> Tensor:
        sae = self.saes[hook]
        return acts @ sae.W_dec.detach() + sae.b_dec.detach() + error

    def effects(self, hook: str, steps: int) -> tuple[Tensor, float]:
        """Effect of setting each latent to zero, and of the error, summed over positions and
        averaged over examples: IE = (1/N) sum_j grad m at (1 - j/N) a, times (0 - a).
        """
        acts, error = self.split(hook)
        found = []
        for node, other in ((acts, error), (error[:, 1:], acts)):
            total = torch.zeros_like(node)
            for j in range(steps):
                point = (node * (1 - j / steps)).requires_grad_()
                if node is acts:
                    residual = self._residual(hook, point, other)
                else:
                    whole = torch.cat([error[:, :1], point], 1)
                    residual = self._residual(hook, other, whole)
                m = self.metric(self._above(hook, residual, self.depth)).sum()
                total += torch.autograd.grad(m, point)[0]
            found.append((total / steps * -node).sum(1).mean(0))
        return found[0], found[1].sum().item()

    def edges(self, lower: str, upper: str, sources: list[int], targets: list[int]) -> pd.DataFrame:
        """Effect of each source latent (or `ERROR`) of the lower hook through each target."""
        acts, error = self.split(lower)
        leaf, slack = acts.clone().requires_grad_(), error.clone().requires_grad_()
        residual = self._above(lower, self._residual(lower, leaf, slack), self.model.depth(upper))
        above = self.saes[upper].encode(residual)
        upper_acts, upper_error = self.split(upper)
        point = upper_acts.requires_grad_()
        m = self.metric(
            self._above(upper, self._residual(upper, point, upper_error), self.depth)
        ).sum()
        (slope,) = torch.autograd.grad(m, point)
        latents = [source for source in sources if source != ERROR]
        rows = []
        for target in targets:
            through = (slope[:, 1:, target] * above[:, 1:, target]).sum()
            g, e = torch.autograd.grad(through, (leaf, slack), retain_graph=True)
            effect = (g * -acts).sum(1).mean(0)
            rows += [(source, target, effect[source].item()) for source in latents]
            if ERROR in sources:
                rows.append((ERROR, target, (e * -error)[:, 1:].sum((1, 2)).mean().item()))
        return pd.DataFrame(rows, columns=["source", "target", "effect"])

    @torch.no_grad()
    def run_with(self, kept: Mapping[str, Tensor], errors: Mapping[str, bool]) -> float:
        """Mean m with all latents but `kept` (a mask by hook) set to their mean; `errors` says
        where the SAE's error stays.
        """
        edits = {}
        for hook in self.saes:
            acts, error = self.split(hook)
            means = acts[:, 1:].mean((0, 1)), error[:, 1:].mean((0, 1))
            edits[hook] = self._mean_ablation(hook, kept[hook], errors[hook], *means)
        return self.metric(self.model.residual(self.tokens, self.probe_hook, edits)).mean().item()

    def _mean_ablation(
        self, hook: str, kept: Tensor, keep_error: bool, mean_acts: Tensor, mean_error: Tensor
    ) -> Edit:
        sae = self.saes[hook]

        def edit(residual: Tensor) -> Tensor:
            acts = sae.encode(residual)
            error = residual - sae.decode(acts) if keep_error else mean_error
            rebuilt = sae.decode(torch.where(kept, acts, mean_acts)) + error
            return torch.cat([residual[:, :1], rebuilt[:, 1:]], 1)

        return edit

    def faithfulness(self, nodes: pd.DataFrame) -> dict[str, float]:
        """(m(C) - m(none)) / (m(all) - m(none)) of the circuit, and completeness: that of what is
        left without it.
        """
        kept, errors = {}, {}
        for hook, sae in self.saes.items():
            own = nodes[nodes.hook == hook].latent
            kept[hook] = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
            kept[hook][[int(i) for i in own if i != ERROR]] = True
            errors[hook] = bool((own == ERROR).any())
        none = self.run_with(
            {h: torch.zeros_like(k) for h, k in kept.items()}, dict.fromkeys(kept, False)
        )
        whole = self.metric(self.model.residual(self.tokens, self.probe_hook)).mean().item()
        circuit = self.run_with(kept, errors)
        rest = self.run_with(
            {h: ~k for h, k in kept.items()}, {h: not e for h, e in errors.items()}
        )
        gap = whole - none
        return {"faithfulness": (circuit - none) / gap, "completeness": (rest - none) / gap}


def find_nodes(circuit: Circuit, steps: int, threshold: float) -> pd.DataFrame:
    """Latents and errors whose effect is larger than the threshold in size, strongest first."""
    rows = []
    for hook in circuit.saes:
        effect, error = circuit.effects(hook, steps)
        chosen = (effect.abs() > threshold).nonzero()[:, 0].tolist()
        rows += [(hook, latent, effect[latent].item()) for latent in chosen]
        rows += [(hook, ERROR, error)] if abs(error) > threshold else []
    table = pd.DataFrame(rows, columns=["hook", "latent", "effect"])
    return table.sort_values("effect", key=abs, ascending=False, ignore_index=True)


def find_edges(circuit: Circuit, nodes: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Edges between neighbouring hooks whose effect is larger than the threshold in size."""
    hooks = list(circuit.saes)
    tables = []
    for lower, upper in itertools.pairwise(hooks):
        sources = nodes[nodes.hook == lower].latent.tolist()
        targets = [i for i in nodes[nodes.hook == upper].latent if i != ERROR]
        if sources and targets:
            found = circuit.edges(lower, upper, sources, targets)
            tables.append(found[found.effect.abs() > threshold].assign(lower=lower, upper=upper))
    columns = ["lower", "source", "upper", "target", "effect"]
    return pd.concat(tables)[columns] if tables else pd.DataFrame(columns=columns)


def draw_circuit(axes: "Axes", nodes: pd.DataFrame, edges: pd.DataFrame, most: int = 8) -> None:
    """A circuit as a graph, hooks from bottom to top: the `most` strongest nodes of each.

    Colour is the sign of the effect, width its size; a thick rim marks latents about gender.
    """
    hooks = sorted(nodes.hook.unique())
    places = {}
    for height, hook in enumerate(hooks):
        own = nodes[nodes.hook == hook].head(most)
        for i, node in enumerate(own.itertuples()):
            x = (i + 0.5) / len(own)
            places[hook, node.latent] = (x, height)
            words = "error" if node.latent == ERROR else str(node.latent)
            look = {"boxstyle": "round", "facecolor": "#d9e7f5" if node.effect > 0 else "#f8ddd0"}
            rim = {"edgecolor": "#222222", "linewidth": 2.0 if node.gender else 0.5}
            text = f"{words}\n{node.effect:+.2f}"
            axes.text(x, height, text, ha="center", va="center", fontsize=7, bbox=look | rim)
    largest = edges.effect.abs().max() if len(edges) else 1.0
    for edge in edges.itertuples():
        ends = [places.get(end) for end in ((edge.lower, edge.source), (edge.upper, edge.target))]
        if all(ends):
            xs, ys = zip(*ends, strict=True)
            colour = "#3b75af" if edge.effect > 0 else "#c44e2b"
            axes.plot(xs, ys, color=colour, lw=3 * abs(edge.effect) / largest, zorder=0)
    axes.set(xlim=(0, 1), ylim=(-0.4, len(hooks) - 0.6), yticks=range(len(hooks)), xticks=[])
    axes.set_yticklabels([hook.replace(".hook_resid_post", "") for hook in hooks])
    axes.grid(False)
