"""Slow, obvious float64 versions of each step, written from the mathematics and sharing no code with the library."""
