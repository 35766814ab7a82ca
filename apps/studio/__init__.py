"""The studio: a prompt is drawn on the left, and what the same encoder finds for it stands on the right."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from .page import build
from .server import serve
from .shared import Studio

__all__ = ["Studio", "build", "serve"]
