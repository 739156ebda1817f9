"""Settings of the first look at a real model."""

from typing import ClassVar

from sae_research.config import settings


@settings
class Settings:
    """First look: a real model, its SAEs, its opinions and its refusals."""

    ORDER: ClassVar[int] = 0

    models: tuple[str, ...] = ()
    """Models to look at, by their name in the catalogue; without any the notebooks are left out."""
    text: str = "docstrings"
    """Text of the tables: `docstrings`, a text file or folder, or a corpus of the hub."""
    test_rows: int = 40
    """Rows of 128 held-out tokens on which the committed SAEs are measured again."""
    shown_latents: int = 20
    """Latents shown with the contexts in which they are most active."""
    shown_contexts: int = 2
    """Contexts of each."""
    frequency_band: tuple[float, float] = (0.0005, 0.02)
    """How often a shown or steered latent is active."""
    steered_latents: int = 12
    """Latents that are steered, each beside a random direction of the same length."""
    doses: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """Steering steps in units of the residual's mean norm."""
    prompt: str = "The main thing to know about this"
    """What the steered sentences begin with."""
    new_tokens: int = 24
    """Tokens of each steered sentence and of each answer to a request."""
    survey: str = "ideology"
    """The survey of real respondents."""
    questions: int = 20
    """Questions that are asked, drawn from all."""
    groups: tuple[str, ...] = ("Democrat", "Republican", "liberal", "conservative")
    """Groups whose prompts are tried; neighbours are compared."""
    requests: int = 32
    """Requests of each kind (safe, unsafe) that are taken from the reader's XSTest."""
