"""A language model behind any server that speaks the OpenAI chat-completions protocol."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from textcond.synthesis.backends import Reply, TryAgain

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class ChatEndpoint:
    """Any OpenAI-compatible server: `POST {base_url}/chat/completions`.

    Args:
        model: the server's name of the model.
        base_url: the address up to and with the version, such as `http://localhost:8000/v1`.
        api_key: the key; None reads the environment variable `OPENAI_API_KEY`. It is never written anywhere.
        temperature: sampling temperature; E5-mistral used 1.
        top_p: nucleus sampling; E5-mistral used 1.
        reply_tokens: the most tokens of a reply.
        timeout: seconds to wait for a reply.
        options: further fields of the request body, such as `{"response_format": {"type": "json_object"}}`; a None
            takes a field out, such as `{"max_tokens": None, "max_completion_tokens": 1024}`.

    Raises:
        ValueError: if `base_url` is not an http or https address.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        reply_tokens: int = 1536,
        timeout: float = 120.0,
        options: Mapping[str, Any] | None = None,
    ):
        import httpx

        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {base_url!r}: give the whole address, such as http://localhost:8000/v1")
        self.url = base_url.rstrip("/") + "/chat/completions"
        # what messages and the journal may show: no name and password
        self._shown = re.sub(r"//[^/@]*@", "//", self.url)
        self.reply_tokens = reply_tokens
        self.settings = {"model": model, "temperature": temperature, "top_p": top_p, "reply_tokens": reply_tokens}
        self.settings["options"] = dict(options or {})
        self._key = api_key or os.environ.get("OPENAI_API_KEY", "")
        self._client = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 15.0)))
        self._reached = threading.Event()

    def complete(self, prompt: str, *, seed: int) -> Reply:
        """Return the server's reply to one user message.

        Raises:
            TryAgain: for 429, 5xx, a timeout, or a connection lost after an earlier one worked.
            ConnectionError: if nothing answers at the address.
            ValueError: for every other refusal (a wrong key, an unknown model, a field the server does not know).
        """
        import httpx

        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": self.reply_tokens, "seed": seed}
        body |= {name: self.settings[name] for name in ("model", "temperature", "top_p")} | self.settings["options"]
        body = {name: value for name, value in body.items() if value is not None}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = self._client.post(self.url, json=body, headers=headers)
        except httpx.ConnectError as error:
            if self._reached.is_set():
                raise TryAgain(f"{self._shown} is gone ({error})") from error
            raise ConnectionError(
                f"nothing answers at {self._shown} ({error}): start the server or mend base_url"
            ) from error
        except httpx.TimeoutException as error:
            raise TryAgain(f"{self._shown} gave no reply in time", billed=True) from error
        except httpx.TransportError as error:
            raise TryAgain(f"{self._shown} broke off ({type(error).__name__})", billed=True) from error
        self._reached.set()
        if response.status_code != 200:
            raise self._refusal(response)
        return self._reply(response)

    def _reply(self, response: Any) -> Reply:
        try:
            content = response.json()
            choice = content["choices"][0]
            text = choice["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError) as error:
            # a proxy's page or a broken server: the tokens of the reply may have been charged
            raise TryAgain(f"{self._shown} sent no chat completion ({_start(response.text)!r})", billed=True) from error
        usage = content.get("usage") or {}
        tokens = usage.get("total_tokens")
        return Reply(text, tokens if isinstance(tokens, int) else None, choice.get("finish_reason") != "length")

    def _refusal(self, response: Any) -> Exception:
        status, model = response.status_code, self.settings["model"]
        said = _start(response.text)
        if self._key:
            said = said.replace(self._key, "***")
        # the one 429 that waiting does not mend
        if status in PASSING and "insufficient_quota" not in response.text:
            return TryAgain(f"{self._shown} answered {status}: {said}", after=_retry_after(response.headers))
        if status in (401, 403):
            mend = "set OPENAI_API_KEY or pass api_key" if not self._key else "check the API key and its rights"
        elif status == 404:
            mend = f"check that base_url ends in the version (/v1) and that the server has a model {model!r}"
        elif status == 429:
            mend = "the account has no quota left"
        else:
            mend = "take the field that it does not know out of the request with `options`, or mend it"
        return ValueError(f"{self._shown} refused model {model!r} with {status} ({said}): {mend}")


def _start(text: str) -> str:
    return " ".join(text.split())[:300]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
