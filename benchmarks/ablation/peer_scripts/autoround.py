"""AutoRound 0.16.1 (SignRound), 50 steps of 2 windows for each block: its default of 200 steps of 8
takes hours here.
"""

from auto_round import AutoRound
from hand_back import Task, linear_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

task = Task()
model = AutoModelForCausalLM.from_pretrained(task.model, dtype="float32")
rounding = AutoRound(
    model,
    AutoTokenizer.from_pretrained(task.model),
    bits=task.bits,
    group_size=task.group_size,
    sym=False,
    iters=50,
    seqlen=task.windows.shape[1],
    nsamples=len(task.windows),
    batch_size=2,
    dataset=task.samples(),
    device_map="cpu",
    amp=False,
    enable_torch_compile=False,
)
model, _ = rounding.quantize()
task.stop()
task.hand_back(linear_weights(model))
