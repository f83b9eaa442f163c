"""llama.cpp, kept from AMX: its threads use tiles that they have not configured, and die."""

import llama_cpp

default_parameters = llama_cpp.llama_cpp.llama_model_default_params


def without_tiles():
    """The default parameters, without the buffers that tiles are for."""
    parameters = default_parameters()
    parameters.use_extra_bufts = False
    return parameters


llama_cpp.llama_cpp.llama_model_default_params = without_tiles
