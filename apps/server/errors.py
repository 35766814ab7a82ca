"""Refusals as the OpenAI protocol words them: a status and one message."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 503: "overloaded_error"}


class Refusal(Exception):
    """Ends a request with `status` and `message`; `code` is what a program can tell it by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})

    def response(self) -> Response:
        """The answer to the client."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return Response(json.dumps({"error": error}), self.status, self.headers, media_type="application/json")


def overloaded(message: str) -> Refusal:
    """What a full server answers; clients of the OpenAI protocol try again by themselves after such an answer."""
    return Refusal(503, message, "overloaded", {"Retry-After": "1"})
