"""The model adapter: one language model behind TransformerLens' bridge, by hub name or local folder.

The bridge runs the Hugging Face model as it is (no compatibility mode), so residuals are the raw ones that SAEs of this
field are trained on, and logits equal Hugging Face's.
"""

import contextlib
import difflib
import functools
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research.errors import ResearchError
from sae_research.paths import relative

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

Edit = Callable[["Tensor"], "Tensor"]
"""Takes the residual [batch, positions, d_model] at a hook and returns the one to go on with."""

_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars, prints and deprecation noise of the model libraries; errors still come through."""
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


def download(repository: str, patterns: tuple[str, ...] = _MODEL_FILES) -> Path:
    """The folder with those files of a hub repository that `patterns` name, fetched unless already on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub import utils as hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if os.environ.get("SAE_RESEARCH_PROGRESS") == "0":
        hub.disable_progress_bars()
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise gated(repository) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ResearchError(
            f"there is no '{repository}' on the hub, and no such folder here; check the name."
        ) from error
    except OSError as error:
        raise unreachable(repository) from error


def gated(repository: str) -> ResearchError:
    """What to do about a repository that asks for a licence; the token itself is never shown."""
    return ResearchError(
        f"{repository} is gated: accept its licence on its page of the Hugging Face hub, then set the environment "
        "variable HF_TOKEN to a token of that account."
    )


def unreachable(repository: str) -> ResearchError:
    """What to do without network."""
    return ResearchError(
        f"{repository} is not on this machine and the hub cannot be reached: no network for the laptop and gpu "
        "profiles; connect and run again, or use the cpu profile, which needs none."
    )


