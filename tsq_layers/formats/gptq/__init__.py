"""Read and write checkpoints in the layout of GPTQ."""
