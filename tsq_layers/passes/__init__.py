"""Run the forward passes of a model: batches, passes in lockstep, records of calls, and the state that passes change.

Nothing here knows about quantisation.
"""
