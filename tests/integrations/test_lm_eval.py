"""lm-evaluation-harness runs quantised models by its ``hf`` class; its numbers are compared with ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tsq_layers as tsq
from tsq_layers.integrations.transformers import load_causal_lm, load_tokenizer, save_causal_lm
from tsq_layers.runtime.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings("default")  # those of the harness are its own affair

WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "</s>",
    "<unk>",
)
CHOICES = [
    {"question": "one two", "choices": ["three four", "nine", "six"], "answer": 0},
    {"question": "five six seven", "choices": ["zero", "one two three", "eight"], "answer": 2},
]
TEXTS = [{"text": "one two three four five six seven"}, {"text": "nine nine eight one zero"}]
TASKS = {
    "words_choice": """
task: words_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "words_rolling": """
task: words_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A quantised Llama of a dozen words, and two tasks."""
    path = tmp_path_factory.mktemp("lm_eval")
    plain = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    sizes = {"vocab_size": 12, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=10,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1 if parameter.dim() == 1 else 6)  # so that it prefers some words
    save_causal_lm(
        tsq.quantize(model, tsq.QuantConfig(method="rtn", bits=2, group_size=32)),
        tokenizer,
        path / "model",
    )
    for (name, text), rows in zip(TASKS.items(), (CHOICES, TEXTS), strict=True):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (path / f"{name}.yaml").write_text(text.replace("FILE", str(path / f"{name}.jsonl")))
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What the harness says of both tasks."""
    with torch.compiler.set_stance("force_eager"):
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder / "model"),
                "device": "cpu",
                "dtype": "float32",
                "batch_size": 1,
            },
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )


def log_likelihood(model: Any, tokenizer: Any, before: str, after: str) -> float:
    """log P(after | before), natural logarithm, straight from the definition."""
    context, ids = (tokenizer(text)["input_ids"] for text in (before, after))
    with torch.no_grad():
        logs = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
    return sum(logs[len(context) + i - 1, token].item() for i, token in enumerate(ids))


@pytest.mark.parametrize("loader", ["load_causal_lm", "HFLM"])
def test_log_likelihoods_are_ours(loader: str, folder: Path, found: dict[str, Any]) -> None:
    path = folder / "model"
    model = (
        load_causal_lm(path)
        if loader == "load_causal_lm"
        else HFLM(pretrained=str(path), device="cpu").model
    )
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    tokenizer = load_tokenizer(path)
    for sample in found["samples"]["words_choice"]:
        doc = sample["doc"]
        for choice, response in zip(doc["choices"], sample["filtered_resps"], strict=True):
            assert response[0] == pytest.approx(
                log_likelihood(model, tokenizer, doc["question"], choice), abs=1e-4
            )


def test_the_best_choice_counts(folder: Path, found: dict[str, Any]) -> None:
    model, tokenizer = load_causal_lm(folder / "model"), load_tokenizer(folder / "model")
    right = 0
    for doc in CHOICES:
        scores = [
            log_likelihood(model, tokenizer, doc["question"], choice) for choice in doc["choices"]
        ]
        right += scores.index(max(scores)) == doc["answer"]
    assert found["results"]["words_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))


def test_word_perplexity_is_ours(folder: Path, found: dict[str, Any]) -> None:
    """The harness puts the end-of-text token before each text; with it there ``tsq.perplexity`` is the same number."""
    model, tokenizer = load_causal_lm(folder / "model"), load_tokenizer(folder / "model")
    total, words = 0.0, 0
    for row in TEXTS:
        ids = tokenizer("</s> " + row["text"])["input_ids"]
        total += torch.tensor(
            tsq.perplexity(model, torch.tensor(ids), window=len(ids))
        ).log().item() * (len(ids) - 1)
        words += len(row["text"].split())
    expected = torch.tensor(total / words).exp().item()
    assert found["results"]["words_rolling"]["word_perplexity,none"] == pytest.approx(
        expected, rel=1e-4
    )


def test_other_weights_would_be_seen(folder: Path, found: dict[str, Any]) -> None:
    model, tokenizer = load_causal_lm(folder / "model"), load_tokenizer(folder / "model")
    model.model.layers[1].mlp.down_proj.words.bitwise_not_()
    sample = found["samples"]["words_choice"][0]
    other = log_likelihood(model, tokenizer, sample["doc"]["question"], sample["doc"]["choices"][0])
    assert sample["filtered_resps"][0][0] != pytest.approx(other, abs=1e-3)
