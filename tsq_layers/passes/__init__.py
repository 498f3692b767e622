"""Run the forward passes of a model: batches, passes in lockstep, recordings of calls, and what each pass keeps.

Nothing here knows about quantisation.
"""
