"""One language model behind TransformerLens' bridge, by hub name or local folder.

The bridge runs the Hugging Face model as it is (no compatibility mode), so residuals are the
raw ones that SAEs of this field are trained on, and logits equal Hugging Face's.
"""

import contextlib
import difflib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research import store
from sae_research.errors import ResearchError
from sae_research.hub import canonical_name, download, quiet
from sae_research.paths import relative

if TYPE_CHECKING:
    from sae_lens import SAE

Edit = Callable[[Tensor], Tensor]
"""Takes the residual [batch, positions, d_model] at a hook and returns the one to go on with."""


def load_model(
    source: str | Path, *, device: str = "cpu", dtype: str = "float32", name: str | None = None
) -> "LanguageModel":
    """The model `source` (hub name or Hugging Face folder), frozen; `name` is how SAEs refer to it.

    Residuals and logits of the bridge are compared with those of Hugging Face on a few tokens.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResearchError(
            f"device '{device}' is not available here; use the cpu profile or set device to cpu."
        )
    folder, name = _find(source, name)
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM

        number_format = getattr(torch, dtype)
        try:
            hf_model = AutoModelForCausalLM.from_pretrained(
                str(folder.resolve()),
                dtype=number_format,
                attn_implementation="eager",
                trust_remote_code=False,
            )
            hf_model = hf_model.to(device).eval()
            expected = _hidden_states(hf_model)
            bridge = TransformerBridge.boot_transformers(
                str(folder.resolve()), hf_model=hf_model, device=device, dtype=number_format
            )
        except (OSError, ValueError) as error:
            raise ResearchError(
                f"the model '{name}' cannot be loaded ({str(error).splitlines()[0]}); its files "
                "may be incomplete: delete and fetch or make them again."
            ) from error
    model = LanguageModel(bridge, name)
    _compare_with_hugging_face(model, *expected)
    return model


def _find(source: str | Path, name: str | None) -> tuple[Path, str]:
    """The folder of a model, fetched from the hub if need be, and the name to call it by."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ResearchError(
                f"{relative(folder)} holds no config.json; give a Hugging Face model folder."
            )
        own = folder.resolve()
        # the toy model in text/model is `world-text`
        own_name = f"world-{own.parent.name}" if own.name == "model" else own.name
        return folder, name or own_name
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise ResearchError(
            f"the model folder {relative(folder)} is missing; run `make reproduce` to make it."
        )
    hub_name = canonical_name(str(source))
    return download(hub_name), name or hub_name


def _hidden_states(hf_model) -> tuple[LongTensor, tuple[Tensor, ...], Tensor]:
    """A few tokens with the hidden states and logits that Hugging Face computes for them."""
    size = hf_model.config.get_text_config().vocab_size
    tokens = torch.linspace(0, size - 1, 8, device=hf_model.device).long()[None]
    with torch.no_grad():
        found = hf_model(tokens, output_hidden_states=True)
    return tokens, found.hidden_states, found.logits


def _compare_with_hugging_face(
    model: "LanguageModel", tokens: LongTensor, states: tuple[Tensor, ...], logits: Tensor
) -> None:
    """Refuse a bridge whose residuals or logits are silently wrong."""
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    pairs = {
        f"blocks.{n}.hook_resid_pre": (model.residual(tokens, f"blocks.{n}.hook_resid_pre"), state)
        for n, state in enumerate(states[: model.n_layers])
    }
    with torch.no_grad():
        pairs["the logits"] = (model.logits(tokens), logits)
    for place, (ours, theirs) in pairs.items():
        error = float((ours - theirs).abs().max())
        if not error <= tolerance * max(1.0, float(theirs.abs().max())):
            raise ResearchError(
                f"TransformerLens runs '{model.name}' wrongly: at {place} it differs by "
                f"{error:.2g} from Hugging Face; this architecture cannot be used here."
            )


class _Reached(Exception):
    """Ends a forward pass once the wanted residual is known."""


