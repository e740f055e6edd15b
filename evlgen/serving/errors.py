"""Refusals, as a client sees them."""

from __future__ import annotations

from evlgen.common.safe_text import message as safe_message


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong and what to do, for whoever wrote the request.
        code: in one word, for programs.
        param: the part of the request that is meant.
        retry_after: seconds after which another try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict:
        """The JSON of the response, as OpenAI's is."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        text = str(safe_message(self))
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}
