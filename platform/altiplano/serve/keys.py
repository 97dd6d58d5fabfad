"""API keys: shown once, kept as hashes, compared in constant time, changed without a restart.

A key reads `alt-<id>-<secret>`. The id is public (it labels metrics, logs and quotas); the secret has 256 random bits, so one
SHA-256 is a sufficient hash. The file holds no secret: it may be mounted from a Kubernetes Secret or copied to a replica.
"""

import fcntl
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import msgspec

from altiplano.models.files import replace_file

PREFIX = "alt"
REFRESH_S = 1.0  # a revoked key is refused at most this much later
_NOBODY = hashlib.sha256(b"").hexdigest()

log = logging.getLogger("altiplano.keys")


class Scope(StrEnum):
    """What a route asks for and a key gives. `admin` includes all; `user` asks models, and `metrics` is read by who watches."""

    public = "public"
    metrics = "metrics"
    user = "user"
    admin = "admin"

    def includes(self, other: "Scope") -> bool:
        return self is Scope.admin or other in (self, Scope.public)


class KeyFileError(ValueError):
    """The key file cannot be used as it is."""


class KeyRefusedError(Exception):
    """No valid key; the message may be shown to the client."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key without its secret. Times are Unix seconds; a limit of None means the endpoint's default."""

    id: str
    name: str
    scope: Scope
    sha256: str
    created: int
    expires: int | None = None
    revoked: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None

    def state(self, now: float) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


class _Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()
    version: int = 1


class KeyFile:
    """Keys on disk. Writers take turns and replace the file in one move, so readers always see a whole one."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock

    def read(self) -> tuple[Key, ...]:
        """All keys, oldest first; none when there is no file yet.

        Raises:
            KeyFileError: the file is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return ()
        try:
            return msgspec.json.decode(data, type=_Contents).keys
        except msgspec.MsgspecError as error:
            raise KeyFileError(
                f"{self.path} is not a key file ({error}): restore it, or make new keys in another file"
            ) from error

    def create(
        self,
        name: str,
        scope: Scope = Scope.user,
        *,
        expires_in_s: int | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrency: int | None = None,
    ) -> tuple[Key, str]:
        """A new key and its text, which is not kept anywhere.

        Raises:
            KeyFileError: the file is damaged, or a value makes no sense.
        """
        if scope is Scope.public:
            raise KeyFileError("a key has the scope user, metrics or admin: public routes need no key")
        for label, value in (
            ("expires", expires_in_s),
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("max_concurrency", max_concurrency),
        ):
            if value is not None and value < 1:
                raise KeyFileError(f"{label} is {value}: give at least 1")
        now = int(self._clock())
        with self._turn():
            known = self.read()
            key_id = _fresh_id({key.id for key in known})
            text = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
            key = Key(
                key_id,
                name,
                scope,
                _digest(text),
                now,
                expires=None if expires_in_s is None else now + expires_in_s,
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                max_concurrency=max_concurrency,
            )
            self._write((*known, key))
        return key, text

    def revoke(self, key_id: str) -> Key:
        """Refuse a key from now on. Its record stays, so that old metrics and logs keep their meaning.

        Raises:
            KeyFileError: there is no such key.
        """
        with self._turn():
            known = self.read()
            found = next((key for key in known if key.id == key_id), None)
            if found is None:
                raise KeyFileError(f"{self.path} has no key {key_id!r}: `altiplano keys list` shows their ids")
            if found.revoked is None:
                changed = msgspec.structs.replace(found, revoked=int(self._clock()))
                self._write(tuple(changed if key is found else key for key in known))
                return changed
            return found

    @contextmanager
    def lend(self, name: str, lifetime_s: int = 600) -> Iterator[str]:
        """A user key for a check of our own; its record goes with it."""
        key, text = self.create(name, expires_in_s=lifetime_s)
        try:
            yield text
        finally:
            with self._turn():
                self._write(tuple(known for known in self.read() if known.id != key.id))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = (self.path.parent / f".{self.path.name}.lock").open("w")
        except OSError as error:
            raise KeyFileError(
                f"{self.path} cannot be changed here ({error.strerror}): where it is mounted from a Secret, change the Secret"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, keys: tuple[Key, ...]) -> None:
        replace_file(self.path, msgspec.json.format(msgspec.json.encode(_Contents(keys)), indent=2))


class KeyRing:
    """The keys as a serving process sees them. The file is looked at again every `REFRESH_S`, and for an id that is not known."""

    def __init__(
        self, file: KeyFile, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Raises:
            KeyFileError: the file is damaged or holds no key.
        """
        self._file, self._clock, self._monotonic = file, clock, monotonic
        self._stamp = self._stat()
        self._looked = monotonic()
        self._keys = {key.id: key for key in file.read()}
        if not self._keys:
            raise KeyFileError(f"{file.path} holds no API key: make one with `altiplano keys create NAME --file {file.path}`")

    def check(self, text: str) -> Key:
        """The key behind a client's text.

        Raises:
            KeyRefusedError: unknown, wrong, expired or revoked. Only who has the secret learns which of the last two.
        """
        if self._monotonic() - self._looked >= REFRESH_S or _id_of(text) not in self._keys:
            self._look()
        key = self._keys.get(_id_of(text))
        # An unknown id costs the same comparison as a wrong secret.
        right = hmac.compare_digest(_digest(text), key.sha256 if key is not None else _NOBODY)
        if key is None or not right:
            raise KeyRefusedError("this API key is not known here: check it, or ask for a new one")
        state = key.state(self._clock())
        if state != "active":
            raise KeyRefusedError(f"this API key is {state}: ask for a new one")
        return key

    def _look(self) -> None:
        self._looked = self._monotonic()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        try:
            fresh = {key.id: key for key in self._file.read()}
        except (KeyFileError, OSError) as error:
            log.error("the keys stay as they were: %s", error)
            return
        if not fresh:
            log.error("the keys stay as they were: %s is gone or empty; revoke keys instead", self._file.path)
            return
        self._stamp, self._keys = stamp, fresh

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _id_of(text: str) -> str:
    parts = text.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == PREFIX else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fresh_id(taken: set[str]) -> str:
    while (made := secrets.token_hex(4)) in taken:
        continue
    return made