class LanguageModel:
    """A frozen language model: tokens in; residuals, logits and losses out, edited on the way."""

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
        self._standing: list[tuple[str, Edit]] = []

    def __repr__(self) -> str:
        size = f"{self.n_layers} blocks, d_model {self.d_model}"
        return f"LanguageModel({self.name}: {size}, on {self.device})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the weights as bfloat16: the same for every folder name and number format."""
        weights = enumerate(self.bridge.original_model.parameters())
        return store.tensor_fingerprint({str(i): w.to(torch.bfloat16) for i, w in weights})

    # steering

    def edited(self, edits: dict[str, Edit]) -> contextlib.AbstractContextManager["LanguageModel"]:
        """Inside, every pass goes through these edits of the residual, before any others."""
        own = [(self.hook(name), edit) for name, edit in edits.items()]
        return self._exchange_edits([*self._standing, *own])

    def unedited(self) -> contextlib.AbstractContextManager["LanguageModel"]:
        """Inside, edits of an enclosing `edited` or `steer` do not apply."""
        return self._exchange_edits([])

    @contextlib.contextmanager
    def _exchange_edits(self, edits: list[tuple[str, Edit]]) -> Iterator["LanguageModel"]:
        before = self._standing
        self._standing = edits
        try:
            yield self
        finally:
            self._standing = before

    def steer(
        self, sae: "SAE", latent: int, coefficient: float, positions: str | Tensor = "all"
    ) -> contextlib.AbstractContextManager["LanguageModel"]:
        """Inside, `coefficient` times a latent's decoder direction is added at the SAE's hook."""
        from sae_research import saes, steering

        hook = saes.check_fit(self, sae)
        direction = steering.directions(sae)[saes.check_latents(sae, [latent])[0]]
        return self.edited({hook: steering.add_direction(direction, coefficient, positions)})

    def clamp(
        self, sae: "SAE", latents: list[int], value: float = 0.0, positions: str | Tensor = "all"
    ) -> contextlib.AbstractContextManager["LanguageModel"]:
        """Inside, the latents have this value whatever they were (0 ablates them), and the SAE's
        error stays.
        """
        from sae_research import saes, steering

        hook = saes.check_fit(self, sae)
        change = steering.clamp(saes.check_latents(sae, latents), value)
        return self.edited({hook: steering.edit(sae, change, positions)})

    # tokens

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise ResearchError("give a list of texts, not one text.")
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def tokens(
        self, texts: list[str], length: int | None = None, prepend_bos: bool = True
    ) -> LongTensor:
        """One row a text: BOS and its tokens, cut at `length`, padded on the right."""
        rows = [([self.bos] if prepend_bos else []) + ids for ids in self._ids(texts)]
        rows = [row[:length] for row in rows]
        longest = max(map(len, rows), default=0)
        self._fits(longest)
        padded = [row + [self.pad] * ((length or longest) - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device)

    def packed(self, texts: list[str], length: int) -> LongTensor:
        """The texts as one stream, each closed by EOS, in rows of `length` that begin with BOS."""
        self._fits(length)
        stream = [i for ids in self._ids(texts) for i in [*ids, self.eos]]
        body = length - 1
        rows = [[self.bos, *stream[i : i + body]] for i in range(0, len(stream) - body + 1, body)]
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), length)

    def content(self, tokens: LongTensor) -> Tensor:
        """Mask of the positions that carry text: neither a leading BOS nor padding at the end."""
        mask = (tokens != self.pad).flip(-1).cumsum(-1).flip(-1) > 0
        mask[:, 0] &= tokens[:, 0] != self.bos
        return mask

    def _fits(self, length: int) -> None:
        if length > self.n_ctx:
            raise ResearchError(
                f"a text of {length} tokens is longer than the context of {self.name} "
                f"({self.n_ctx}); cut it with `length`."
            )

    # hooks

    def hook(self, name: str) -> str:
        """The bridge's own name of a hook, one for each place of the residual stream."""
        place = re.fullmatch(
            r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in|hook_resid_post|hook_out)", name
        )
        if place and int(place[1]) < self.n_layers:
            above = int(place[1]) + (name.endswith(("_post", "_out")))
            return f"blocks.{above - 1}.hook_out" if above else "blocks.0.hook_in"
        if not place and name in self.hooks:
            return self.bridge.hook_dict[name].name
        block = re.search(r"(?:^|\.)(?:h|layers?|blocks)\.(\d+)$", name)
        if block and int(block[1]) < self.n_layers:
            raise ResearchError(
                f"{self.name} has no hook '{name}'; the output of that block is "
                f"'blocks.{block[1]}.hook_resid_post', its input "
                f"'blocks.{block[1]}.hook_resid_pre'."
            )
        near = difflib.get_close_matches(name, sorted(self.hooks), n=1, cutoff=0)
        raise ResearchError(
            f"{self.name} ({self.n_layers} blocks) has no hook '{name}'; the nearest valid name "
            f"is '{near[0]}'."
        )

    def depth(self, hook: str) -> int:
        """How many blocks lie below a hook of the residual stream: where to go on after an edit."""
        place = re.fullmatch(r"blocks\.(\d+)\.hook_(in|out)", self.hook(hook))
        if not place:
            raise ResearchError(
                f"'{hook}' is no place of the residual stream; use blocks.N.hook_resid_pre or "
                "_post."
            )
        return int(place[1]) + (place[2] == "out")

    def _run(self, tokens: LongTensor, edits: dict[str, Edit]) -> Tensor:
        self._fits(tokens.shape[-1])
        given = [(self.hook(name), edit) for name, edit in edits.items()]
        hooks = [
            (name, lambda value, hook, edit=edit: edit(value))
            for name, edit in (*self._standing, *given)
        ]
        return self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks)

    # passes

    def residual(
        self, tokens: LongTensor, hook: str, edits: dict[str, Edit] | None = None
    ) -> Tensor:
        """Activations [batch, positions, d] at a hook; nothing above the hook is computed."""
        return self.residuals(tokens, [hook], edits)[0]

    def residuals(
        self, tokens: LongTensor, hooks: list[str], edits: dict[str, Edit] | None = None
    ) -> list[Tensor]:
        """Activations [batch, positions, d] at some hooks, from one pass that ends at the last."""
        own = [self.hook(name) for name in hooks]
        found: dict[str, Tensor] = {}

        def record(name: str, value: Tensor) -> Tensor:
            found[name] = before.get(name, lambda value: value)(value)
            if len(found) == len(set(own)):
                raise _Reached
            return found[name]

        before = {self.hook(name): edit for name, edit in (edits or {}).items()}
        recorders = {name: functools.partial(record, name) for name in own}
        with torch.no_grad(), contextlib.suppress(_Reached):
            self._run(tokens, {**before, **recorders})
        if missing := [name for name in own if name not in found]:
            raise ResearchError(
                f"{self.name} does not compute '{missing[0]}' in its forward pass; choose another "
                "hook."
            )
        return [found[name] for name in own]

    def logits(self, tokens: LongTensor, edits: dict[str, Edit] | None = None) -> Tensor:
        """Next-token logits [batch, positions, vocabulary], float32; edits may carry gradients."""
        return self._run(tokens, edits or {}).float()

    def losses(self, tokens: LongTensor, edits: dict[str, Edit] | None = None) -> Tensor:
        """Cross-entropy in nats of each next token [batch, positions - 1]."""
        from torch.nn.functional import cross_entropy

        logits = self.logits(tokens, edits)[:, :-1]
        return cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:].to(logits.device), reduction="none"
        )

    def generate(
        self,
        prompt: str | LongTensor,
        n: int,
        edits: dict[str, Edit] | None = None,
        greedy: bool = True,
        seed: int | None = None,
    ) -> str | LongTensor:
        """The prompt followed by `n` new tokens, greedy or sampled: text for text, rows for rows.

        Each step reruns the whole row, edits included.
        """
        if isinstance(prompt, str):
            row = self.generate(self.tokens([prompt]), n, edits, greedy, seed)[0]
            return self.tokenizer.decode(row, skip_special_tokens=True)
        self._fits(prompt.shape[-1] + n)
        tokens = prompt.to(self.device)
        random = torch.Generator().manual_seed(seed if seed is not None else 0)
        with torch.no_grad():
            for _ in range(n):
                last = self.logits(tokens, edits)[:, -1]
                if greedy:
                    new = last.argmax(-1, keepdim=True)
                else:
                    drawn = torch.multinomial(last.softmax(-1).cpu(), 1, generator=random)
                    new = drawn.to(self.device)
                tokens = torch.cat([tokens, new], dim=1)
        return tokens

    @functools.cached_property
    def sample(self) -> LongTensor:
        """Rows of 32 tokens that the model itself writes, for checks that need some of its text."""
        start = torch.full((16, 1), self.bos, dtype=torch.long, device=self.device)
        with self.unedited():
            return self.generate(start, min(32, self.n_ctx) - 1, greedy=False, seed=0)
