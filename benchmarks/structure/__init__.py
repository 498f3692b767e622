"""Measure the structure of the package: style, imports, and the ways of values between packages."""
