"""The chain of a profile: DVC runs what is missing or changed, then results are compared."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from sae_research import claims, comparison, config, ledger, notebooks, paths, stages, store
from sae_research.errors import ResearchError

STATE = paths.ROOT / ".reproduce"
LOCK = paths.ROOT / "dvc.lock"
_MARKER = STATE / "state.json"
WORLD = "world"
_ASK = (
    "build the toy models anew with `dvc repro world` (an hour on two cores), or keep them as they "
    "are with `dvc commit --force world`; then run again."
)


def _git(*words: str) -> bytes | None:
    """What git says about this folder's own repository; nothing without git."""
    command = ["git", "-C", str(paths.ROOT), *words]
    try:
        found = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout if found.returncode == 0 else None


def has_git() -> bool:
    """Whether this folder is a git checkout; a folder unpacked from a zip is not."""
    top = _git("rev-parse", "--show-toplevel")
    return top is not None and Path(top.decode().strip()).resolve() == paths.ROOT


# the profile that DVC sees


def _profile_lock(profile: str) -> Path:
    return paths.DATA / profile / "dvc.lock"


def _read_lock(path: Path) -> dict | None:
    """The stages of a lock file; nothing if it is missing or was cut short."""
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import parse_yaml

    try:
        # DVC writes YAML 1.2, in which a setting called `on` is a word and no truth value
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path), typ="safe")
    except (OSError, ValueError, RecursionError, DvcException):
        return None
    stages = content.get("stages") if isinstance(content, dict) else None
    return stages if isinstance(stages, dict) else None


def _write_lock(world: dict | None, stages: dict) -> None:
    """Write a profile's stages after that of the toy models, which all profiles share."""
    import yaml

    others = {name: stage for name, stage in stages.items() if name != WORLD}
    content = {"schema": "2.0", "stages": {WORLD: world, **others} if world else others}
    store.write_text(LOCK, yaml.safe_dump(content, sort_keys=False, width=10_000))


def _set_profile(profile: str) -> None:
    before = paths.PARAMS.read_text(encoding="utf-8")
    text, found = re.subn(r"(?m)^profile:.*$", f"profile: {profile}", before, count=1)
    if not found:
        raise ResearchError(
            "params.yaml must hold a line `profile: ...`; restore it from the repository."
        )
    store.write_text(paths.PARAMS, text)


def _find_owner(stages: dict) -> str | None:
    """The profile whose stages a lock holds, by their commands; none if it holds none."""
    words = " ".join(str(stage.get("cmd")) for stage in stages.values() if isinstance(stage, dict))
    found = re.search(r"--profile (\S+)", words)
    return found[1] if found else None


def _restore(state: dict) -> None:
    """Put back the profile and the lock that were there before another profile ran.

    After a kill the reader may have put back one or the other: a lock goes to its own profile only.
    """
    stages = _read_lock(LOCK) or {}  # a kill may have cut it short
    owner = _find_owner(stages)
    if owner == state["running"]:
        store.write_bytes(_profile_lock(owner), LOCK.read_bytes())
    if owner in (None, state["running"]):
        kept = STATE / "dvc.lock"
        before = _read_lock(kept) or {}
        world = stages.get(WORLD)
        if kept.exists() and world in (None, before.get(WORLD)):
            store.write_bytes(LOCK, kept.read_bytes())
        else:
            _write_lock(world, before)
    _set_profile(state["before"])
    _MARKER.unlink()


def _read_marker() -> dict | None:
    """What a killed run left to be put back; one that names no profiles is worth nothing."""
    try:
        state = store.read_json(_MARKER) if _MARKER.exists() else {}
    except ResearchError:
        state = {}
    known = config.profiles()
    named = [state.get(key) if isinstance(state, dict) else "" for key in ("before", "running")]
    return state if all(name in known for name in named) else None


@contextmanager
def selected(profile: str) -> Iterator[None]:
    """Make `profile` the one that DVC runs; the former one comes back, even after a kill."""
    if state := _read_marker():
        _restore(state)
    before = config.load().name
    _heal()
    if before == profile:
        yield
        return
    kept = STATE / "dvc.lock"
    if LOCK.exists():
        store.write_bytes(kept, LOCK.read_bytes())
    else:
        kept.unlink(missing_ok=True)
    store.write_json(_MARKER, {"before": before, "running": profile})
    world = (_read_lock(kept) or {}).get(WORLD)
    _write_lock(world, _read_lock(_profile_lock(profile)) or {})
    _set_profile(profile)
    try:
        yield
    finally:
        _restore({"before": before, "running": profile})


