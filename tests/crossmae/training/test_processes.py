"""Proves how processes find each other. tests/faults/test_ranks.py proves that they train like one."""

from __future__ import annotations

import pytest

from crossmae.errors import UserError
from crossmae.training.processes import find_ranks


def test_processes_without_an_address_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set\. .*torchrun"):
        find_ranks()
