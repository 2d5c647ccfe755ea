"""What other libraries print, kept off the screen of a command. Their errors pass."""

import logging
import os

# read by these libraries when they are imported, here and in processes that a command starts
VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # huggingface_hub and transformers
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def hide_library_notices() -> None:
    """Hide warnings, notices and progress bars of other libraries in this process.

    A user of a command can do nothing about them. `BLIPREN_LIBRARY_NOTICES=1` shows them, to look for a fault.
    """
    if os.environ.get("BLIPREN_LIBRARY_NOTICES") == "1":
        return
    logging.captureWarnings(True)  # the warnings module then logs at level WARNING, whatever filters a library sets
    logging.disable(logging.WARNING)  # of all loggers, those of libraries that are not imported yet included
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
