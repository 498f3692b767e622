"""What every step and every method of the family contributes: SmolLM2-135M, one table.

    python -m benchmarks.ablation [--rows …] [--bits 2 3] [--group-size 64] [--tokens 16384] [--seeds 0] [--out DIR]

From the root of the repository. `rows` says what is compared, `texts` on what; `peers` holds other
libraries, which run in interpreters of their own and hand back dequantised weights.
"""
