"""llama.cpp without AMX: its threads use tiles that they have not configured, which crashes the process."""

import llama_cpp

default_parameters = llama_cpp.llama_cpp.llama_model_default_params


def without_tiles():
    """Returns the default parameters without the extra buffer types that use AMX tiles."""
    parameters = default_parameters()
    parameters.use_extra_bufts = False
    return parameters


llama_cpp.llama_cpp.llama_model_default_params = without_tiles
