"""Shifts of latent activations, one vector per group, Delta_g = Delta_0 + U c_g; saved, loaded,
applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_research import store
from sae_research.bases import Basis, compute_displacement, sae_basis
from sae_research.errors import ResearchError, unknown
from sae_research.surveys.prompts import answer_question

if TYPE_CHECKING:
    from sae_lens import SAE

    from sae_research.models import Edit, LanguageModel
    from sae_research.surveys.survey import Question

_WEIGHTS = "shifts.safetensors"
_CARDS = "cards.json"


@dataclass(frozen=True)
class Shift:
    """Trained shifts of all groups: Delta_g = Delta_0 + U c_g, with every column of U of norm 1."""

    kind: str
    """One of `bases.EDITS`."""
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
