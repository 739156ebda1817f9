"""The shift: what is added to latent activations, one vector per group, Delta_g = Delta_0 + U c_g.

x' = x + W_dec^T (f' - f) with f = enc(x): the part of x that the dictionary does not explain
stays, so a zero shift is exactly the frozen model. Only the `literal` edit of the abstract
drops it (section 3.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_research import store
from sae_research.errors import ResearchError, unknown

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_research.models import Edit, LanguageModel
    from sae_research.studies.opinion_qa.settings import ShiftTraining
    from sae_research.surveys.survey import Question, Survey

EDITS = ("additive", "multiplicative", "gated", "literal")
_WEIGHTS = "shifts.safetensors"
_CARDS = "cards.json"


@dataclass(frozen=True)
class Basis:
    """Coordinates of the residual stream and the row of residual space that each of them writes."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    """f = enc(x), [..., d] to [..., M]."""
    decoder: torch.Tensor
    """W_dec, [M, d]."""
    offset: torch.Tensor | None = None
    """b of x_hat = W_dec^T f + b; only the literal edit reads it."""
    signed: bool = False
    """Whether codes may be negative; where not, the additive edit keeps them at or above zero."""

    @property
    def size(self) -> int:
        """M, the number of coordinates."""
        return len(self.decoder)

    def reconstruct(self, acts: torch.Tensor) -> torch.Tensor:
        """x_hat = W_dec^T f + b."""
        found = acts @ self.decoder
        return found if self.offset is None else found + self.offset


def sae_basis(sae: "SAE") -> Basis:
    """The latents of an SAE, with rows as `decode` applies them to its codes."""
    from sae_research.steering import directions

    with torch.no_grad():
        rows = directions(sae).float()
        nothing = torch.zeros(1, len(rows), device=rows.device, dtype=sae.dtype)
        offset = sae.decode(nothing)[0].float()

    @torch.no_grad()
    def encode(x: torch.Tensor) -> torch.Tensor:
        return sae.encode(x.to(sae.dtype)).float()

    return Basis(encode, rows, offset)


def random_basis(residuals: torch.Tensor, size: int, l0: float, seed: int) -> Basis:
    """As many random unit rows as the SAE has latents; on every token as many active as its L0."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, residuals.shape[-1], generator=random).to(residuals)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    mean = residuals.mean(0)
    k = max(1, round(l0))

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = (x - mean) @ rows.T
        largest = found.topk(k, dim=-1)
        return torch.zeros_like(found).scatter(-1, largest.indices, largest.values.clamp(min=0))

    return Basis(encode, rows, mean)


def pca_basis(residuals: torch.Tensor) -> Basis:
    """Principal components, each split by sign into two non-negative codes: error-free."""
    mean = residuals.mean(0)
    components = torch.linalg.svd(residuals - mean, full_matrices=False).Vh
    rows = torch.cat([components, -components])
    return Basis(lambda x: torch.relu((x - mean) @ rows.T), rows, mean)


