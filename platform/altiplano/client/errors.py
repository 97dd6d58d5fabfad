"""What can go wrong between a client and an endpoint.

ConnectionError
└── EndpointGoneError   nobody answers, or nobody answers in time: ask again later
ValueError
└── RefusedError        the endpoint answered and said no: asking again changes nothing
"""

import httpx


class EndpointGoneError(ConnectionError):
    """The endpoint cannot be reached, or stays overloaded. `status` is its last answer's, None without one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(ValueError):
    """An answer that says what is wrong with the request. `body` is OpenAI's error object, or the text."""

    def __init__(self, message: str, status: int, code: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


def refused(response: httpx.Response) -> RefusedError:
    """The error in a response that was read to its end."""
    request_id = response.headers.get("x-request-id")
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = response.text[:300] or response.reason_phrase, None
    return RefusedError(
        f"{response.status_code}: {message}", response.status_code, None if code is None else str(code), request_id
    )
