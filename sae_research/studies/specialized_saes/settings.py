"""Settings of study 3; defaults are the paper's values."""

from typing import ClassVar

from sae_research.config import settings


@settings
class Settings:
    """Study 3: SAEs tuned on a retrieved subdomain with a tilted loss."""

    ORDER: ClassVar[int] = 3
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gpt2-small", "pythia-70m")
    """Models with their SAEs: the language model of Figs 1 to 14 is not known to us; Table 1 uses
    Pythia-70M.
    """
