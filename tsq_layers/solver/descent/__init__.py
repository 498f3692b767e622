"""Improve the codes of fixed grids by coordinate descent: QuantEase, CDQuant, and the clipping of grids before it."""
