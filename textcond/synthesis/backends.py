"""What the synthesis asks of a language model, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Reply:
    """One reply of a language model.

    - `text`: what it wrote.
    - `tokens`: tokens read and written, as the server or tokenizer counts them; None where the server does not say.
    - `complete`: False where the reply ran into its length limit.
    """

    text: str
    tokens: int | None
    complete: bool = True


class TryAgain(Exception):
    """A failure that may pass: too many requests, an overloaded server, a timeout.

    Args:
        reason: what happened, for the journal and for the error if it does not pass.
        after: seconds that the server asks to wait, None if it does not say.
        billed: whether the server may have written (and charged) a reply that never arrived.
    """

    def __init__(self, reason: str, *, after: float | None = None, billed: bool = False):
        super().__init__(reason)
        self.after = after
        self.billed = billed


class Backend(Protocol):
    """A language model: `synthesize` takes anything of this shape.

    - `settings`: what decides the replies (model name, temperature, ...), JSON-able; a resume compares it.
    - `reply_tokens`: the most tokens that a reply may have.
    """

    settings: dict[str, Any]
    reply_tokens: int

    def complete(self, prompt: str, *, seed: int) -> Reply:
        """Return the reply to one user message; called from several threads at once.

        Raises:
            TryAgain: for a failure that may pass; every other error ends the run.
        """
        ...
