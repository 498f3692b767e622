"""Calibrate a model: find its layers, observe their inputs, solve them in order, and keep a journal of it."""
