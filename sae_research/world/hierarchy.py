"""Planted directions in a hierarchy, from SAELens' generators: a child is active only where its
parent is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """What is planted."""

    n_features: int
    """Directions: parents with their children, and single ones."""
    n_parents: int
    """Directions with children."""
    n_children: int
    """Children of each parent."""
    probabilities: tuple[float, float, float]
    """How often parents, children given their parent, and single directions are active."""


def draw(tree: Tree, d_in: int, sizes: Sequence[int], seed: int) -> tuple[list[Tensor], Tensor]:
    """Samples of how strongly each direction is active [n, m], and the unit directions [m, d]."""
    from sae_lens.synthetic import ActivationGenerator, HierarchyNode, hierarchy_modifier

    torch.manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(tree.n_features, d_in), dim=-1)
    parents = [
        HierarchyNode(
            feature_index=p,
            children=[
                HierarchyNode(feature_index=tree.n_parents + p * tree.n_children + c)
                for c in range(tree.n_children)
            ],
        )
        for p in range(tree.n_parents)
    ]
    of_parent, of_child, of_single = tree.probabilities
    n_children = tree.n_parents * tree.n_children
    n_single = tree.n_features - tree.n_parents - n_children
    odds = torch.tensor(
        [of_parent] * tree.n_parents + [of_child] * n_children + [of_single] * n_single
    )
    generator = ActivationGenerator(
        num_features=tree.n_features,
        firing_probabilities=odds,
        std_firing_magnitudes=0.2,
        modify_activations=hierarchy_modifier(parents),
    )
    return [generator.sample(n) for n in sizes], directions
