"""Artefacts on disk: written whole or not at all, and checked against their checksums before they are read.

An artefact is a folder. `writing` fills a temporary sibling, adds `checksums.json` and renames it into place, so a
reader never meets a half-written one; `verified` recomputes the checksums and names the file that does not match.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research.errors import ResearchError
from sae_research.paths import relative

if TYPE_CHECKING:
    import torch

CHECKSUMS = "checksums.json"
_PARTIAL = ".partial-"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings: object) -> str:
    """Short hash of settings (dataclasses, dicts, lists, numbers, strings), the same in every process."""
    plain = asdict(settings) if is_dataclass(settings) else settings
    text = json.dumps(plain, sort_keys=True, default=lambda o: asdict(o) if is_dataclass(o) else str(o))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def _explain(error: OSError, path: Path) -> ResearchError:
    return ResearchError(
        f"cannot write {relative(path)}: {error.strerror or error}; free disk space or make the folder writable, "
        "then run the same command again (finished work is kept)."
    )


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `folder`, on failure nothing changes."""
    folder = Path(folder)
    partial = folder.with_name(f"{_PARTIAL}{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(f"{_PARTIAL}{folder.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        yield partial
        sums = {p.relative_to(partial).as_posix(): sha256(p) for p in _files(partial)}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")
        if folder.exists():
            old = folder.with_name(f"{_PARTIAL}{folder.name}-old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    except OSError as error:
        raise _explain(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verified(folder: Path) -> Path:
    """Return `folder` after checking every file against its checksum; name the first that is missing or altered."""
    folder = Path(folder)
    if not (folder / CHECKSUMS).is_file():
        raise ResearchError(f"{relative(folder)} is missing or incomplete; run `make reproduce` to make it.")
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResearchError(
            f"{relative(folder / CHECKSUMS)} is damaged; delete {relative(folder)} and run again."
        ) from error
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ResearchError(f"{relative(path)} is missing; restore it or delete {relative(folder)} and run again.")
        if sha256(path) != expected:
            raise ResearchError(
                f"{relative(path)} does not match its checksum (truncated or altered); "
                f"restore it or delete {relative(folder)} and run again."
            )
    return folder


def resumed(folder: Path, key: object, build: Callable[[Path], None]) -> Path:
    """Return the artefact `folder` made with settings `key`, building it (into the folder that `build` gets) if needed."""
    mark = fingerprint(key)
    if (folder / CHECKSUMS).is_file() and (folder / "key").is_file() and (folder / "key").read_text() == mark:
        return verified(folder)
    with writing(folder) as partial:
        build(partial)
        (partial / "key").write_text(mark)
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader sees the old bytes or the new ones."""
    path = Path(path)
    partial = path.with_name(f"{_PARTIAL}{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON with stable bytes: sorted keys, floats as given, final newline."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """Read JSON, or say which file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise ResearchError(f"{relative(path)} is missing; run `make reproduce` to make it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResearchError(f"{relative(path)} is damaged; delete it and run `make reproduce`.") from error


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Save tensors as safetensors, at once."""
    from safetensors.torch import save

    write_bytes(path, save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, metadata=metadata))


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Load tensors from safetensors, or say which file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ResearchError(f"{relative(path)} is missing; run `make reproduce` to make it.") from error
    except SafetensorError as error:
        raise ResearchError(f"{relative(path)} is damaged; delete it and run `make reproduce`.") from error
