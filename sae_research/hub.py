"""Files of the Hugging Face hub, and the libraries that read them kept silent."""

import contextlib
import errno
import io
import logging
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from sae_research import store
from sae_research.errors import ResearchError

_PATIENCE = 10
"""Seconds to wait for the hub's answer."""
_PAGE = {"DecodingError", "FileMetadataError", "JSONDecodeError", "TooManyRedirects"}
"""What the client raises at a page in place of an answer."""
_FOREIGN = (AssertionError, AttributeError, KeyError, TypeError, UnicodeDecodeError)
"""What it raises at JSON that is no hub's."""
_NO_RIGHT = {*store.FULL, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
"""What the system says where a cache cannot be written."""
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


@cache
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
    from huggingface_hub import HfApi, get_session, snapshot_download

    hooks = get_session().event_hooks
    if _lose_patience not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _lose_patience]}
    wanted = {"revision": revision, "allow_patterns": list(patterns)}
    try:
        # asked first: the library takes a page for an answer
        found = HfApi().model_info(repository, revision=revision, timeout=_PATIENCE)
        listed = None if found.siblings is None else [file.rfilename for file in found.siblings]
    except Exception as error:
        try:
            folder = snapshot_download(repository, **wanted, local_files_only=True)
        except (OSError, ValueError):
            raise explain(repository, error, _FOREIGN) from error
    else:
        if listed is not None and not any(fnmatch(n, p) for n in listed for p in patterns):
            raise ResearchError(
                f"{repository} on the hub has no file {' or '.join(patterns)}; check what its page "
                "lists, and choose another name or another SAE."
            )
        try:
            folder = snapshot_download(repository, **wanted)
        except Exception as error:
            raise explain(repository, error, _FOREIGN) from error
    _refuse_damaged(repository, Path(folder))
    return Path(folder)


def _lose_patience(request) -> None:
    """Wait as long as for any answer where the library would wait without end."""
    limits = request.extensions.get("timeout") or {}
    if limits.get("read") is None:
        limits = dict.fromkeys(("connect", "read", "write", "pool"), _PATIENCE)
        request.extensions["timeout"] = limits


def _refuse_damaged(repository: str, folder: Path) -> None:
    """Name a file of weights that was cut short or altered; its header tells."""
    from safetensors import SafetensorError, safe_open

    if folder.parent.name != "snapshots":  # the file that names the commit was cut short
        kept = f"models--{repository.replace('/', '--')}"
        raise ResearchError(
            f"what the cache holds of {repository} is damaged; delete {kept} there."
        )
    for path in folder.rglob("*.safetensors"):
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError as error:
            raise ResearchError(
                f"{path.name} of {folder.parent.parent.name} is damaged ({error}); delete "
                f"{path.resolve()} and run again to fetch it anew."
            ) from error


def explain(
    repository: str, error: Exception, foreign: tuple[type[Exception], ...] = ()
) -> Exception:
    """What the hub's answer, or its silence, means for the reader; other errors stay themselves.

    One of the types `foreign` means that who answered is no hub.
    """
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    answers = [each.response for each in chain if getattr(each, "response", None) is not None]
    if kinds & {"GatedRepoError"}:
        words = "is gated: accept its licence on its page of the Hugging Face hub, then set the "
        words += "environment variable HF_TOKEN to a token of that account."
    elif kinds & {"RepositoryNotFoundError", "HFValidationError", "RevisionNotFoundError"}:
        return ResearchError(
            f"there is no '{repository}' on the hub, and no such folder here; check the name, or "
            "set HF_TOKEN if it is private."
        )
    elif answers:
        words = _explain_status(answers[0].status_code, answers[0].headers.get("Retry-After"))
    elif kinds & {"UnsupportedProtocol", "InvalidURL", "LocalProtocolError"}:
        words = "cannot be asked for: the environment variable HF_ENDPOINT is no address; unset it."
    elif isinstance(error, foreign) or kinds & _PAGE:
        words = "cannot be fetched: a page, not the hub, answers; log in to this network (open any "
        words += "page in a browser) or unset HF_ENDPOINT, then run again."
    elif kinds & {"TimeoutException", "Timeout"}:
        words = f"cannot be fetched: the hub did not answer in {_PATIENCE} s; run again later."
    elif "ConnectError" not in kinds and kinds & {"NetworkError", "RemoteProtocolError"}:
        words = "came in part: the connection broke; run again, what came whole is kept."
    elif any(isinstance(each, OSError) and each.errno in _NO_RIGHT for each in chain):
        words = "cannot be kept: no room or no right to write; free disk space or set HF_HOME."
    elif kinds & {"ConnectError", "ConnectionError", "LocalEntryNotFoundError"}:
        return unreachable(repository)
    else:
        return error
    return ResearchError(f"{repository} {words}")


def _explain_status(status: int, wait: str | None) -> str:
    if status == 401:
        return "cannot be fetched: the hub refuses the token (401); set HF_TOKEN to a valid one."
    if status == 403:
        return "may not be fetched (403): give the token of HF_TOKEN the right to read it."
    if status == 429:
        when = f"in {wait} s" if (wait or "").isdigit() else "in some minutes"
        return f"cannot be fetched now: the hub has had too many requests (429); run again {when}."
    if status >= 500:
        return f"cannot be fetched now: the hub is out of order ({status}); run again later."
    return f"cannot be fetched: the hub answers {status}; check its name and its files."


def sae_commit(release: str) -> str:
    """The commit of the repository that holds a SAELens release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return download(
        get_pretrained_saes_directory()[release].repo_id, (".gitattributes", "README.md")
    ).name


def unreachable(repository: str) -> ResearchError:
    """What to do without network."""
    return ResearchError(
        f"{repository} is not on this machine and the hub cannot be reached: no network for the "
        "laptop and gpu profiles; connect and run again, or use the cpu profile, which needs none."
    )
