"""A circuit as a graph: hooks from bottom to top, the strongest latents of each, their edges."""

from typing import TYPE_CHECKING

import pandas as pd

from sae_research.circuits import ERROR

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_circuit(axes: "Axes", nodes: pd.DataFrame, edges: pd.DataFrame, most: int = 8) -> None:
    """Draw the `most` strongest nodes of each hook; colour is the sign of the effect, width its
    size, and a thick rim marks latents judged to be about gender.
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
