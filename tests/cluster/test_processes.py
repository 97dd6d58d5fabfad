"""Ports for servers that are about to start."""

import random

import pytest

from altiplano.cluster import processes


def test_no_port_is_dealt_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several are dealt before anybody listens on the first one."""
    first, second = processes.free_port(), processes.free_port()
    monkeypatch.setattr(processes, "_dealt", set[int]())
    monkeypatch.setattr(random, "sample", lambda ports, count: [first, second])
    assert {processes.free_port(), processes.free_port()} == {first, second}
    with pytest.raises(processes.PortBusyError):
        processes.free_port()