def token_basis(residuals: torch.Tensor, tokens: torch.Tensor) -> Basis:
    """A vector for every token of the survey: all that gating by token can do without an SAE.

    Which token a residual belongs to is read off it: the nearest of the tokens' means.
    """
    names, which = tokens.unique(return_inverse=True)
    width = residuals.shape[-1]
    sums = torch.zeros(len(names), width).to(residuals).index_add_(0, which, residuals)
    means = sums / which.bincount()[:, None]

    def encode(x: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(x.flatten(0, -2), means).argmin(-1)
        hot = torch.nn.functional.one_hot(near, len(names)).to(x)
        return hot.repeat_interleave(width, -1).unflatten(0, x.shape[:-1])

    return Basis(encode, torch.eye(width).to(residuals).repeat(len(names), 1))


def residual_basis(width: int, device: str = "cpu") -> Basis:
    """The residual's own coordinates: an additive shift here is a dense steering vector."""
    return Basis(lambda x: x, torch.eye(width, device=device), signed=True)


def compute_displacement(
    basis: Basis, kind: str, x: torch.Tensor, acts: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """x' - x, [rows, shifts, positions, d], of residuals [rows, positions, d] under shifts.

    additive f' = relu(f + Delta), multiplicative f' = f exp(Delta), gated f' = f + 1[f > 0]
    Delta, and literal x' = W_dec^T (f + Delta) + b. The second and third are linear in f, so
    each shift of [shifts, M] becomes one matrix [M, d].
    """
    delta = delta.to(basis.decoder.device)
    if kind == "multiplicative":
        return torch.einsum("btm,smd->bstd", acts, torch.expm1(delta)[..., None] * basis.decoder)
    if kind == "gated":
        return torch.einsum("btm,smd->bstd", (acts != 0).to(acts), delta[..., None] * basis.decoder)
    if kind == "literal":
        return (basis.reconstruct(acts) - x)[:, None] + (delta @ basis.decoder)[None, :, None]
    if kind != "additive":
        raise unknown("edit", kind, EDITS, "a shift")
    if basis.signed:
        return (delta @ basis.decoder)[None, :, None].expand(len(x), -1, x.shape[1], -1)
    moved = torch.relu(acts[:, None] + delta[None, :, None]) - acts[:, None]
    return moved @ basis.decoder


@dataclass(frozen=True)
class Shift:
    """Trained shifts of all groups: Delta_g = Delta_0 + U c_g, with every column of U of norm 1."""

    kind: str
    """One of `EDITS`."""
    hook: str
    """The place of the residual stream."""
    positions: str
    """`answer` (the last token), `question` (the survey block) or `all`; never the start token."""
    groups: tuple[str, ...]
    """Names of the groups."""
    shared: torch.Tensor
    """Delta_0, [M]: the calibration that every group gets."""
    axes: torch.Tensor
    """U, [M, r], columns in order of the variance between groups that they carry."""
    scores: torch.Tensor
    """c, [groups, r]."""

    @property
    def deltas(self) -> torch.Tensor:
        """Delta_g of every group, [groups, M]."""
        return self.shared + self.part

    @property
    def part(self) -> torch.Tensor:
        """U c_g: what tells every group from the others, [groups, M]."""
        return self.scores @ self.axes.T

    @property
    def parameters(self) -> int:
        """Numbers that were trained and are not zero."""
        rows = int((self.axes != 0).any(1).sum())
        shared = int((self.shared != 0).sum())
        rank = self.axes.shape[1]
        if shared and rank < len(self.groups):
            along = self.axes @ torch.linalg.lstsq(self.axes, self.shared[:, None]).solution
            if torch.allclose(along[:, 0], self.shared, atol=1e-4 * float(self.shared.abs().max())):
                shared = rank  # Delta_0 = U c_0
        return shared + rows * rank + self.scores.numel()

    @property
    def active(self) -> torch.Tensor:
        """Which coordinates any group moves, [M]."""
        return (self.shared != 0) | (self.axes != 0).any(1)

    def delta(self, group: str | int, coefficient: float = 1.0) -> torch.Tensor:
        """Delta_0 + coefficient U c_g of one group."""
        if isinstance(group, str):
            if group not in self.groups:
                raise unknown("group", group, self.groups, "this shift")
            group = self.groups.index(group)
        return self.shared + coefficient * self.scores[group] @ self.axes.T

    def only(self, m: int) -> "Shift":
        """The same with a group part on the `m` coordinates alone where it is largest."""
        size = self.part.norm(dim=0)
        kept = torch.zeros_like(size)
        kept[size.topk(min(m, len(size))).indices] = 1
        return replace(self, axes=self.axes * kept[:, None])

    def edit(self, basis: Basis, group: str | int, *, coefficient: float = 1.0) -> "Edit":
        """The edit of one group for `LanguageModel.logits(tokens, {shift.hook: edit})`.

        Tokens must be survey prompts for a shift of `question` tokens: it acts on all but the
        start token of a row. `coefficient` scales the group part.
        """
        delta = self.delta(group, coefficient)[None]

        def apply(residual: torch.Tensor) -> torch.Tensor:
            x = residual.float()
            moved = compute_displacement(basis, self.kind, x, basis.encode(x), delta)[:, 0]
            place = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
            place[: -1 if self.positions == "answer" else 1] = False
            return residual + torch.where(place[:, None], moved, 0.0).to(residual)

        return apply


def canonicalize(shift: Shift, weights: torch.Tensor) -> Shift:
    """The same deltas with orthonormal columns of U, by the variance that each explains."""
    scale = weights.to(shift.scores).sqrt()[:, None]
    basis, triangle = torch.linalg.qr(shift.axes)
    _, _, turned = torch.linalg.svd(scale * (shift.scores @ triangle.T), full_matrices=False)
    axes = basis @ turned.T
    zero = (shift.axes == 0).all(1)
    axes[zero] = 0.0  # rounding must not undo exact zeros
    return replace(shift, axes=axes, scores=shift.scores @ triangle.T @ turned.T)


# saved shifts


@dataclass(frozen=True)
class FittedShift:
    """A trained shift together with the model and the SAE that it steers.

    >>> shift = load_shift("path/to/shift", model, sae)
    >>> shift.answer("Is the tax right?", "red", options=("no", "yes"))
    >>> model.generate("I think", 20, edits=shift.edits("red"))
    """

    shift: Shift
    """The numbers."""
    model: "LanguageModel"
    """The model."""
    sae: "SAE"
    """The SAE whose latents are shifted."""
    template: str = "english"
    """The words in which questions are put, by their name in `prompts.TEMPLATES`."""

    def edits(self, group: str | int, coefficient: float = 1.0) -> "dict[str, Edit]":
        """The edit of one group by hook; `coefficient` scales what tells it from the others."""
        edit = self.shift.edit(sae_basis(self.sae), group, coefficient=coefficient)
        return {self.shift.hook: edit}

    def answer(
        self,
        question: "str | Question",
        group: str | int,
        options: Sequence[str] = (),
        coefficient: float = 1.0,
    ) -> dict[str, float]:
        """Probability of each option, listed in both orders and averaged.

        `question` is a survey's `Question`, or a text with its `options` in ordinal order.
        """
        from sae_research.studies.opinion_qa.prompts import answer_question

        edits = self.edits(group, coefficient)
        return answer_question(self.model, self.template, question, options, edits)


def save_shift(fitted: FittedShift, folder: Path, cards: dict[str, dict] | None = None) -> None:
    """Write a shift, what it fits and a card for each group, whole or not at all."""
    shift = fitted.shift
    fits = {
        "model": fitted.model.name,
        "model_weights": fitted.model.fingerprint,
        "sae": fitted.sae.cfg.metadata.hook_name or shift.hook,
        "sae_weights": _sae_fingerprint(fitted.sae),
        "hook": shift.hook,
        "edit": shift.kind,
        "positions": shift.positions,
        "template": fitted.template,
    }
    groups = [{"name": name, **(cards or {}).get(name, {})} for name in shift.groups]
    with store.writing(Path(folder)) as partial:
        tensors = {"shared": shift.shared, "axes": shift.axes, "scores": shift.scores}
        store.write_tensors(partial / _WEIGHTS, tensors)
        store.write_json(partial / _CARDS, {"fits": fits, "groups": groups})


def read_shift(folder: Path) -> tuple[Shift, dict]:
    """A saved shift, and what it fits."""
    folder = store.verified(Path(folder), "save the shift again with `save_shift`.")
    book = dict(store.read_json(folder / _CARDS))
    fits = book["fits"]
    names = tuple(card["name"] for card in book["groups"])
    tensors = store.read_tensors(folder / _WEIGHTS)
    return Shift(fits["edit"], fits["hook"], fits["positions"], names, **tensors), fits


def load_shift(folder: "Path | str", model: "LanguageModel", sae: "SAE") -> FittedShift:
    """A saved shift for a model and an SAE, both recognised by their weights, not by names."""
    shift, fits = read_shift(Path(folder).expanduser())
    if model.fingerprint != fits["model_weights"]:
        raise ResearchError(
            f"this shift steers '{fits['model']}', and the weights of '{model.name}' are others; "
            "load that model."
        )
    model.hook(shift.hook)
    if sae.cfg.d_sae != len(shift.shared):
        raise ResearchError(
            f"this shift moves {len(shift.shared)} latents but the SAE has {sae.cfg.d_sae}; "
            f"load the SAE at '{fits['sae']}' that it was trained with."
        )
    if _sae_fingerprint(sae) != fits["sae_weights"]:
        raise ResearchError(
            "this SAE has other latents than the one of the shift; load the SAE at "
            f"'{fits['sae']}' that it was trained with."
        )
    return FittedShift(shift, model, sae, fits["template"])


def _sae_fingerprint(sae: "SAE") -> str:
    """A hash of the SAE's weights, the same in every number format that holds bfloat16."""
    weights = sae.state_dict().items()
    return store.tensor_fingerprint({name: w.to(torch.bfloat16) for name, w in weights})


def fit_shift(
    model: "LanguageModel",
    sae: "SAE",
    survey: "Survey",
    texts: "Sequence[str] | None" = None,
    *,
    training: "ShiftTraining | None" = None,
    template: str = "english",
    shrinkage: float = 20.0,
    max_rows_per_forward: int = 48,
    seed: int = 0,
) -> FittedShift:
    """Train a shift for every group of a survey of your own, with your own model and SAE.

    The survey needs a train and a validation split (`survey.split(seed)` makes them). On `texts`,
    by default text that the model writes itself, the shift is kept from changing other behaviour.
    """
    from sae_research.saes import check_fit, warn_if_wrong
    from sae_research.studies.opinion_qa.cache import CachedPrompts
    from sae_research.studies.opinion_qa.experiment import make_targets, split_passages
    from sae_research.studies.opinion_qa.fit import train_shift
    from sae_research.studies.opinion_qa.prompts import find_template
    from sae_research.studies.opinion_qa.settings import ShiftTraining

    for split in ("train", "validation"):
        if not len(survey.rows(split)):
            raise ResearchError(
                f"no question of the survey is in the {split} split; "
                "make splits with `survey.split(seed)`."
            )
    warn_if_wrong(model, sae)
    if survey.counts is None:
        survey = survey.sampled(1000, seed)
    if texts is None:
        third = len(model.sample) // 3
        parts = dict(zip(("train", "validation", "test"), model.sample.split(third), strict=False))
    else:
        parts = split_passages(model, texts, 64)
    write = find_template(template, model.tokenizer).plain
    hook = check_fit(model, sae)
    cache = CachedPrompts(model, hook, survey.questions, write, parts, max_rows_per_forward)
    targets = make_targets(survey, shrinkage)
    shift = train_shift(cache, sae_basis(sae), training or ShiftTraining(), targets, seed)
    return FittedShift(shift, model, sae, template)
