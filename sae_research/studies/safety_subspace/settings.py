"""Settings of study 5; defaults are the paper's values."""

from typing import ClassVar

from sae_research.config import settings


@settings
class Settings:
    """Study 5: fine-tuning inside a subspace that SAE features span."""

    ORDER: ClassVar[int] = 5
    RENAMED: ClassVar[dict[str, str]] = {"subjects": "models"}

    models: tuple[str, ...] = ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b")
    """Models with their SAEs, by their name in the catalogue (abstract)."""
