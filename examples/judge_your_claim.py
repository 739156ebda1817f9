"""State a claim with its control, and have it judged by the rules of this repository.

The claim here: adding a latent's decoder row moves the next token more than a random direction of
the same length does.
"""

import argparse
import sys

import sae_research as sr
from sae_research import claim_rules, claims, stats

CLAIM = {
    "id": "mine.latents",
    "statement": "A latent's direction moves the next token more than a random one.",
    "measure": "log KL to the unsteered next token, latent minus random direction",
    "rule": {
        "expect": "above",
        "threshold": 0,
        # a random direction in place of the latent; the verdict reads the difference
        "control": {"name": "one random direction minus another"},
    },
    "unit": "latents of one SAE",
    "family": "latents",
}


def measure_log_kl(model, tokens, hook, directions) -> "list[float]":
    """Log of the mean KL(unsteered || steered) at the last token, one number per direction."""
    import torch

    from sae_research.steering import add_direction

    with torch.no_grad():
        base = model.logits(tokens)[:, -1].log_softmax(-1)
        found = []
        for direction in directions:
            edit = add_direction(direction, 1.0, "last")
            new = model.logits(tokens, {hook: edit})[:, -1].log_softmax(-1)
            found.append(float((base.exp() * (base - new)).sum(-1).mean().clamp(min=1e-9).log()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="world-text")
    parser.add_argument("--sae", nargs="+", default=["world-text", "block1_topk"])
    parser.add_argument("--quick", action="store_true", help="few latents")
    given = parser.parse_args()

    import torch

    from sae_research.saes import check_fit
    from sae_research.steering import directions

    claim = claim_rules.parse("mine", CLAIM)  # stated before anything is measured
    model = sr.load_model(given.model)
    sae = sr.load_sae(*given.sae, model=model)
    hook = check_fit(model, sae)
    rows = directions(sae)
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(rows), generator=random)[: 20 if given.quick else 100]
    length = model.residual(model.sample, hook)[:, 1:].norm(dim=-1).mean() * 0.3

    def scale(directions: torch.Tensor) -> torch.Tensor:
        return length * directions / directions.norm(dim=-1, keepdim=True)

    steered = scale(rows[chosen])
    placebo = [scale(torch.randn(steered.shape, generator=random)) for _ in range(2)]
    kl = [measure_log_kl(model, model.sample, hook, each) for each in (steered, *placebo)]
    latents = [a - b for a, b in zip(kl[0], kl[1], strict=True)]
    random_twice = [a - b for a, b in zip(kl[2], kl[1], strict=True)]
    measurement = claims.Measurement.of(
        stats.cluster_bootstrap(latents, seed=0, draws=2000),
        control=stats.cluster_bootstrap(random_twice, seed=0, draws=2000),
        difference=stats.paired_bootstrap(latents, random_twice, seed=0, draws=2000),
    )
    print(claim.statement)
    for what in ("value", "control", "difference"):
        found = measurement if what == "value" else getattr(measurement, what)
        print(f"{what}: {found.value:.3g} [{found.low:.3g}, {found.high:.3g}]")
    print("verdict:", claims.judge(claim, measurement))


if __name__ == "__main__":
    try:
        main()
    except sr.ResearchError as error:
        sys.exit(str(error))
