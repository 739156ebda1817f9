"""Whether this machine can run each profile and study, and what is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from sae_research import catalogue, config, paths, store
from sae_research.errors import ResearchError
from sae_research.tables import aligned

GB = 1024**3
_WORKING_MEMORY = 3.0
"""Gigabytes that Python, the libraries and a batch need beside the weights."""
_OVERHEAD = 1.2
"""Weights while they are loaded and wrapped, as a multiple of their size."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_RESULTS_DISK = 2.0
"""Gigabytes that intermediate work and the cache of results need."""


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
    """What is wrong with the embedded world, by specimen; empty if it is intact."""
    pipeline: str = ""
    """State of the DVC chain."""
    hub: str | None = None
    """What is wrong with the model hub, if anything; not asked unless a judged profile needs it."""
    token: bool = False
    """Whether a hub token is present (it is never shown)."""
    refused: dict[str, str] = field(default_factory=dict)
    """Gated models that the token does not open, with the reason."""
    cached: frozenset[str] = frozenset()
    """Models that are on this disk already."""


def run(profile: str | None = None) -> tuple[str, int]:
    """A report on every profile (or on one), and 0 if the default profile (or that one) can run, else 1."""
    judged = config.load(profile).name
    shown = [config.load(name) for name in ([judged] if profile else config.profiles())]
    machine = examine(shown)
    verdicts = {settings.name: judge(settings, machine) for settings in shown}
    rows = [["profile", "study", "runs", "what is missing"]]
    for settings in shown:
        for study, missing in verdicts[settings.name].items():
            reason = "; ".join(missing) or _caveat(settings.runtime, machine)
            rows.append([settings.name, study, "no" if missing else "yes", reason])
    able = not any(verdicts[judged].values())
    last = f"This machine {'can' if able else 'cannot'} run the profile '{judged}'."
    return "\n\n".join([_facts(machine), aligned(rows, widest=90), last]), 0 if able else 1


def judge(profile: config.Profile, machine: Machine) -> dict[str, list[str]]:
    """For each study of a profile, what keeps it from running on `machine`."""
    return {
        study: _here(machine) + _needs(profile.runtime, getattr(profile, study).subjects, machine)
        for study in config.STUDIES
    }


def _here(machine: Machine) -> list[str]:
    """What any study needs."""
    missing = []
    if machine.python < (3, 11):
        missing.append("Python 3.11 or newer")
    if machine.absent:
        missing.append(f"packages {', '.join(machine.absent)}: run `make setup`")
    if not machine.writable:
        missing.append("a repository folder that can be written")
    if machine.disk < _RESULTS_DISK:
        missing.append(f"{_RESULTS_DISK:g} GB of free disk ({machine.disk:.1f} are free)")
    return missing


def _needs(runtime: config.Runtime, names: Sequence[str], machine: Machine) -> list[str]:
    subjects = [catalogue.get(name) for name in names]
    missing = [machine.world[s.model] for s in subjects if s.embedded and s.model in machine.world]
    weights = max((s.parameters or 0) * _BYTES.get(runtime.dtype, 4) for s in subjects) / GB * _OVERHEAD
    if runtime.device.startswith("cuda"):
        missing += _gpu(weights + _WORKING_MEMORY, machine)
    elif weights + _WORKING_MEMORY > machine.memory:
        missing.append(f"{weights + _WORKING_MEMORY:.0f} GB of memory at least ({machine.memory:.0f} here)")
    return missing + _from_hub(runtime, [s for s in subjects if not s.embedded], machine)


def _gpu(needed: float, machine: Machine) -> list[str]:
    if not machine.gpus:
        return [f"an NVIDIA GPU with {needed:.0f} GB at least"]
    missing = []
    best = max(machine.gpus.values())
    if best < needed:
        missing.append(f"a GPU with {needed:.0f} GB at least ({best:.0f} here)")
    if machine.torch and machine.torch.endswith("+cpu"):
        missing.append(f"torch with CUDA (installed: {machine.torch})")
    return missing


def _from_hub(runtime: config.Runtime, subjects: list[catalogue.Subject], machine: Machine) -> list[str]:
    if not subjects:
        return []
    if not runtime.hub:
        return [f"`hub: true` in params.yaml, since {subjects[0].name} comes from the hub"]
    missing = []
    away = [s for s in subjects if s.model not in machine.cached]
    if away and machine.hub:
        missing.append(machine.hub)
    gated = sorted({s.model for s in away if s.gated})
    if gated and not machine.token:
        missing.append(f"a token for {', '.join(gated)}: accept the licence there, then `hf auth login`")
    missing += [f"access to {model} ({machine.refused[model]})" for model in gated if model in machine.refused]
    models = {s.model: (s.parameters or 0) * 4 / GB for s in away}  # checkpoints in float32 are the largest
    if sum(models.values()) > machine.cache_disk:
        missing.append(f"{sum(models.values()):.0f} GB of disk for downloads ({machine.cache_disk:.0f} are free)")
    return missing


