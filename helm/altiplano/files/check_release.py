"""Ask the services of a release whether they answer: what `helm test` runs. Arguments are NAME=URL; a service that wants a login answers too."""

import sys
import time
import urllib.error
import urllib.request

PATIENCE_S = 30  # with one service in a round: the first answer of a service that has just started takes its time


def answers(url: str) -> str | None:
    """None when the service answers, else what is wrong. 401 and 403 are answers: they come from behind the door."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return None if error.code in (401, 403) else f"HTTP {error.code}"
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        return str(error)


def check(services: dict[str, str], timeout_s: float) -> dict[str, str]:
    """What is wrong, by name, after `timeout_s` seconds and the round that is under way then, `PATIENCE_S` for each service at most; empty
    when all answer."""
    deadline = time.monotonic() + timeout_s
    wrong: dict[str, str] = {}
    while True:
        wrong = {name: reason for name, url in services.items() if (reason := answers(url)) is not None}
        if not wrong or time.monotonic() > deadline:
            return wrong
        time.sleep(2)


def main() -> int:
    """`check_release.py SECONDS NAME=URL...`"""
    services = dict(argument.split("=", 1) for argument in sys.argv[2:])
    wrong = check(services, float(sys.argv[1]))
    for name, url in services.items():
        print(f"{name}: {wrong.get(name, 'answers')} ({url})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
