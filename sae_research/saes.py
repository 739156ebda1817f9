"""SAEs: load them, check that they fit a model, save and judge them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import LongTensor, Tensor

from sae_research import store
from sae_research.errors import ResearchError, unknown
from sae_research.hub import canonical_name, download, explain, quiet, unreachable
from sae_research.models import LanguageModel
from sae_research.paths import relative

if TYPE_CHECKING:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata


def load_sae(
    release: str | Path, sae_id: str | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> "SAE":
    """A frozen SAE: `sae_id` of a SAELens release, or a folder in SAELens format (whose checksums
    are compared if it has some).
    """
    with quiet():
        if sae_id is None:
            sae = _from_folder(Path(release).expanduser(), device, dtype)
        else:
            sae = _from_release(str(release), sae_id, device, dtype)
    return freeze(sae)


def _from_folder(folder: Path, device: str, dtype: str) -> "SAE":
    """Open a folder in SAELens format, saying in one sentence what is wrong with it."""
    from sae_lens import SAE
    from safetensors import SafetensorError

    if not (folder / "cfg.json").is_file():
        raise ResearchError(
            f"{relative(folder)} holds no SAE (cfg.json); give such a folder, or a release and an "
            "SAE id."
        )
    if (folder / store.CHECKSUMS).is_file():
        store.verified(folder)
    if not (folder / "sae_weights.safetensors").is_file():
        raise ResearchError(
            f"{relative(folder)} has no sae_weights.safetensors; copy the weights there."
        )
    try:
        return SAE.load_from_disk(folder, device=device, dtype=dtype)
    except json.JSONDecodeError as error:
        reason = f"its cfg.json is no JSON ({error})"
    except SafetensorError as error:
        reason = f"its weights are truncated or damaged ({error})"
    except (KeyError, TypeError, ValueError) as error:
        reason = f"SAELens does not understand its cfg.json ({str(error).splitlines()[0]})"
    except RuntimeError as error:
        shapes = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = f"weights and cfg.json do not fit ({(shapes or [str(error)])[0]})"
    raise ResearchError(
        f"the SAE in {relative(folder)} cannot be loaded: {reason}; "
        "export it again in SAELens format."
    )


def _from_release(release: str, sae_id: str, device: str, dtype: str) -> "SAE":
    """Fetch from the hub with SAELens, saying in one sentence what is missing."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        raise unknown("SAE release", release, known, "SAELens")
    if sae_id not in known[release].saes_map:
        raise unknown("SAE id", sae_id, known[release].saes_map, release)
    repository = known[release].repo_id
    folder = known[release].saes_map[sae_id]
    if not (download(repository, (f"{folder}/*",)) / folder).is_dir():
        raise unreachable(f"the SAE {release}/{sae_id}")
    try:  # SAELens asks the hub again, for some releases for further files
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
    except Exception as error:
        raise explain(repository, error) from error


