"""Run a packed layer: `QuantLinear`, the tensors that it stores, and the kernels that multiply by them."""
