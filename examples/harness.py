"""Score a quantised model with lm-evaluation-harness, on a task that is made here from a text.

    python examples/harness.py [MODEL_DIR TEXT_FILE]

MODEL_DIR is a directory that ``tsq quantize`` or ``save_pretrained`` wrote. The task: which of four pieces of the text
follows a piece of it? Without arguments a small random Llama and random words stand for model and text.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tsq_layers as tsq
from tsq_layers.integrations.transformers import save_causal_lm  # teaches from_pretrained, too

TASK = """
task: what_follows
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def small(folder: Path) -> tuple[Path, str]:
    words = [f"w{number}" for number in range(100)] + ["<unk>", "</s>"]
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    plain = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, special["unk_token"])
    )
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=102,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=101,
    )
    model = tsq.quantize(
        LlamaForCausalLM(config).eval(), tsq.QuantConfig(method="rtn", bits=4, group_size=64)
    )
    save_causal_lm(model, tokenizer, folder / "model")
    return folder / "model", " ".join(
        words[number] for number in torch.randint(100, (4000,)).tolist()
    )


def questions(text: str, count: int = 50, length: int = 24) -> list[dict[str, object]]:
    words, rows, chance = text.split(), [], torch.Generator().manual_seed(0)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=chance))

    for number in range(count):
        start = number * (len(words) - 2 * length) // count
        choices = [
            " ".join(words[place : place + length // 2])
            for place in (start + length, *(draw(len(words) - length) for _ in range(3)))
        ]
        answer = draw(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append(
            {
                "before": " ".join(words[start : start + length]),
                "choices": choices,
                "answer": answer,
            }
        )
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if sys.argv[1:]:
            directory, text = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8")
        else:
            directory, text = small(folder)
        rows = folder / "questions.jsonl"
        rows.write_text("\n".join(json.dumps(row) for row in questions(text)), encoding="utf-8")
        (folder / "what_follows.yaml").write_text(TASK.replace("FILE", str(rows)), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(directory), "device": "cpu", "batch_size": 4},
            tasks=["what_follows"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    print(f"what_follows: {found['results']['what_follows']['acc,none']:.2f} right, chance is 0.25")


if __name__ == "__main__":
    main()
