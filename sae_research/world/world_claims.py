"""From gates to claims: what the ledger says of the world, over all seeds that it was built with."""

from collections.abc import Mapping, Sequence

from sae_research.claims import Measurement
from sae_research.world.checks import Gate

GATES = {
    "world.survey.answer_kl": "answer KL(exact || model)",
    "world.survey.rho_dev": "persona prompt: rho_dev",
    "world.survey.one_direction": "persona as one direction",
    "world.survey.eligible_latents": "latents eligible for screening",
    "world.text.loss_floor": "loss minus floor",
    "world.text.facts_top1": "physics facts top-1",
    "world.text.senses": "sense probe",
    "world.text.request_words": "request words right",
    "world.text.gender_probe": "gender probe",
    "world.text.original_worst": "profession, Original probe, worst group",
    "world.text.oracle_worst": "profession, Oracle probe, worst group",
    "world.text.refusal_harmful": "refusal where planted",
    "world.text.refusal_elsewhere": "refusal elsewhere",
    "world.text.concepts_head": "physics rank 1-5 with a latent",
    "world.text.concepts_general": "general concepts with a latent",
    "world.text.eligible_latents": "latents eligible for screening",
}
"""The gates that a claim of claims.yaml speaks of, by the beginning of their names; the worst of them counts."""

Specimens = Mapping[str, Sequence[Gate]]
"""Gates by specimen."""


def worst(gates: Sequence[Gate], name: str) -> Gate:
    """The gate farthest on the wrong side among those whose name begins with `name`."""
    found = [gate for gate in gates if gate.name.startswith(name)]
    return max(found, key=lambda gate: gate.value if gate.at_most else -gate.value)


def measurements(by_seed: Sequence[Specimens]) -> dict[str, Measurement]:
    """Mean over the seeds of each claim's worst gate, with the range over the seeds."""
    found = {}
    for claim, name in GATES.items():
        values = [worst(gates[claim.split(".")[1]], name).value for gates in by_seed]
        found[claim] = Measurement(sum(values) / len(values), min(values), max(values), len(values))
    return found
