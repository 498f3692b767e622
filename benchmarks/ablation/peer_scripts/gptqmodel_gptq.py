"""GPTQ of GPTQModel 7.7.0, its defaults but for the device and the zero points."""

import tempfile

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from hand_back import Task

task = Task()
config = QuantizeConfig(
    bits=task.bits,
    group_size=task.group_size,
    sym=False,
    desc_act=False,
    device="cpu",
    offload_to_disk=False,
)
model = GPTQModel.load(task.model, config, dtype=torch.float32)
model.quantize(task.samples(), batch_size=4)
task.stop()
with tempfile.TemporaryDirectory() as saved:
    model.save(saved)
    loaded = GPTQModel.load(saved, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    layers = [
        (name, module)
        for name, module in loaded.model.named_modules()
        if hasattr(module, "qweight")
    ]
    task.hand_back({name: module.dequantize_weight().T for name, module in layers})
