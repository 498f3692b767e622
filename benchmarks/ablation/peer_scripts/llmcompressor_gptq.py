"""GPTQ of llm-compressor 0.14.0.1 with MSE observers, its strongest static grids, and activation ordering."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from hand_back import Task, linear_weights
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

task = Task()
model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
weights = QuantizationArgs(
    num_bits=task.bits,
    type="int",
    symmetric=False,
    strategy="group",
    group_size=task.group_size,
    actorder="static",
    observer="mse",
)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
recipe = GPTQModifier(
    config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=0.01, block_size=128
)
samples = Dataset.from_dict(
    {
        "input_ids": task.windows.tolist(),
        "attention_mask": [[1] * task.windows.shape[1]] * len(task.windows),
    }
)
oneshot(
    model=model,
    dataset=samples,
    recipe=recipe,
    max_seq_length=task.windows.shape[1],
    num_calibration_samples=len(task.windows),
)
task.stop()
task.hand_back(linear_weights(model))
