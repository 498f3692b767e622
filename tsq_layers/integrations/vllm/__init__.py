"""vLLM: serve what ``tsq.save`` and ``save_causal_lm`` write, at any width, with this library's own functions.

An out-of-tree plugin: vLLM calls :func:`register` in each of its processes, by the entry point in the group
``vllm.general_plugins``, so that installing this library beside vLLM is all that there is to do.

* :mod:`~tsq_layers.integrations.vllm.description`: which layers a directory holds packed, and how;
* :mod:`~tsq_layers.integrations.vllm.sharding`: the share of a packed layer that one process runs;
* :mod:`~tsq_layers.integrations.vllm.assembly`: the matrices that a layer of vLLM is made of;
* :mod:`~tsq_layers.integrations.vllm.plugin`: the classes that vLLM asks for. Only this one imports vLLM.
"""


def register() -> None:
    """Make the quantisation method ``"tsq"`` known to vLLM; calling it again changes nothing."""
    # Only here: the plugin imports vLLM.
    from tsq_layers.integrations.vllm import plugin  # noqa: F401, PLC0415
