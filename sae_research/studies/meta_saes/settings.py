"""Settings of study 4; defaults are the paper's values."""

from typing import ClassVar

from sae_research.config import settings


@settings
class Settings:
    """Study 4: joint training with a decomposability penalty."""

    ORDER: ClassVar[int] = 4
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gpt2-large", "gemma-2-9b")
    """Models whose residual stream the SAEs are trained on (sections 4 and 6)."""