def load_model(
    source: str | Path, *, device: str = "cpu", dtype: str = "float32", name: str | None = None
) -> "LanguageModel":
    """The model `source` (hub name or Hugging Face folder), frozen; `name` is how SAEs refer to it."""
    if device.startswith("cuda") and not _has_gpu():
        raise ResearchError(
            f"device '{device}' is not available here; use the cpu profile or set device to cpu."
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ResearchError(
                f"{relative(folder)} holds no config.json; give a Hugging Face model folder."
            )
        name = name or _folder_name(folder)
    elif isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise ResearchError(
            f"the model folder {relative(folder)} is missing; run `make reproduce` to make it."
        )
    else:
        name = name or canonical_name(str(source))
        folder = download(canonical_name(str(source)))
    import torch

    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge = TransformerBridge.boot_transformers(
                str(folder.resolve()),
                device=device,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
            )
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise ResearchError(
                f"the model '{name}' cannot be loaded ({str(error).splitlines()[0]}); its files may be incomplete: "
                "delete and fetch or make them again."
            ) from error
    return LanguageModel(bridge, name)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _folder_name(folder: Path) -> str:
    """`world-text` for a specimen's folder text/model, else the folder's own name."""
    folder = folder.resolve()
    return f"world-{folder.parent.name}" if folder.name == "model" else folder.name


class _Reached(Exception):
    """Ends a forward pass once the wanted residual is known."""


class LanguageModel:
    """A frozen language model: tokens in; residuals, logits and losses out, with edits of the residual on the way."""

    def __init__(self, bridge, name: str):
        self.bridge = bridge.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = bridge.tokenizer
        self.n_layers = bridge.cfg.n_layers
        self.d_model = bridge.cfg.d_model
        self.n_ctx = bridge.cfg.n_ctx
        self.d_vocab = bridge.cfg.d_vocab
        self.device = str(bridge.cfg.device)
        self.hooks = frozenset(bridge.hook_dict)
        names = self.tokenizer
        self.bos = names.bos_token_id if names.bos_token_id is not None else names.eos_token_id
        self.eos = names.eos_token_id if names.eos_token_id is not None else self.bos
        self.pad = names.pad_token_id if names.pad_token_id is not None else self.eos

    def __repr__(self) -> str:
        return f"LanguageModel({self.name}: {self.n_layers} blocks, d_model {self.d_model}, on {self.device})"

    # tokens

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise ResearchError("give a list of texts, not one text.")
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def tokens(
        self, texts: list[str], length: int | None = None, prepend_bos: bool = True
    ) -> "LongTensor":
        """One row a text: BOS, its tokens, cut at `length`, padded on the right to the longest row."""
        import torch

        rows = [([self.bos] if prepend_bos else []) + ids for ids in self._ids(texts)]
        rows = [row[:length] for row in rows]
        longest = max(map(len, rows), default=0)
        self._fits(longest)
        padded = [row + [self.pad] * ((length or longest) - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device)

    def packed(self, texts: list[str], length: int) -> "LongTensor":
        """The texts as one stream, each closed by EOS, in rows of BOS and `length` - 1 tokens; the end is dropped."""
        import torch

        self._fits(length)
        stream = [i for ids in self._ids(texts) for i in [*ids, self.eos]]
        body = length - 1
        rows = [[self.bos, *stream[i : i + body]] for i in range(0, len(stream) - body + 1, body)]
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), length)

    def content(self, tokens: "LongTensor") -> "Tensor":
        """Mask of the positions that carry text: neither a leading BOS nor padding at the end of a row."""
        mask = (tokens != self.pad).flip(-1).cumsum(-1).flip(-1) > 0
        mask[:, 0] &= tokens[:, 0] != self.bos
        return mask

    def _fits(self, length: int) -> None:
        if length > self.n_ctx:
            raise ResearchError(
                f"a text of {length} tokens is longer than the context of {self.name} ({self.n_ctx}); "
                "cut it with `length`."
            )

    # hooks

    def hook(self, name: str) -> str:
        """The bridge's own name of a hook; each place of the residual stream has one name, whatever it is called."""
        place = re.fullmatch(
            r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in|hook_resid_post|hook_out)", name
        )
        if place and int(place[1]) < self.n_layers:
            above = int(place[1]) + (name.endswith(("_post", "_out")))
            return f"blocks.{above - 1}.hook_out" if above else "blocks.0.hook_in"
        if not place and name in self.hooks:
            return self.bridge.hook_dict[name].name
        near = difflib.get_close_matches(name, sorted(self.hooks), n=1, cutoff=0)
        raise ResearchError(
            f"{self.name} ({self.n_layers} blocks) has no hook '{name}'; the nearest valid name is '{near[0]}'."
        )

    def depth(self, hook: str) -> int:
        """How many blocks lie below a place of the residual stream: the block to go on with after an edit there."""
        place = re.fullmatch(r"blocks\.(\d+)\.hook_(in|out)", self.hook(hook))
        if not place:
            raise ResearchError(
                f"'{hook}' is no place of the residual stream; use blocks.N.hook_resid_pre or _post."
            )
        return int(place[1]) + (place[2] == "out")

    def _run(self, tokens: "LongTensor", edits: dict[str, Edit]) -> "Tensor":
        self._fits(tokens.shape[-1])
        hooks = [
            (self.hook(name), lambda value, hook, edit=edit: edit(value))
            for name, edit in edits.items()
        ]
        return self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks)

    # passes

    def residual(
        self, tokens: "LongTensor", hook: str, edits: dict[str, Edit] | None = None
    ) -> "Tensor":
        """Activations [batch, positions, d] at a hook; nothing above the hook is computed."""
        import torch

        found = []

        def stop(value: "Tensor") -> None:
            found.append(value)
            raise _Reached

        edits = {self.hook(name): edit for name, edit in (edits or {}).items()}
        before = edits.pop(self.hook(hook), lambda value: value)
        with torch.no_grad(), contextlib.suppress(_Reached):
            self._run(tokens, {**edits, hook: lambda value: stop(before(value))})
        if not found:
            raise ResearchError(
                f"{self.name} does not compute '{hook}' in its forward pass; choose another hook."
            )
        return found[0]

    def logits(self, tokens: "LongTensor", edits: dict[str, Edit] | None = None) -> "Tensor":
        """Next-token logits [batch, positions, vocabulary] in float32; gradients flow if an edit carries them."""
        return self._run(tokens, edits or {}).float()

    def losses(self, tokens: "LongTensor", edits: dict[str, Edit] | None = None) -> "Tensor":
        """Cross-entropy in nats of each next token [batch, positions - 1]."""
        from torch.nn.functional import cross_entropy

        logits = self.logits(tokens, edits)[:, :-1]
        return cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
        )

    def generate(
        self,
        tokens: "LongTensor",
        n: int,
        edits: dict[str, Edit] | None = None,
        greedy: bool = True,
        seed: int | None = None,
    ) -> "LongTensor":
        """`tokens` followed by `n` new ones, greedy or sampled; each step reruns the whole row, edits included."""
        import torch

        self._fits(tokens.shape[-1] + n)
        tokens = tokens.to(self.device)
        random = torch.Generator().manual_seed(seed if seed is not None else 0)
        with torch.no_grad():
            for _ in range(n):
                last = self.logits(tokens, edits)[:, -1]
                if greedy:
                    new = last.argmax(-1, keepdim=True)
                else:
                    new = torch.multinomial(last.softmax(-1).cpu(), 1, generator=random).to(
                        self.device
                    )
                tokens = torch.cat([tokens, new], dim=1)
        return tokens
