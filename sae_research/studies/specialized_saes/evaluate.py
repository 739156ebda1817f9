"""What an SAE costs and finds: loss with the SAE spliced in, and recall of known concepts."""

from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_research.model_tail import ModelTail
from sae_research.retrieval.chunks import Chunks
from sae_research.studies.specialized_saes.grounds import DOMAIN, Ground
from sae_research.world.text import detectors

if TYPE_CHECKING:
    from sae_lens import SAE


class Splicer:
    """Loss of a model on fixed texts with an SAE in the place of the residual.

    The part below the hook runs once for all SAEs. The start token's residual stays as it is.
    """

    def __init__(self, ground: Ground, n_chunks: int):
        self.ground = ground
        self.tail = ModelTail(ground.model, ground.hook)
        self.texts = {name: chunks[:n_chunks] for name, chunks in ground.tests.items()}
        row = ground.model.d_vocab * ground.general.shape[1]
        self.batch = max(1, min(64, 2**25 // row))  # 128 MB of logits
        with torch.no_grad():
            self.residuals = {
                name: [ground.model.residual(rows, ground.hook) for rows in self._rows(chunks)]
                for name, chunks in self.texts.items()
            }

    def _rows(self, chunks: Chunks) -> tuple[Tensor, ...]:
        return chunks.tokens.split(self.batch)

    @torch.no_grad()
    def measure(self, sae: "SAE | None") -> list[dict]:
        """For each text: cross-entropy in nats per token, L0, explained variance.

        Without an SAE, the loss of the model itself.
        """
        found = []
        for name, chunks in self.texts.items():
            sums = dict.fromkeys(("ce", "predicted", "active", "error", "tokens"), 0.0)
            seen = []
            for rows, residual in zip(self._rows(chunks), self.residuals[name], strict=True):
                content = self.ground.model.content(rows) & (rows != self.ground.model.bos)
                if sae is not None:
                    residual, x = self._splice(sae, residual, content, sums)
                    seen.append(x)
                logits = self.tail.logits(self.tail.states(residual))[:, :-1]
                losses = cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
                sums["ce"] += losses[content[:, 1:]].double().sum().item()
                sums["predicted"] += content[:, 1:].sum().item()
            row = {"text": name, "ce": sums["ce"] / sums["predicted"]}
            if sae is not None:
                x = torch.cat(seen)
                total = (x - x.mean(0)).square().sum().item()
                row["l0"] = sums["active"] / sums["tokens"]
                row["explained_variance"] = 1 - sums["error"] / total
            found.append(row)
        return found

    def _splice(
        self, sae: "SAE", residual: Tensor, content: Tensor, sums: dict
    ) -> tuple[Tensor, Tensor]:
        x = residual[content].float() * self.ground.scale
        acts = sae.encode(x)
        rebuilt = sae.decode(acts)
        sums["active"] += (acts > 0).sum().item()
        sums["error"] += (x - rebuilt).square().sum().item()
        sums["tokens"] += len(x)
        spliced = residual.clone()
        spliced[content] = (rebuilt / self.ground.scale).to(residual)
        return spliced, x


def measure_recall(
    ground: Ground, acts: detectors.SparseActivations, found_f1: float
) -> pd.DataFrame:
    """For every known concept its band, the best latent and its F1 on text it was not chosen on."""
    chunks, truth = ground.tests[DOMAIN], ground.truth
    content = ground.content(chunks)
    labels = truth.labels[content]
    half = (torch.arange(len(chunks)) % 2 == 0)[:, None].expand_as(content)[content]
    n = 1 + max(max(ids) for ids in truth.bands.values())
    best = detectors.find_detectors(acts, labels, n, half)
    rows = [
        {"concept": i, "band": band, "latent": int(best.latent[i]), "f1": float(best.f1[i])}
        for band, ids in truth.bands.items()
        for i in ids
    ]
    table = pd.DataFrame(rows).dropna()
    return table.assign(found=table.f1 >= found_f1)
