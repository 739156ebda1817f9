"""The settings of a tilted risk (`term`), without the libraries that use them."""

from typing import Literal

from sae_research.config import settings


@settings
class Tilt:
    """How far and where the risk is tilted."""

    t: float = 0.0
    """The tilt; 0 is the mean loss."""
    unit: Literal["loss", "mean loss", "effective sample size"] = "loss"
    """What `t` multiplies: the loss as it is (the paper's 500 and 1e9), the loss over its batch
    mean, or none: then `t` is the effective share of the batch, 1/(B sum w^2), to aim at."""
    on: Literal["reconstruction", "total"] = "reconstruction"
    """Whether the tilted loss holds the sparsity penalty too."""
    start: float = 0.0
    """Share of the steps before the tilt sets in (warm start)."""
    sampled: float | None = None
    """If set, the backward pass sees this share of the batch, drawn by weight."""
    bins: bool = False
    """Whether groups of tokens by frequency are tilted instead of tokens."""
