"""Fixtures that several test files share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# A job in the background is started deaf to Ctrl-C, which some tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _audible_libraries() -> None:
    """Undo what a command run in this process silences: other tests listen to warnings."""
    for name in ("diffusers", "transformers"):
        if name in sys.modules:
            sys.modules[name].utils.logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders of the shape of the reference model: `pipeline`, `index`, a fitting `encoder`, one too `wide`."""
    import tiny_reference

    root: Path = tmp_path_factory.mktemp("demo")
    pipeline = tiny_reference.save_pipeline(root / "pipeline")
    return SimpleNamespace(
        root=root,
        pipeline=str(pipeline),
        index=str(tiny_reference.save_index(root / "index", pipeline)),
        encoder=str(tiny_reference.save_encoder(root / "encoder")),
        wide=str(tiny_reference.save_encoder(root / "wide", width=48)),
    )
