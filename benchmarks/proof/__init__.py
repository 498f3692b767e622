"""Proof that a refactor changes no number: hashes of all that the library makes of small models.

::

    python -m benchmarks.proof --out before.json
    python -m benchmarks.proof --compare before.json after.json
    python -m benchmarks.proof --check COMMIT

Nothing here imports a submodule of the library: where its modules lie is what may change. What a
version writes of itself, of the time and of places on the disk is taken out before hashes are made;
so is the configuration, which went in and whose form is not a number. Hashes hold for one machine.
"""
