"""Where the ranks of a run meet: nobody listens there, and the system gives it to nobody else."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sparsepilot import ranks

DEALT_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        monkeypatch.setattr(ranks, "PORTS", (number, free := ranks.free_port()))
        assert {ranks.free_port() for _ in range(20)} == {free}


@pytest.mark.skipif(not DEALT_OUT.exists(), reason="Linux's own range of ports")
def test_the_system_does_not_deal_them_out() -> None:
    assert ranks.PORTS.stop <= int(DEALT_OUT.read_text().split()[0])
    assert ranks.JOB_PORTS.stop <= ranks.PORTS.start
