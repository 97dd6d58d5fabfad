"""What users think of answers: POST /v1/feedback, and ids of answers that carry their arm.

An answer of a test has the id "<kind>-<32 hex>-<arm>-<signature>". Any replica can read the arm from it, whoever gave the answer, and
the signature under the test's salt keeps others from inventing ids. Ids of an earlier test do not count for the running one.

The hex begins with the name of the replica that gave the answer. Ratings of it are counted there, whichever replica they reach, so that
rating it again replaces the rating; when that replica is gone, one that the id chooses among those that are left stands in for it.
"""

import hashlib
import hmac
import re
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from altiplano.serve.arms import Arms
from altiplano.serve.errors import ApiError

ANSWER_ID = re.compile(r"(?:chatcmpl|cmpl)-([0-9a-f]{32})-(.{1,64})-([0-9a-f]{16})")
MAX_REMEMBERED = 1 << 16
THUMBS = {"up": 1.0, "down": -1.0}


class FeedbackRequest(BaseModel):
    """POST /v1/feedback: the id of an answer, and either a score of -1 … 1 or a rating (up, down, or 1 to 5 stars)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str = Field(max_length=256)
    score: float | None = Field(None, ge=-1, le=1)
    rating: Literal["up", "down"] | Annotated[int, Field(strict=True, ge=1, le=5)] | None = None
    comment: str | None = Field(None, max_length=4096, description="Accepted and not kept.")

    @model_validator(mode="after")
    def _one_of_both(self) -> "FeedbackRequest":
        if (self.score is None) == (self.rating is None):
            raise ValueError("give either score or rating")
        return self

    @property
    def value(self) -> float:
        """-1 … 1."""
        if self.score is not None:
            return self.score
        return THUMBS[self.rating] if isinstance(self.rating, str) else ((self.rating or 3) - 3) / 2


def answer_id(kind: str, arms: Arms | None, arm: str | None, replica: str = "") -> str:
    """An id for an answer of `arm` by `replica` (hex); without a test, as OpenAI makes them."""
    name = (replica + uuid.uuid4().hex)[:32]
    if arms is None or arm is None:
        return f"{kind}-{name}"
    return f"{kind}-{name}-{arm}-{_signature(arms, name, arm)}"


def arm_of(arms: Arms | None, answer: str) -> str:
    """The arm that gave an answer.

    Raises:
        ApiError: 404, the running test has no such answer.
    """
    found = ANSWER_ID.fullmatch(answer)
    if arms is not None and found is not None:
        name, arm, signature = found.groups()
        if hmac.compare_digest(signature, _signature(arms, name, arm)):
            return arm
    raise ApiError(
        404,
        "no answer of the running test has this id: send the id of an answer as it was given",
        param="id",
        code="unknown_answer",
    )


def counts_at(answer: str, replicas: Iterable[str]) -> str:
    """The one of `replicas` (names in hex, at least one) that counts the ratings of an answer."""
    found = ANSWER_ID.fullmatch(answer)
    present = sorted(replicas)
    own = next((replica for replica in present if found is not None and found[1].startswith(replica)), None)
    return own or max(present, key=lambda replica: hashlib.sha256(f"{replica} {answer}".encode()).digest())


class Scores:
    """The last score of each answer, for the newest `size` answers: rating one answer twice changes its score, not the count."""

    def __init__(self, size: int = MAX_REMEMBERED) -> None:
        self._size = size
        self._scores: OrderedDict[str, float] = OrderedDict()

    def replace(self, answer: str, score: float) -> float | None:
        """Take the score of an answer; returns the one that it had."""
        before = self._scores.pop(answer, None)
        self._scores[answer] = score
        if len(self._scores) > self._size:
            self._scores.popitem(last=False)
        return before


def accepted(request: FeedbackRequest) -> dict[str, Any]:
    """The body of the answer. It does not say which arm it was: who rates must not know."""
    return {"object": "feedback", "id": request.id, "score": request.value}


def _signature(arms: Arms, name: str, arm: str) -> str:
    return hmac.digest(arms.salt.encode(), f"answer\0{name}\0{arm}".encode(errors="surrogatepass"), "sha256").hex()[:16]
