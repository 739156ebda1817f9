"""Files of the Hugging Face hub, and the libraries that read them kept silent."""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from sae_research.errors import ResearchError

_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence bars, prints and deprecation noise of the model libraries; errors come through."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@functools.cache
def canonical_name(model: str) -> str:
    """The hub name of a model that libraries also know by short names (`gpt2-small` is `gpt2`)."""
    if "/" in model:
        return model
    with quiet():
        from transformer_lens.supported_models import MODEL_ALIASES
    return next(
        (official for official, aliases in MODEL_ALIASES.items() if model in aliases), model
    )


def download(
    repository: str, patterns: tuple[str, ...] = _MODEL_FILES, revision: str | None = None
) -> Path:
    """The folder, named by its commit, with those files of a hub repository that `patterns` name;
    fetched unless already on this machine.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
        return Path(folder)
    except GatedRepoError as error:
        raise ResearchError(
            f"{repository} is gated: accept its licence on its page of the Hugging Face hub, then "
            "set the environment variable HF_TOKEN to a token of that account."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ResearchError(
            f"there is no '{repository}' on the hub, and no such folder here; check the name."
        ) from error
    except OSError as error:
        raise unreachable(repository) from error


def sae_commit(release: str) -> str:
    """The commit of the repository that holds a SAELens release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return download(get_pretrained_saes_directory()[release].repo_id, (".gitattributes",)).name


def unreachable(repository: str) -> ResearchError:
    """What to do without network."""
    return ResearchError(
        f"{repository} is not on this machine and the hub cannot be reached: no network for the "
        "laptop and gpu profiles; connect and run again, or use the cpu profile, which needs none."
    )