def freeze(sae: "SAE") -> "SAE":
    """Freeze, and let an SAE that was trained on centred residuals take raw ones."""
    if centred(sae):
        sae.run_time_activation_norm_fn_in = _centre
    return sae.eval().requires_grad_(False)


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def centred(sae: "SAE") -> bool:
    """Whether the SAE was trained on residuals less their mean over d (centred weights)."""
    return bool((sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"))


def target(sae: "SAE", residual: Tensor) -> Tensor:
    """What the SAE rebuilds of a raw residual: all, or all but its mean (no LayerNorm sees it)."""
    return _centre(residual) if centred(sae) else residual


def metadata(model: LanguageModel, hook: str) -> "SAEMetadata":
    """What others need to know of an SAE: model, hook, context size, whether BOS comes first."""
    with quiet():
        from sae_lens.saes.sae import SAEMetadata

        return SAEMetadata(
            model_name=model.name, hook_name=hook, context_size=model.n_ctx, prepend_bos=True
        )


def hook_of(sae: "SAE") -> str:
    """The hook that the SAE says it was trained on."""
    if not sae.cfg.metadata.hook_name:
        raise ResearchError(
            "this SAE names no hook in its metadata (`hook_name`); it cannot be placed in a model."
        )
    return sae.cfg.metadata.hook_name


def check_latents(sae: "SAE", latents: list[int]) -> list[int]:
    """The latents, if the SAE has them."""
    wrong = [latent for latent in latents if not 0 <= latent < sae.cfg.d_sae]
    if wrong:
        raise ResearchError(
            f"latent {wrong[0]} is out of range; this SAE has {sae.cfg.d_sae} latents."
        )
    return latents


def check_fit(model: LanguageModel, sae: "SAE") -> str:
    """The bridge's name of the SAE's hook, if model, hook and width agree."""
    trained_on = sae.cfg.metadata.model_name
    names = {canonical_name(name).split("/")[-1] for name in (trained_on, model.name) if name}
    if len(names) > 1:
        raise ResearchError(
            f"this SAE was trained on the model '{trained_on}', not on '{model.name}'; load the "
            f"SAE of '{model.name}'."
        )
    if sae.cfg.d_in != model.d_model:
        raise ResearchError(
            f"this SAE reads {sae.cfg.d_in} dimensions but the residual of '{model.name}' has "
            f"{model.d_model}; load the SAE of this model."
        )
    return model.hook(hook_of(sae))


def warn_if_wrong(model: LanguageModel, sae: "SAE", least: float = 0.25) -> dict[str, float]:
    """Quality on a few hundred tokens that the model writes itself; warns where the load looks
    wrong.

    Wrong means an explained variance below `least`, or an L0 three times off the calibrated one.
    """
    hook = check_fit(model, sae)
    known = getattr(sae, "_checked_on", {})
    if model.fingerprint in known:
        return known[model.fingerprint]
    with model.unedited():
        found = quality(model, sae, model.sample, hook)
    sae._checked_on = {**known, model.fingerprint: found}
    signs = []
    if not found["explained_variance"] >= least:
        signs.append(f"it explains {found['explained_variance']:.0%} of the residual's variance")
    expected = getattr(sae.cfg.metadata, "calibrated_l0", None)
    if expected and not expected / 3 <= found["l0"] <= 3 * expected:
        signs.append(f"{found['l0']:.1f} latents are active on a token in place of {expected:.1f}")
    if signs:
        warnings.warn(
            f"this SAE may not belong to '{model.name}' at {hook}: on {found['tokens']} tokens "
            f"{' and '.join(signs)}; check hook, model and normalisation.",
            stacklevel=2,
        )
    return found


def save(sae: "SAE", folder: Path, half: bool = False) -> None:
    """Write the SAE so that `SAE.load_from_disk` opens it, whole or not at all.

    `half` takes half the space: float16 on disk, float32 when loaded, thresholds exact.
    """
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.saes.sae import TrainingSAE
    from safetensors.torch import load_file, save_file

    if isinstance(sae, BatchTopKTrainingSAE):
        raise ResearchError(
            "a BatchTopK SAE in training has no threshold to save; calibrate it with `exact_l0` "
            "first."
        )
    with store.writing(Path(folder)) as partial:
        if isinstance(sae, TrainingSAE):
            sae.save_inference_model(partial)
        else:
            sae.save_model(partial)
        if half:
            path = partial / "sae_weights.safetensors"
            weights = load_file(path).items()
            halved = {name: w if name == "threshold" else w.half() for name, w in weights}
            save_file({name: w.contiguous() for name, w in halved.items()}, path)


def quality(
    model: LanguageModel, sae: "SAE", tokens: LongTensor, hook: str | None = None, batch: int = 32
) -> dict[str, float]:
    """How well the SAE stands in for the residual on `tokens`; BOS and padding are left alone.

    `explained_variance` is 1 - sum |x - x_hat|^2 / sum |x - mean x|^2, `ce_recovered` is
    (ce_zero - ce_spliced) / (ce_zero - ce_clean), where zero sets the residual to zero.
    """
    hook = hook or check_fit(model, sae)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    seen = []
    count = 0
    error = 0.0
    with torch.no_grad():
        for rows in tokens.split(batch):
            content = model.content(rows).to(model.device)
            x = model.residual(rows, hook)[content].to(sae.device, sae.dtype)
            acts = sae.encode(x)
            fired |= (acts > 0).any(0)
            count += (acts > 0).sum().item()
            error += (target(sae, x) - sae.decode(acts)).double().square().sum().item()
            seen.append(target(sae, x).cpu())
    x = torch.cat(seen)
    total = (x - x.mean(0)).double().square().sum().item()
    edits = {
        "ce_clean": lambda resid: resid,
        "ce_spliced": lambda resid: sae.decode(sae.encode(resid.to(sae.device, sae.dtype))),
        "ce_zero": torch.zeros_like,
    }
    losses = {name: mean_loss(model, tokens, hook, edit, batch) for name, edit in edits.items()}
    return {
        "explained_variance": 1 - error / total,
        "ce_recovered": (losses["ce_zero"] - losses["ce_spliced"])
        / (losses["ce_zero"] - losses["ce_clean"]),
        "l0": count / len(x),
        "dead_share": 1 - fired.double().mean().item(),
        **losses,
        "tokens": len(x),
    }


@torch.no_grad()
def mean_loss(
    model: LanguageModel,
    tokens: LongTensor,
    hook: str,
    edit: Callable[[Tensor], Tensor],
    batch: int = 32,
) -> float:
    """Mean cross-entropy with the residual edited at `hook`; BOS and padding are left alone."""
    total = 0.0
    predicted = 0
    for rows in tokens.split(batch):
        text = model.content(rows).to(model.device)
        edits = {hook: lambda x, text=text: torch.where(text[..., None], edit(x).to(x), x)}
        found = model.losses(rows, edits)[text[:, 1:]]
        total += found.double().sum().item()
        predicted += len(found)
    return total / predicted


def match_decoders(one: "SAE", other: "SAE") -> np.ndarray:
    """Cosine of each latent's decoder row with the row of the other SAE that it is paired with.

    Pairs are one to one and maximise the sum; the mean is PW-MCC (arXiv:2505.20254).
    """
    from scipy.optimize import linear_sum_assignment

    rows = [
        torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=-1) for sae in (one, other)
    ]
    cosines = (rows[0] @ rows[1].T).cpu().numpy()
    return cosines[linear_sum_assignment(cosines, maximize=True)]
