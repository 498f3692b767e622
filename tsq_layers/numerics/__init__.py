"""Define what the numbers mean: grids, packed codes, bases, 8-bit inputs, and the values that hold them.

All are pure functions on tensors, and frozen values. Nothing here knows a model, a layer or a file.
"""
