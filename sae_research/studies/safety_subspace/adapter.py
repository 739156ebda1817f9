"""A residual subspace written into stock peft LoRA factors, on the side where it means something.

A matrix that reads the residual (q, k, v, gate, up) gets the basis as its A, one that writes to it
(o, down) as its B; the other factor is zero, so that nothing changes at the start. Which factor the
paper initialises is unknown.
"""

import copy
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor

from sae_research import models
from sae_research.errors import ResearchError
from sae_research.hub import quiet
from sae_research.studies.safety_subspace.subspace import Bases

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The matrices that get adapters; inferred from the paper's share of parameters at rank 16."""
_PLACE = re.compile(r"layers\.(\d+)\.\w+\.(\w+)$")


def count_parameters(
    config: "PretrainedConfig", rank: int, targets: tuple[str, ...] = ATTENTION
) -> int:
    """Trainable parameters of LoRA on every block, from a model's configuration alone."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    d, inner = config.hidden_size, config.intermediate_size
    q, kv = heads * size, config.num_key_value_heads * size
    shapes = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
    shapes |= {"gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d)}
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in targets)


def lora_config(ranks: Mapping[int, int], targets: tuple[str, ...] = ATTENTION, **given):
    """A stock LoRA configuration with a rank for each block; alpha equals the rank (scaling 1)."""
    from peft import LoraConfig

    pattern = {rf"model\.layers\.{n}\..*": rank for n, rank in ranks.items()}
    rank = max(ranks.values())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=list(targets),
        layers_to_transform=sorted(ranks),
        layers_pattern="layers",
        **given,
    )


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Block, matrix and peft layer of every adapter."""
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            block, name = _PLACE.search(path).groups()
            yield int(block), name, module


def _norm_gain(norm: torch.nn.Module) -> Tensor:
    """What a norm multiplies each dimension by: w in Llama, 1 + w in Gemma."""
    return norm.weight.detach() + ("Gemma" in type(norm).__name__)


def _gain_around(block: torch.nn.Module, name: str) -> Tensor | float:
    """The gain between the residual and a matrix: of the norm before a reader, or after a writer.

    Only Gemma normalises what a block writes.
    """
    gemma = hasattr(block, "pre_feedforward_layernorm")
    attention = name in ATTENTION
    if name in READERS:
        inner = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
        return _norm_gain(block.input_layernorm if attention else inner)
    if gemma:
        after = "post_attention_layernorm" if attention else "post_feedforward_layernorm"
        return _norm_gain(getattr(block, after))
    return 1.0


def make_adapter(
    base: "PreTrainedModel",
    bases: Bases,
    *,
    targets: tuple[str, ...] = ATTENTION,
    fold_norms: bool = True,
    frozen: bool = False,
) -> "PeftModel":
    """LoRA whose factors start in the subspace of each block; `frozen` keeps them there.

    `fold_norms` divides by the gain of the norm between residual and matrix. The root mean square
    that the norm divides by still moves: `measure_out_of_span` says how much that matters.
    """
    from peft import get_peft_model

    unknown = [name for name in targets if name not in READERS + WRITERS]
    if unknown:
        raise ResearchError(f"no side is known for the matrix '{unknown[0]}'; leave it out.")
    ranks = {n: basis.shape[1] for n, basis in bases.items()}
    model = get_peft_model(base, lora_config(ranks, targets))
    blocks = model.base_model.model.model.layers
    for n, name, layer in lora_layers(model):
        gain = _gain_around(blocks[n], name) if fold_norms else 1.0
        write_basis(layer, bases[n], name in READERS, gain, frozen)
    return model


def write_basis(
    layer: torch.nn.Module, basis: Tensor, reads: bool, gain: Tensor | float, frozen: bool = False
) -> None:
    """Put a basis [d, rank] into one factor of a LoRA layer and zero into the other."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rank = a.shape[0]
    if rank > basis.shape[1]:
        raise ResearchError(
            f"an adapter of rank {rank} does not fit a subspace of dimension {basis.shape[1]}; "
            "select more features or lower the rank."
        )
    if not basis.any():
        raise ResearchError(
            "the basis is zero, so both factors of the adapter would be zero and never learn; "
            "build it from features."
        )
    rows = basis[:, :rank].to(a.device).T / gain
    fixed, other = (a, b) if reads else (b, a)
    with torch.no_grad():
        fixed.copy_(rows if reads else rows.T)
        other.zero_()
    fixed.requires_grad_(not frozen)


def part_in_span(block: torch.nn.Module, name: str, weight: Tensor, basis: Tensor) -> Tensor:
    """The part of a matrix's update, or of the factor that faces the residual, that reads from or
    writes to a subspace; gains of the norms in between count.
    """
    reads = name in READERS
    gain = _gain_around(block, name)
    rows = (weight if reads else weight.T) * gain
    part = rows @ basis @ basis.T / gain
    return part if reads else part.T


def penalty(model: "PeftModel", bases: Bases) -> Tensor:
    """Squared size of what lies outside the subspace in the factors that face the residual: ours, a
    soft form of freezing them.
    """
    blocks = model.base_model.model.model.layers
    terms = []
    for n, name, layer in lora_layers(model):
        weight = (layer.lora_A if name in READERS else layer.lora_B)["default"].weight
        inside = part_in_span(blocks[n], name, weight, bases[n])
        terms.append((weight - inside).square().sum())
    return torch.stack(terms).sum()


def out_of_span(basis: Tensor, change: Tensor) -> float:
    """Share of a change's norm [..., d] that lies outside a subspace."""
    change = change.detach()
    outside = change - change @ basis @ basis.T
    return float(outside.norm() / change.norm().clamp(min=1e-12))


def measure_out_of_span(
    model: "PeftModel", tokens: LongTensor, bases: Bases
) -> dict[tuple[int, str], float]:
    """Share of the residual's change by each writing matrix that leaves the subspace.

    The change is that of the branch as added to the residual, so behind Gemma's second norm, with
    the inputs of the base model.
    """
    found = {}
    blocks = model.base_model.model.model.layers
    seen: dict[torch.nn.Module, Tensor] = {}
    writers = [(n, name, layer) for n, name, layer in lora_layers(model) if name in WRITERS]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]}))
        for _, _, layer in writers
    ]
    with torch.no_grad():
        with model.disable_adapter():
            model(tokens)
        for hook in hooks:
            hook.remove()
        for n, name, layer in writers:
            block, x = blocks[n], seen[layer]
            after = torch.nn.Identity()
            if hasattr(block, "pre_feedforward_layernorm"):
                kind = "attention" if name in ATTENTION else "feedforward"
                after = getattr(block, f"post_{kind}_layernorm")
            change = after(layer(x)) - after(layer.base_layer(x))
            found[n, name] = out_of_span(bases[n].to(change), change)
    return found


def bridge(model: "PeftModel | PreTrainedModel", tokenizer, name: str) -> models.LanguageModel:
    """The model with its adapter merged, as `load_model` gives it: SAE hooks, residuals, steering.

    A bridge of an unmerged adapter can drop it without a word, so a copy is merged first.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if any(layer.merged for _, _, layer in lora_layers(model)):
            raise ResearchError(
                "this adapter is merged but still attached; hand over what `merge_and_unload` "
                "returns, or call `unmerge_adapter` first."
            )
        model = merge(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return models.load_model(folder, name=name)


def merge(model: "PeftModel") -> "PreTrainedModel":
    """A copy of the base model with the adapter added to its weights."""
    return copy.deepcopy(model).merge_and_unload()