def _caveat(runtime: config.Runtime, machine: Machine) -> str:
    wanted = runtime.threads * (runtime.n_jobs if isinstance(runtime.n_jobs, int) else 1)
    return f"slower: {machine.cores} of {wanted} cores" if machine.cores < wanted else ""


def examine(profiles: Sequence[config.Profile]) -> Machine:
    """Look at this machine; the hub is asked only if one of `profiles` would download something."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache
    from psutil import virtual_memory

    named = {name for p in profiles for study in config.STUDIES for name in getattr(p, study).subjects}
    away = [s for s in map(catalogue.get, sorted(named)) if not s.embedded]
    cached = frozenset(s.model for s in away if isinstance(try_to_load_from_cache(s.model, "config.json"), str))
    away = [s for s in away if s.model not in cached]
    hub = hub_problem(constants.ENDPOINT, constants.HF_HUB_OFFLINE) if away else None
    token = get_token()
    absent, differing = packages()
    return Machine(
        python=sys.version_info[:3],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=virtual_memory().total / GB,
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
        refused=_refused(sorted({s.model for s in away if s.gated}), token) if token and not hub else {},
        cached=cached,
    )


def packages() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Packages that pyproject.toml asks for and that are absent, and installed ones that differ from their pins."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    asked = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    absent = tuple(name for name in (Requirement(line).name for line in asked) if _version(name) is None)
    pinned = dict(line.split("==") for line in paths.CONSTRAINTS.read_text().split() if "==" in line)
    found = {name: _version(name) for name in pinned}
    differing = tuple(
        f"{name} {here} (pinned {pinned[name]})"
        for name, here in found.items()
        if here and Version(here).public != Version(pinned[name]).public
    )
    return absent, differing


def world_problems(root: Path = paths.EMBEDDED) -> dict[str, str]:
    """What is wrong with each specimen: a missing piece, or the file that does not match its checksum."""
    from sae_research.world import build

    problems = {}
    for specimen in build.SPECIMENS:
        try:
            for piece in ("model", "saes"):
                store.verified(root / specimen / piece)
        except ResearchError as error:
            problems[specimen] = str(error).rstrip(".")
    return problems


def hub_problem(endpoint: str, offline: bool = False, timeout: float = 4.0) -> str | None:
    """Why nothing can be downloaded from the hub, if so."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    host = re.sub(r"^https?://", "", endpoint)
    if offline:
        return "the network (HF_HUB_OFFLINE is set)"
    try:
        urlopen(Request(f"{endpoint}/gpt2/resolve/main/config.json", method="HEAD"), timeout=timeout).close()
    except HTTPError as error:
        return f"the hub ({host} answers {error.code})"
    except (OSError, ValueError):
        return f"the network ({host} does not answer)"
    return None


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
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return {f"{index}: {name}": float(mb) / 1024 for index, name, mb in lines if mb.replace(".", "").isdigit()}


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
    complaint = done.stderr.strip().splitlines()
    return f"DVC says: {complaint[-1]}" if complaint else "some stages are to be run; `make reproduce` runs them"


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


def _facts(machine: Machine) -> str:
    gpus = ", ".join(f"{name.split(': ')[1]} {memory:.0f} GB" for name, memory in machine.gpus.items())
    if machine.absent:
        versions = f"missing: {', '.join(machine.absent)}"
    elif machine.differing:
        shown = ", ".join(machine.differing[:6]) + (", ..." if len(machine.differing) > 6 else "")
        versions = f"{len(machine.differing)} differ from constraints.txt, so results may too: {shown}"
    else:
        versions = f"as pinned in constraints.txt (torch {machine.torch})"
    facts = [
        ["Python", f"{'.'.join(map(str, machine.python))} on {platform.system()} {platform.machine()}"],
        ["packages", versions],
        ["cores", str(machine.cores)],
        ["memory", f"{machine.memory:.0f} GB"],
        ["disk", f"{machine.disk:.0f} GB free here, {machine.cache_disk:.0f} GB where models are kept"],
        ["GPU", gpus or "none"],
        ["hub token", "present" if machine.token else "none (only gated models need one)"],
        ["embedded world", f"not usable: {', '.join(machine.world)}" if machine.world else "intact"],
        ["pipeline", machine.pipeline],
    ]
    return aligned(facts, header=False)
