"""The loaders of the laptop and gpu profiles, on miniature replicas of each repository's true file
format.
"""

import itertools
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sae_research import catalogue, models, saes
from sae_research.errors import ResearchError

pytestmark = pytest.mark.usefixtures("offline_hub")

REMOTE = [name for name, spec in catalogue.MODEL_SPECS.items() if spec.from_hub]
MODELS = sorted(
    {spec.model: name for name, spec in catalogue.MODEL_SPECS.items() if spec.from_hub}.values()
)
WITH_SAES = [name for name in REMOTE if catalogue.get(name).saes]


@pytest.fixture(scope="module")
def load():
    """Each model, loaded once, at a tenth of its size only in width and vocabulary."""
    loaded = {}

    def once(name):
        model = catalogue.get(name).model
        if model not in loaded:
            loaded[model] = catalogue.get(name).load()
        return loaded[model]

    return once


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_hugging_face(name, load):
    import torch
    from transformers import AutoModelForCausalLM

    ours = load(name)
    tokens = ours.tokens(["The lens sees what the model sees.", "Nothing else."])
    theirs = AutoModelForCausalLM.from_pretrained(catalogue.get(name).model, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        error = (ours.logits(tokens) - expected).abs().max()
    assert error <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert theirs.config.num_hidden_layers == ours.n_layers
    assert tokens[0, 0] == ours.bos


@pytest.mark.parametrize("name", WITH_SAES)
def test_every_sae_fits_its_model_at_the_hook_of_its_role(name, load):
    spec = catalogue.get(name)
    for role in spec.roles():
        sae = spec.sae(role)
        assert saes.check_fit(load(name), sae) == load(name).hook(spec.hooks[role])
        assert not any(weight.requires_grad for weight in sae.parameters())
        assert str(sae.dtype) == "torch.float32"


@pytest.mark.parametrize("name", WITH_SAES)
def test_an_sae_runs_on_its_model(name, load):
    spec = catalogue.get(name)
    tokens = load(name).tokens(["The lens sees what the model sees."])
    result = saes.quality(
        load(name), spec.sae("primary" if "primary" in spec.saes else "layer_10"), tokens
    )
    assert result["tokens"] == tokens.shape[1] - 1
    assert 0 < result["l0"] < 192
    assert result["ce_spliced"] != result["ce_clean"]


def _formula(release, weights, x):
    """Codes and reconstruction straight from the files of each format."""
    import torch

    if release.startswith("gemma"):
        pre = x @ weights["W_enc"] + weights["b_enc"]
        codes = pre * (pre > torch.linspace(0.01, 0.3, pre.shape[-1]))
        return codes, codes @ weights["W_dec"] + weights["b_dec"]
    if release.startswith("gpt2"):
        x = x - x.mean(-1, keepdim=True)
    codes = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    return codes, codes @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize("name", ["gpt2-small", "pythia-70m", "gemma-2-2b", "gemma-3-270m-it"])
def test_codes_are_those_of_the_files(name):
    import replicas
    import torch

    release, sae_id = catalogue.get(name).saes["primary"]
    weights = replicas._weights((release if name.startswith("gemma") else "") + sae_id)
    x = torch.randn(50, replicas.WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5
    sae = catalogue.get(name).sae("primary")
    codes, reconstruction = _formula(release, weights, x)
    assert sae.encode(x).allclose(codes, atol=1e-5)
    assert sae.decode(codes).allclose(reconstruction, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-8b-32x"])
def test_llama_scope_folds_the_input_norm_both_ways(name):
    import replicas
    import torch
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    release, sae_id = catalogue.get(name).saes["primary"]
    scale = get_norm_scaling_factor(release, sae_id)
    sae = catalogue.get(name).sae("primary")
    weights = {
        key: value.bfloat16().float()
        for key, value in replicas._weights(sae_id, sae.cfg.d_sae).items()
    }
    x = torch.randn(50, replicas.WIDTH, generator=torch.Generator().manual_seed(0))
    pre = scale * x @ weights["W_enc"] + weights["b_enc"]
    codes = pre * (pre > 0.1 * scale)
    assert sae.encode(x).allclose(codes, atol=1e-3)
    assert sae.decode(codes).allclose(
        (codes @ weights["W_dec"] + weights["b_dec"]) / scale, atol=1e-3
    )


def test_feature_splitting_ladder_doubles_at_one_hook():
    spec = catalogue.get("gpt2-small")
    steps = [spec.sae(role) for role in spec.roles() if role.startswith("width_")]
    widths = [sae.cfg.d_sae for sae in steps]
    assert len(widths) == 8
    assert all(after == 2 * before for before, after in itertools.pairwise(widths))
    assert {saes.hook_of(sae) for sae in steps} == {"blocks.8.hook_resid_pre"}
    assert all(saes.centred(sae) for sae in steps)


def test_only_gpt2_small_is_centred():
    for name in WITH_SAES:
        sae = catalogue.get(name).sae(catalogue.get(name).roles()[0])
        assert saes.centred(sae) == (name == "gpt2-small")


@pytest.mark.parametrize(
    ("model", "sae"),
    [("gpt2-small", "pythia-70m"), ("gemma-2-9b", "gemma-2-2b"), ("gpt2-large", "llama-3.1-8b")],
)
def test_sae_of_another_model_is_refused_by_both_names(model, sae, load):
    with pytest.raises(ResearchError, match="was trained on the model") as caught:
        saes.check_fit(load(model), catalogue.get(sae).sae(catalogue.get(sae).roles()[0]))
    for name in (model, sae):
        assert catalogue.get(name).model.split("/")[-1] in str(caught.value)


def test_bfloat16_keeps_the_loaded_number_format():
    import torch

    ours = models.load_model("pythia-70m-deduped", dtype="bfloat16")
    tokens = ours.tokens(["One text."])
    assert ours.residual(tokens, "blocks.4.hook_resid_post").dtype == torch.bfloat16
    assert ours.logits(tokens).dtype == torch.float32


def test_short_names_reach_the_same_model(load):
    assert models.load_model("gpt2-small").name == load("gpt2-small").name == "gpt2"


def test_models_and_saes_that_are_not_here_ask_for_network():
    with pytest.raises(ResearchError, match="no network for the laptop and gpu profiles"):
        models.load_model("EleutherAI/pythia-160m-deduped")
    with pytest.raises(ResearchError, match="no network for the laptop and gpu profiles"):
        saes.load_sae("gpt2-small-res-jb", "blocks.11.hook_resid_post")


def test_models_without_the_sae_that_is_asked_for():
    with pytest.raises(ResearchError, match="train their own"):
        catalogue.get("gpt2-large").sae("primary")
    with pytest.raises(ResearchError, match=r"unknown SAE role 'primry' .* did you mean 'primary'"):
        catalogue.get("gpt2-small").sae("primry")
    with pytest.raises(
        ResearchError, match=r"unknown model 'gpt2-smal' .* did you mean 'gpt2-small'"
    ):
        catalogue.get("gpt2-smal")


def test_the_environment_alone_is_enough_in_a_new_process():
    code = "import sae_research as sr; model = sr.load_model('gpt2-small'); "
    code += "print(model, sr.load_sae('gpt2-small', 'primary').cfg.d_sae)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LanguageModel(gpt2: 12 blocks, d_model 16, on cpu) 48\n"
    assert done.stderr == ""


def test_every_model_of_params_is_in_the_catalogue():
    from sae_research import config

    for profile in config.profiles():
        loaded = config.load(profile)
        for study in config.study_names():
            block = getattr(loaded, study)
            for name in set(block.models) - set(getattr(block, "NOT_MODELS", ())):
                assert catalogue.get(name).name == name


class _Hub(BaseHTTPRequestHandler):
    """A hub with one gated repository: its listing is public, its files are not."""

    def do_GET(self):
        if "/api/models/google/gemma-2-2b/tree" in self.path:
            self._answer(200, b'[{"type": "file", "oid": "0", "size": 2, "path": "config.json"}]')
        elif "/api/models/google/gemma-2-2b" in self.path:
            self._answer(200, b'{"id": "google/gemma-2-2b", "sha": "%s"}' % (b"a" * 40))
        else:
            self._answer(404, b"{}", "RepoNotFound")

    def do_HEAD(self):
        self._answer(403, b"", "GatedRepo")

    def _answer(self, status, body, error=None):
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def _attempt(code, folder, endpoint):
    """What `code` says in a new process, with an empty cache, a token and the hub at `endpoint`."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(folder), "HF_TOKEN": "hf_secretsecret"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code[0]}\ntry: {code[1]}\nexcept Exception as e: print(type(e).__name__, e)",
        ],
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout


IMPORT = "from sae_research import hub, models"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "google/gemma-2-2b",
            "google/gemma-2-2b is gated: accept its licence on its page .* variable HF_TOKEN",
        ),
        ("nobody/nothing", "there is no 'nobody/nothing' on the hub"),
    ],
)
def test_gated_and_unknown_models_are_explained_without_the_token(model, message, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = _attempt(
        (IMPORT, f"models.load_model({model!r})"),
        tmp_path,
        f"http://127.0.0.1:{server.server_port}",
    )
    server.shutdown()
    assert re.match(f"ResearchError {message}", said), said


def test_no_network_is_said_at_once(tmp_path):
    start = time.monotonic()
    said = _attempt((IMPORT, "hub.download('google/gemma-2-2b')"), tmp_path, "http://127.0.0.1:9")
    assert re.match(
        "ResearchError google/gemma-2-2b is not on this machine .* no network for the laptop", said
    ), said
    assert time.monotonic() - start < 20
