"""OpenAI's error object for every answer that is not a success."""

import re
from typing import Any

from fastapi.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


# How pydantic names the forms of a value in a finding's place: "str", "list[TextPart]".
_FORM = re.compile(r"str|int|(?:list|dict|constrained-|function-)\W.*|NamedTool|literal\[.*|\[key\]")


class ApiError(Exception):
    """An answer other than 2xx."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        self.headers: dict[str, str] = {}

    @classmethod
    def from_problems(cls, problems: Any) -> "ApiError":
        """400 for the first field of pydantic's findings, in its words. Where a value may have several forms, each form has a
        finding: the one that got furthest is the form that was meant."""
        first = max((p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]), key=lambda p: len(p["loc"]))
        where = ".".join(str(part) for part in first["loc"] if not _FORM.fullmatch(str(part)))
        said = first["msg"].removeprefix("Value error, ")
        return cls(400, f"{where}: {said}" if where else said, param=where or None)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        retry = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        return JSONResponse(self.body(), self.status, headers=self.headers | retry)
