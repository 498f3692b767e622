"""vLLM serves saved directories: its log probabilities and texts are those of this library. Needs vLLM (vllm-cpu)."""

import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tsq_layers as tsq
from tsq_layers.integrations.transformers import save_causal_lm

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # small models run once: compiling would be all that takes time
}
VOCABULARY = 300
TOKENS = torch.arange(40) * 7 % VOCABULARY
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    yield
    if "vllm" in sys.modules:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    gc.collect()


def llama(**changes: Any) -> nn.Module:
    """A Llama of random weights that are large enough for its tokens to differ, with biases."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_bias": True,
    }
    return random(
        LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes}))
    )


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=128)
    return random(GPT2LMHeadModel(config))


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        mean = parameter.data.mean() if parameter.dim() == 1 else 0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15 + mean
    return model.eval()


def saved(model: nn.Module, directory: Path) -> Path:
    """A directory whose ``config.json`` names the method, as vLLM asks for."""
    save_causal_lm(model, None, directory)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values.setdefault("quantization_config", {"quant_method": "tsq"})
    path.write_text(json.dumps(values))
    return directory


def served(directory: Path, dtype: str = "float32", **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=2,
        **options,
    )


def log_probabilities(engine: Any) -> Tensor:
    """Of each token but the first."""
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0)
    (output,) = engine.generate([{"prompt_token_ids": TOKENS.tolist()}], options, use_tqdm=False)
    pairs = zip(output.prompt_logprobs[1:], TOKENS.tolist()[1:], strict=True)
    return torch.tensor([found[token].logprob for found, token in pairs])


def expected(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits = model(TOKENS.unsqueeze(0)).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, TOKENS[1:].unsqueeze(1)).squeeze(1)


def chunks(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(VOCABULARY, (1, 64), generator=generator)} for _ in range(count)
    ]


# --- what is served ----------------------------------------------------------------------------

RTN = {"method": "rtn", "bits": 3, "group_size": 32}
MIXED = {
    "skip": (
        "layers.1.self_attn.k_proj",
        "layers.0.mlp.down_proj",
    ),  # one inside a fused layer, one alone
    "overrides": {
        "v_proj": {"bits": 5},
        "layers.1.mlp.up_proj": {"group_size": 64},
        "o_proj": {"symmetric": True},
    },
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{bits} bits": ({**RTN, "bits": bits}, "llama") for bits in (1, 2, 8)},
    "mixed, with a packed output layer": ({**RTN, **MIXED}, "llama"),
    "offsets and a rotation": (
        {"bits": 3, "group_size": 32, "zero_points": "float", "rotation": 32},
        "llama",
    ),
    "tables": ({"method": "lnq", "bits": 3, "group_size": 32}, "llama"),
    "8-bit inputs": ({**RTN, "activation_bits": 8}, "llama"),
    "outliers": ({"method": "quantease", "bits": 3, "group_size": 32, "outliers": 0.01}, "llama"),
    "GPT-2, fused in the file": ({**RTN, "bits": 4}, "gpt2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    config, family = CONFIGS[name]
    model = llama() if family == "llama" else gpt2()
    model = tsq.quantize(
        model, tsq.QuantConfig(**config), None if config.get("method") == "rtn" else chunks()
    )
    found = log_probabilities(served(saved(model, tmp_path)))
    assert torch.allclose(found, expected(model), atol=2e-3, rtol=1e-3)
    assert not torch.allclose(
        found, expected(llama() if family == "llama" else gpt2()), atol=2e-3, rtol=1e-3
    )


def test_a_directory_that_does_not_name_the_method_is_served_when_asked_for(tmp_path: Path) -> None:
    model = tsq.quantize(llama(), tsq.QuantConfig(**RTN))
    save_causal_lm(model, None, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    assert torch.allclose(
        log_probabilities(served(tmp_path, quantization="tsq")),
        expected(model),
        atol=2e-3,
        rtol=1e-3,
    )


def test_bfloat16_keeps_the_scales(tmp_path: Path) -> None:
    model = tsq.quantize(llama(), tsq.QuantConfig(**RTN))
    engine = served(saved(model, tmp_path), "bfloat16")
    (layer,) = engine.apply_model(packed_down)
    assert torch.equal(layer, model.model.layers[0].mlp.down_proj.scales)
    difference = (log_probabilities(engine) - expected(model)).abs()
    assert difference.mean() < 0.1 * expected(model).abs().mean()


def packed_down(model: Any) -> Tensor:
    (matrix,) = model.model.layers[0].mlp.down_proj.matrices.parts
    return matrix.scales.clone()


# --- what is refused ---------------------------------------------------------------------------


def refusal(directory: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What the user reads: the engine's error, or the log of the process behind it."""
    with pytest.raises(Exception) as caught:
        served(directory)
    return str(caught.value) + "".join(capfd.readouterr())


def test_packed_embeddings_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tsq.quantize(llama(), tsq.QuantConfig(**RTN, embeddings=True))
    text = refusal(saved(model, tmp_path), capfd)
    assert "layer 'model.embed_tokens' is quantised" in text
    assert "embeddings=False" in text


def test_packed_experts_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )
    model = tsq.quantize(random(model), tsq.QuantConfig(**RTN))
    text = refusal(saved(model, tmp_path), capfd)
    assert "layer 'model.layers.0.mlp.experts.gate_up_proj.0' is quantised, but" in text
    assert "skip=('model.layers.*.mlp.experts.gate_up_proj.*',)" in text


def test_a_missing_tensor_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    saved(tsq.quantize(llama(), tsq.QuantConfig(**RTN)), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.scale_bits"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "holds no model.layers.1.self_attn.k_proj.scale_bits" in refusal(tmp_path, capfd)


# --- the server --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, nn.Module]]:
    """Its address, and the model that it serves."""
    model = tsq.quantize(llama(), tsq.QuantConfig(**RTN))
    saved(model, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(tmp_path),
        "--host",
        "127.0.0.1",
    ]
    options = [
        "--port",
        str(port),
        "--skip-tokenizer-init",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    options += ["--max-model-len", "64", "--max-num-seqs", "2", "--served-model-name", "tiny"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env=os.environ | SETTINGS
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
            yield f"http://127.0.0.1:{port}", model
        finally:
            process.terminate()
            process.wait(30)


def wait_for(address: str, process: Any, log: Path) -> None:
    for _ in range(500):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_a_client_is_answered_over_http(server: tuple[str, nn.Module]) -> None:
    address, model = server
    body = {
        "model": "tiny",
        "prompt": TOKENS.tolist(),
        "max_tokens": 4,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as response:
        answer = json.loads(response.read())
    assert answer["usage"]["completion_tokens"] == 4
    ids = TOKENS
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids.unsqueeze(0)).logits[0, -1].argmax().view(1)])
    assert answer["choices"][0]["token_ids"] == ids[len(TOKENS) :].tolist()
