"""Keeping the libraries' own warnings and bars away: what a person needs to know is told by the apps themselves."""

from __future__ import annotations

import os
import sys
import warnings

from .errors import debugging


def quiet_libraries() -> None:
    """Silence transformers and diffusers below errors, unless `TEXTCOND_DEBUG` is set; downloads keep their bars."""
    if debugging():
        return
    warnings.simplefilter("ignore")
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    if "diffusers" in sys.modules:
        import diffusers  # waits for a thread that is importing it

        diffusers.utils.logging.set_verbosity_error()
