"""Prepare, calibrate, convert, refine and fold models: the verbs of the library."""