def _heal() -> None:
    """Bring back the last whole lock if DVC was killed while it wrote; else keep a copy."""
    good = STATE / "last-good" / LOCK.name
    if _read_lock(LOCK) is not None:
        store.write_bytes(good, LOCK.read_bytes())
    elif LOCK.exists():
        content = good.read_bytes() if good.exists() else _git("show", f"HEAD:{LOCK.name}")
        if content:
            store.write_bytes(LOCK, content)
        else:
            LOCK.unlink()


def _forget_dead_readers() -> None:
    """Remove DVC's list of readers and writers if it is damaged or names dead processes only."""
    import psutil

    path = paths.ROOT / ".dvc" / "tmp" / "rwlock"
    try:
        listed = store.read_json(path) if path.exists() else {}
        writers = list(listed.get("write", {}).values())
        readers = [reader for each in listed.get("read", {}).values() for reader in each]
        named = [reader["pid"] for reader in writers + readers]
        alive = any(psutil.pid_exists(process) and _is_pipeline(process) for process in named)
    except (ResearchError, AttributeError, KeyError, TypeError):
        alive = False
    if not alive:
        path.unlink(missing_ok=True)


def _is_pipeline(process: int) -> bool:
    import psutil

    try:
        command = " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return False
    return "dvc" in command or "sae_research" in command


def _dvc(force: bool) -> int:
    """Run what is missing or changed; returns how many stages ran."""
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    if not has_git() and _git("rev-parse") is None:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        local = paths.ROOT / ".dvc" / "config.local"
        if not local.exists():
            store.write_text(local, "[core]\n    no_scm = true\n")
    import logging

    import psutil

    logging.getLogger("dvc").setLevel(logging.WARNING)
    # in the main thread DVC would be deaf to Ctrl-C until its stage ends
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_run_stages, force)
        try:
            return running.result()
        except KeyboardInterrupt:
            while not running.done():  # between two stages there is none to end yet
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        child.kill()
                time.sleep(0.2)
            raise


def _run_stages(force: bool) -> int:
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.repo import Repo

    try:
        with Repo(str(paths.ROOT)) as repo:
            if not force:
                _refuse_rebuilding(repo.status([WORLD]).get(WORLD, []))
            return len(repo.reproduce(force=force))
    except ReproductionError as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        if re.search(r"exited with (-9|137)\b", cause):
            cause += ", killed from outside, most likely for want of memory"
        raise ResearchError(
            f"the chain stopped: {error}{cause}; finished stages are kept."
        ) from error
    except DvcException as error:
        raise ResearchError(
            f"DVC stopped: {' '.join(str(error).split())}; restore dvc.yaml, dvc.lock "
            "and data/*/dvc.lock from the repository, as far as they were altered."
        ) from error


def _refuse_rebuilding(status: list) -> None:
    """Say why DVC would build the toy models anew: an hour's work is asked for, no side effect."""
    found = (each for each in status if isinstance(each, dict))
    changed = {kind: what for each in found for kind, what in each.items()}
    known = (_read_lock(LOCK) or {}).get(WORLD)
    if not status or not (known or paths.EMBEDDED.exists()):
        return
    if changed.get("changed outs"):
        folders = sorted(path.parent for path in paths.EMBEDDED.rglob(store.CHECKSUMS))
        for folder in folders:
            store.verified(folder)
        for path in filter(Path.is_file, sorted(paths.EMBEDDED.rglob("*"))):
            owned = any(path.is_relative_to(folder) for folder in folders)
            if not owned and not store.LEFT_BEHIND.search(paths.relative(path)):
                raise ResearchError(
                    f"{paths.relative(path)} is no part of the toy models; move it away."
                )
        raise ResearchError(
            f"data/embedded is not what dvc.lock names; `git checkout data/embedded`, or {_ASK}"
        )
    raise ResearchError(
        f"what data/embedded is made from changed ({', '.join(changed.get('changed deps', status))}"
        f"); {_ASK}"
    )


