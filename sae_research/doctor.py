"""Whether this machine can run each profile and study, and what is missing."""

import platform
from collections.abc import Sequence

from sae_research import catalogue, config
from sae_research.machine import GB, Machine, examine

_WORKING_MEMORY = 3.0
"""Gigabytes that Python, the libraries and a batch need beside the weights."""
_OVERHEAD = 1.2
"""Weights while they are loaded and wrapped, as a multiple of their size."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_RESULTS_DISK = 2.0
"""Gigabytes that intermediate work and the cache of results need."""


def run(profile: str | None = None) -> tuple[str, int]:
    """A report on every profile (or one), and 0 if the default profile (or that one) can run."""
    from tabulate import tabulate

    judged = config.load(profile).name
    shown = [config.load(name) for name in ([judged] if profile else config.profiles())]
    machine = examine(shown)
    verdicts = {settings.name: judge(settings, machine) for settings in shown}
    rows = []
    for settings in shown:
        for study, missing in verdicts[settings.name].items():
            reason = "; ".join(missing) or _caveat(settings.runtime, machine)
            rows.append([settings.name, study, "no" if missing else "yes", reason])
    able = not any(verdicts[judged].values())
    last = f"This machine {'can' if able else 'cannot'} run the profile '{judged}'."
    head = ["profile", "study", "runs", "what is missing"]
    widths = [None, None, None, 90]
    table = tabulate(rows, head, disable_numparse=True, maxcolwidths=widths)
    return "\n\n".join([_facts(machine), table, last]), 0 if able else 1


def judge(profile: config.Profile, machine: Machine) -> dict[str, list[str]]:
    """For each study of a profile, what keeps it from running on `machine`."""
    found = {}
    for study in config.study_names():
        block = getattr(profile, study)
        if not block.models:  # the profile leaves this study out
            continue
        models = [m for m in block.models if m not in getattr(block, "NOT_MODELS", ())]
        found[study] = _here(machine) + _needs(profile.runtime, models, machine)
        if study in machine.no_data and not all(catalogue.get(m).embedded for m in models):
            found[study].append(f"your data in {machine.no_data[study]} (README says which)")
    return found


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
    specs = [catalogue.get(name) for name in names]
    missing = [machine.world[s.model] for s in specs if s.embedded and s.model in machine.world]
    missing += [machine.wheels[s.name] for s in specs if s.name in machine.wheels]
    each = _BYTES.get(runtime.dtype, 4)
    weights = max(((s.parameters or 0) * each for s in specs), default=0) / GB
    needed = weights * _OVERHEAD + _WORKING_MEMORY
    if runtime.device.startswith("cuda"):
        missing += _gpu(needed, machine)
    elif needed > machine.memory:
        missing.append(f"{needed:.0f} GB of memory at least ({machine.memory:.0f} here)")
    return missing + _from_hub(runtime, [s for s in specs if s.from_hub], machine)


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


def _from_hub(
    runtime: config.Runtime, specs: list[catalogue.ModelSpec], machine: Machine
) -> list[str]:
    if not specs:
        return []
    if not runtime.hub:
        return [f"`hub: true` in params.yaml, since {specs[0].name} comes from the hub"]
    missing = []
    away = [s for s in specs if s.name not in machine.cached]
    if away and machine.hub:
        missing.append(machine.hub)
    gated = sorted({s.model for s in away if s.gated})
    if gated and not machine.token:
        missing.append(
            f"a token for {', '.join(gated)}: accept the licence there, then `hf auth login`"
        )
    refused = {model: machine.refused[model] for model in gated if model in machine.refused}
    missing += [f"access to {model} ({reason})" for model, reason in refused.items()]
    # checkpoints in float32 are the largest
    size = sum({s.model: (s.parameters or 0) * 4 / GB for s in away}.values())
    if size > machine.cache_disk:
        missing.append(f"{size:.0f} GB of disk for downloads ({machine.cache_disk:.0f} are free)")
    return missing


def _caveat(runtime: config.Runtime, machine: Machine) -> str:
    wanted = runtime.threads * (runtime.n_jobs if isinstance(runtime.n_jobs, int) else 1)
    return f"slower: {machine.cores} of {wanted} cores" if machine.cores < wanted else ""


def _facts(machine: Machine) -> str:
    from tabulate import tabulate

    gpus = [f"{name.split(': ')[1]} {memory:.0f} GB" for name, memory in machine.gpus.items()]
    versions = f"as pinned in constraints.txt (torch {machine.torch})"
    if machine.absent:
        versions = f"missing: {', '.join(machine.absent)}"
    elif differing := machine.differing:
        shown = ", ".join(differing[:6]) + (", ..." if len(differing) > 6 else "")
        versions = f"{len(differing)} differ from constraints.txt, so results may too: {shown}"
    python = ".".join(map(str, machine.python))
    free = f"{machine.disk:.0f} GB free here, {machine.cache_disk:.0f} GB where models are kept"
    facts = {
        "Python": f"{python} on {platform.system()} {platform.machine()}",
        "packages": versions,
        "cores": str(machine.cores),
        "memory": f"{machine.memory:.0f} GB",
        "disk": free,
        "GPU": ", ".join(gpus) or "none",
        "hub token": "present" if machine.token else "none (only gated models need one)",
        "toy models": f"not usable: {', '.join(machine.world)}" if machine.world else "intact",
        "pipeline": machine.pipeline,
    }
    return tabulate(facts.items(), tablefmt="plain", disable_numparse=True)
