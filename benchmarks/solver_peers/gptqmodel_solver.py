"""GPTQ of GPTQModel 7.7.0, its defaults but for zero points."""

import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from serving import serve
from torch import Tensor


def solve(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=False, desc_act=False, device="cpu"
    )
    gptq = GPTQ(layer, config)
    gptq.H, gptq.nsamples = hessian, len(hessian)
    gptq.quantizer.configure(perchannel=True)
    return gptq.quantize()[0]


serve(solve)
