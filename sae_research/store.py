"""Artefacts on disk: written whole or not at all, and checked before they are read.

An artefact is a folder. `writing` fills a temporary sibling, adds `checksums.json` and renames
it into place; `verified` recomputes the checksums and names the file that does not match.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from psutil import pid_exists

from sae_research.errors import ResearchError
from sae_research.paths import relative

if TYPE_CHECKING:
    import torch

CHECKSUMS = "checksums.json"
LEFT_BEHIND = re.compile(r"(^|/)\.|~$")
"""Names of what editors and file managers leave in a folder."""
_PARTIAL = ".partial-"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the system says where nothing more can be written."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings: object) -> str:
    """Short hash of settings (dataclasses, dicts, sets, paths, ...), alike in all processes."""
    text = json.dumps(settings, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, PurePath):
        return value.as_posix()
    # an object's text may differ between processes, and that of a long array lacks its middle
    raise TypeError(
        f"{type(value).__name__} has no stable fingerprint; pass settings, names and checksums only"
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)


def _explain(reason: str, path: Path) -> ResearchError:
    return ResearchError(
        f"cannot write {relative(path)}: {reason}; free disk space or make the folder writable, "
        "then run the same command again (finished work is kept)."
    )


def _partial(path: Path) -> Path:
    """This process's temporary sibling of `path`; those that killed processes left are removed."""
    for stale in path.parent.glob(f"{_PARTIAL}*"):
        match = re.fullmatch(rf"{re.escape(_PARTIAL + path.name)}\.(\d+)", stale.name)
        if match and (int(match[1]) == os.getpid() or not pid_exists(int(match[1]))):
            _remove(stale)
    return path.with_name(f"{_PARTIAL}{path.name}.{os.getpid()}")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _replaced(folder: Path) -> Path:
    """Where the old artefact waits while the new one takes its place."""
    return folder.with_name(f"{_PARTIAL}{folder.name}.old")


def _recover(folder: Path) -> None:
    """Put the old artefact back if a writer was killed between the two renames."""
    with suppress(OSError):
        if not folder.exists():
            _replaced(folder).rename(folder)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `folder`, on failure nothing changes."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        partial = _partial(folder)
        partial.mkdir()
    except OSError as error:
        raise _explain(error.strerror or str(error), folder) from error
    try:
        yield partial
        sums = {p.relative_to(partial).as_posix(): sha256(p) for p in _files(partial)}
        (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")
        _replace(partial, folder)
    except OSError as error:
        # the block may also read files or the network: only failed writing is explained here
        if error.errno in FULL or str(error.filename or "").startswith(str(partial)):
            raise _explain(error.strerror or str(error), folder) from error
        raise
    except Exception as error:
        # how safetensors hands the system's error on
        code = re.search(r"os error (\d+)", str(error))
        if code and int(code[1]) in FULL:
            raise _explain(os.strerror(int(code[1])), folder) from error
        raise
    finally:
        _remove(partial)


def _replace(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = _replaced(folder)
    _remove(old)
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        _recover(folder)
        raise
    _remove(old)


def install(new: Path, place: Path) -> None:
    """Put a copy of a file or folder in place of what was there, at once."""
    if new.is_file():
        write_bytes(place, new.read_bytes())
        return
    partial = _partial(place)
    try:
        _recover(place)
        partial.mkdir(parents=True)
        for path in new.rglob("*"):  # shutil.copytree hides the system's reason in a list
            target = partial / path.relative_to(new)
            target.mkdir() if path.is_dir() else shutil.copyfile(path, target)
        _replace(partial, place)
    except OSError as error:
        raise _explain(error.strerror or str(error), place) from error
    finally:
        _remove(partial)


def verified(folder: Path, remedy: str = "run `make reproduce` to make it.") -> Path:
    """Return `folder` after checking every checksum; name the first file that does not match."""
    folder = Path(folder)
    _recover(folder)
    if not (folder / CHECKSUMS).is_file():
        raise ResearchError(f"{relative(folder)} is missing or incomplete; {remedy}")
    again = f"delete {relative(folder)} and run again."
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or not sums:
        raise ResearchError(f"{relative(folder / CHECKSUMS)} is damaged; {again}")
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in sums and not LEFT_BEHIND.search(name):
            raise ResearchError(f"{relative(path)} is no part of {relative(folder)}; move it away.")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise ResearchError(f"{relative(path)} is missing; restore it or {again}")
        if sha256(path) != expected:
            raise ResearchError(
                f"{relative(path)} does not match its checksum (truncated or altered); "
                f"restore it or {again}"
            )
    return folder


def resumed(folder: Path, key: object, build: Callable[[Path], None]) -> Path:
    """The artefact `folder` made with settings `key`; if it is not there, `build` fills it."""
    mark = fingerprint(key).encode()
    _recover(folder)
    known = (folder / CHECKSUMS).is_file() and (folder / "key").is_file()
    if known and (folder / "key").read_bytes() == mark:
        return verified(folder)
    with writing(folder) as partial:
        build(partial)
        (partial / "key").write_bytes(mark)
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once: a reader sees the old text or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader sees the old bytes or the new ones."""
    path = Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        if partial:
            _remove(partial)
        raise _explain(error.strerror or str(error), path) from error


def write_json(path: Path, value: object) -> None:
    """Write JSON with stable bytes: sorted keys, floats as given, final newline."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """Read JSON, or say which file is missing or damaged."""
    with _explaining(path, ValueError, RecursionError):
        return json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def _explaining(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Say what to do when a file that is read is missing or damaged."""
    try:
        yield
    except FileNotFoundError as error:
        message = f"{relative(path)} is missing; run `make reproduce` to make it."
        raise ResearchError(message) from error
    except damage as error:
        message = f"{relative(path)} is damaged; delete it and run `make reproduce`."
        raise ResearchError(message) from error


def rounded(value: object, digits: int = 6) -> object:
    """Numbers at any depth to significant digits, so that another processor writes the same bytes.

    What is below 1e-12 in size is rounding noise and becomes zero.
    """
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return 0.0 if abs(value) < 1e-12 else float(f"{value:.{digits}g}")
    return value


def tensor_fingerprint(tensors: "dict[str, torch.Tensor]") -> str:
    """Short hash of named tensors: the same wherever they are stored or loaded."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().contiguous().cpu()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Save tensors at once; metadata goes under one key, since the order of several is not kept."""
    from safetensors.torch import save

    about = {"about": json.dumps(metadata, sort_keys=True)} if metadata else None
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata=about))


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Load tensors from safetensors, or say which file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with _explaining(path, SafetensorError):
        return load_file(path)
