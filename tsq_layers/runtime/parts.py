"""The tensors of a packed weight as they are run: views of what a layer stores.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, T tables a row,
E entries and C columns of the sparse part.
"""

from typing import NamedTuple

from torch import Tensor


class Parts(NamedTuple):
    """The tensors of a packed weight; what they stand for says a :class:`~tsq_layers.numerics.weight.WeightFormat`.

    ========================  ======================  ============================================
    weight                    grids                   shifts
    ========================  ======================  ============================================
    scales · (codes − zeros)  scales (N, G)           zero points packed like codes, int32 (N, W');
                                                      ``None`` is the constant 2^(bits−1)
    scales · codes + offsets  scales (N, G)           offsets (N, G) in the dtype of the scales
    table[code]               tables (N, T, 2^bits)   ``None``
    ========================  ======================  ============================================

    Grids are float16, bfloat16 or float32. There is a table for each row (T = 1) or each group (T = G).

    Args:
        words: packed codes, int32 (N, W).
        grids: scales or tables, as above.
        shifts: packed zero points, offsets or ``None``, as above.
        signs: int8 (K,), of a rotation.
        scaling: float32 (K,), of the input columns.
        values: of the sparse part, in the dtype of the grids: (E,), or (N, C).
        places: int32, of its entries (E,), or of its columns (C,).
    """

    words: Tensor
    grids: Tensor
    shifts: Tensor | None
    signs: Tensor | None = None
    scaling: Tensor | None = None
    values: Tensor | None = None
    places: Tensor | None = None

    @property
    def codes(self) -> "Parts":
        """Words, grids and shifts alone."""
        return Parts(self.words, self.grids, self.shifts)
