"""GPTQ of llm-compressor 0.14.0.1 with MSE observers, its strongest static grids, and activation ordering."""

from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer
from serving import serve
from torch import Tensor


def solve(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    arguments = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=group_size,
        actorder="static",
        observer="mse",
    )
    grids = Observer.load_from_registry("mse", base_name="weight", args=arguments)(
        weight
    ).get_qparams()
    scales, zeros = grids["scale"][None], grids["zero_point"][None]
    return quantize_weight(
        weight[None], hessian[None], scales, zeros, None, arguments, percdamp=0.01
    )[0][0]


serve(solve)