# what was known before


def _results(profile: str) -> list[str]:
    """What a profile publishes: paths of its claims, figures and executed notebooks."""
    ledgers = (paths.DATA / profile).glob("**/claims.json")
    drawn = (paths.ROOT / "figures" / profile).glob("**/*.*")
    executed = paths.executed(profile).glob("*.ipynb")
    return sorted(paths.relative(p) for p in (*ledgers, *drawn, *executed))


def _known(profile: str) -> Path | None:
    """Without git: where results as delivered are kept, copied before the first run."""
    return None if has_git() else STATE / "as-delivered" / profile


def _keep_delivered(profile: str) -> None:
    known = _known(profile)
    if known is not None and not known.exists():
        for name in _results(profile):
            store.write_bytes(known / name, (paths.ROOT / name).read_bytes())
        known.mkdir(parents=True, exist_ok=True)


def compare_with_delivered(profile: str) -> list[str]:
    """One line each for claims, figures and notebooks, against what came with the repository."""
    known = _known(profile)

    def before(name: str) -> bytes | None:
        if known is None:
            return _git("show", f"HEAD:{name}")
        return (known / name).read_bytes() if (known / name).exists() else None

    lines = []
    ends = {"claims": "claims.json", "figures": (".png", ".svg"), "notebooks": ".ipynb"}
    for kind, end in ends.items():
        words = {}
        for name in (name for name in _results(profile) if name.endswith(end)):
            old = before(name)
            words[name] = "nothing to compare to"
            if old is not None:
                words[name] = comparison.compare(name, (paths.ROOT / name).read_bytes(), old)
        counts = Counter(words.values())
        said = [f"{n} {word}" for word, n in counts.items() if word in _UNCHANGED]
        said += [f"{name}: {word}" for name, word in words.items() if word not in _UNCHANGED]
        lines.append(f"{kind}: {'; '.join(said)}")
    return lines


_UNCHANGED = (comparison.SAME, comparison.AGREES, "nothing to compare to")


def report(profile: str) -> str:
    """The last lines of a run: the verdicts, how they compare, and where to look."""
    found = claims.read(profile)
    lines = ["", ledger.text(found), "", *compare_with_delivered(profile)]
    published = paths.DATA / ledger.PUBLISHED / "claims.json"
    if profile != ledger.PUBLISHED and published.exists():
        agree, differ = ledger.agreement(found, claims.read(ledger.PUBLISHED))
        words = f"{agree} of {agree + len(differ)} verdicts agree with the published ones"
        lines.append(f"{words} ({paths.relative(published)})")
        lines += [f"  {i}: {ours} (published: {theirs})" for i, ours, theirs in differ]
    elif profile != ledger.PUBLISHED:
        lines.append("no published verdicts to agree with yet (they come from the profile `full`)")
    executed = paths.relative(paths.executed(profile))
    settings = config.load(profile)
    first = next(n for n in notebooks.names() if not notebooks.is_left_out(n, settings))
    lines += [
        f"read: {executed}/ (start with {first}.ipynb)",
        f"figures: figures/{profile}/",
        f"claims: data/{profile}/claims.json",
    ]
    return "\n".join(lines)


def write_settings(profile: str) -> None:
    """Write the settings in force to `data/<profile>/settings.json`, which stages depend on."""
    store.write_json(paths.DATA / profile / "settings.json", config.as_json(config.load(profile)))


def reproduce(profile: str, force: bool = False) -> str:
    """Bring every result of a profile up to date and return the closing report."""
    config.load(profile)
    claims.load_claims()  # what is wrong with it, or with dvc.yaml, is told before anything runs
    stages.read_outputs(profile)
    STATE.mkdir(exist_ok=True)
    with notebooks.hold_lock(STATE / "lock", "`reproduce`", patience=3):
        _keep_delivered(profile)
        _forget_dead_readers()
        with selected(profile):
            ran = _dvc(force)
    note = "everything was up to date, nothing ran"
    if ran:
        note = f"{ran} stages ran, the others were up to date"
    return f"\n{note}\n{report(profile)}"
