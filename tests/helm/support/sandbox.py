"""A pod as the kubelet would start it, where no kubelet is: a network, processes and /tmp of its own, everything else read-only, the image's user.

Linux namespaces do it, which takes root. What is missing beside a real pod: cgroups, seccomp, the volumes, and KubeRay's init container.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .charts import ROOT

USER = 10001
# gVisor and Docker mount much below /, and each mount has its own flag.
_START = """
set -e
tmp=$1 python=$2 root=$3; shift 3
ip link set lo up
until ip -o -4 addr show dev eth0 2>/dev/null | grep -q inet; do sleep 0.1; done
mount --make-rprivate /
# A Python below a home that only its owner enters.
if ! setpriv --reuid USER --clear-groups test -x "$python/bin"; then
  mkdir "$tmp/python"
  mount --bind "$python" "$tmp/python"
  mount -t tmpfs -o mode=755 tmpfs "/$(cut -d/ -f2 <<< "$python")"
  mkdir -p "$python"
  mount --bind "$tmp/python" "$python"
fi
# A checkout below the /tmp that the pod's own will hide.
if [[ $root == /tmp/* ]]; then
  mkdir -p "$tmp/${root#/tmp/}"
  mount --rbind "$root" "$tmp/${root#/tmp/}"
  mount -o remount,ro,bind "$tmp/${root#/tmp/}"
fi
mount --rbind "$tmp" /tmp
awk '$2 !~ "^/(proc|sys|dev|tmp)(/|$)" {print $2}' /proc/mounts | sort -u | while read -r place; do
  mount -o remount,ro,bind "$place" 2>/dev/null || true
done
cd /
exec setpriv --reuid USER --regid USER --clear-groups --no-new-privs --bounding-set -all --inh-caps -all -- "$@"
""".replace("USER", str(USER))


def permitted() -> bool:
    """Whether this process may make namespaces and links."""
    command = ["unshare", "-mnpf", "--mount-proc", "ip", "link", "add", "name", "veth0", "type", "veth", "peer", "name", "veth1"]
    try:
        return os.geteuid() == 0 and subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    except FileNotFoundError:
        return False


class Pod:
    """One container that runs `command` as user 10001 with exactly this environment, PATH and HOME aside."""

    def __init__(self, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
        self.tmp = folder
        self._environment = {
            "PATH": f"{ROOT / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": "/home/altiplano",
            **environment,
        }
        script = ["bash", "-c", _START, "pod", str(folder), sys.base_prefix, str(ROOT), *command]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "-n", "unshare", "-mpf", "--mount-proc", *script],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def wait_until_it_runs(self) -> None:
        """Its file systems are in place and its first process is the image's user."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # it has ended a moment ago
                status = Path(f"/proc/{self.pid}/status").read_text()
                if f"Uid:\t{USER}" in status:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the pod did not start: {self.log()}")

    def run(self, *command: str, timeout: float = 240, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the pod, as `kubectl exec` runs it; `text` goes to its standard input."""
        return subprocess.run(self._inside(*command), input=text, **self._how(), timeout=timeout, check=False)  # type: ignore[call-overload,no-any-return]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """The same, without waiting for its end."""
        return subprocess.Popen(self._inside(*command), stdin=subprocess.DEVNULL, **self._how())  # type: ignore[call-overload,no-any-return]

    def log(self) -> str:
        """What its first process has printed."""
        return (self.tmp / "log").read_text(errors="replace")

    def wait(self, timeout: float) -> int:
        """Its first process's exit status, when it has ended by itself."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """Kill everything in it: with the first process of a namespace all others go."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended a moment ago
                os.kill(self.pid, signal.SIGKILL)
        self._process.wait(timeout=120)

    @functools.cached_property
    def pid(self) -> int:
        """Its first process, as the machine counts."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self._process.poll() is None:
            for entry in Path("/proc").glob("[0-9]*/stat"):
                try:
                    fields = entry.read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[1]) == self._process.pid:
                    return int(entry.parent.name)
            time.sleep(0.1)
        raise AssertionError(f"the pod did not start: {self.log()}")

    def _inside(self, *command: str) -> list[str]:
        drop = [
            "setpriv",
            "--reuid",
            str(USER),
            "--regid",
            str(USER),
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set",
            "-all",
        ]
        return ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", *drop, "--", *command]

    def _how(self) -> dict[str, object]:
        return {"env": self._environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"}


def connect(first: Pod, second: Pod) -> tuple[str, str]:
    """A network of two pods, which they wait for; their addresses when both run."""
    addresses = ("10.77.0.1", "10.77.0.2")
    name = f"v{os.getpid() % 100000}"
    _ip("link", "add", "name", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
    for pod, link, address in ((first, f"{name}a", addresses[0]), (second, f"{name}b", addresses[1])):
        _ip("link", "set", link, "netns", str(pod.pid))
        inside = ["nsenter", "-t", str(pod.pid), "-n", "ip"]
        for words in (
            ["link", "set", link, "name", "eth0"],
            ["addr", "add", f"{address}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
        ):
            subprocess.run([*inside, *words], check=True, timeout=120)
    for pod in (first, second):
        pod.wait_until_it_runs()
    return addresses


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=120)
