"""Proves that unrestricted unpickling is in one place, that it says so first, and that nothing falls back to it."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError
from crossmae.files import sha256

ROOT = Path(__file__).parents[4]


class Recorder:
    """Notes in the log when it is unpickled."""

    def __setstate__(self, state: dict[str, int]) -> None:
        logging.getLogger("payload").warning("runs")


def test_trust_is_announced_with_the_hash_before_anything_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    vars(recorder)["x"] = 1
    torch.save({"model": {"a": torch.ones(2)}, "config": recorder}, tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": torch.ones(2).numpy()}, "config": recorder}))
    for path in sorted(tmp_path.iterdir()):
        caplog.clear()
        with pytest.raises(UserError, match=r"refers to .*Recorder"):
            read_weights(path)
        assert not caplog.messages
        found = read_weights(path, trust=True)
        assert found.tensors["a"].tolist() == [1, 1]
        assert found.beside == ("config",)
        first, second = caplog.messages
        assert first.startswith(f"{path}: sha256 {sha256(path)}: --trust")
        assert second == "runs"


def test_trust_reads_whole_modules(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    torch.save({"model": model, "ema": nn.Linear(2, 1)}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth", trust=True)
    assert torch.equal(found.tensors["weight"], model.weight)
    assert found.beside == ("ema",)


def test_trust_does_not_read_what_is_damaged_or_not_installed(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04cno_such_module\nName\n.")
    with pytest.raises(UserError, match="refers to a module that is not installed: No module named 'no_such_module'"):
        read_weights(tmp_path / "a.pkl", trust=True)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a\.pth: truncated or damaged"):
        read_weights(tmp_path / "a.pth", trust=True)


def test_unrestricted_reading_is_in_one_place() -> None:
    unrestricted = re.compile(
        r"weights_only=False|pickle\.loads?\(|Unpickler\(pickle|(?<![.\w])(?:eval|exec)\(|yaml\.load\("
    )
    files = [path for folder in ("crossmae", "det", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert ROOT / "crossmae/checkpoints/weights.py" in files
    found = {str(path.relative_to(ROOT)) for path in files if unrestricted.search(path.read_text(encoding="utf-8"))}
    assert found == {"crossmae/checkpoints/reading/trusted.py"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert all("weights_only=" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path
    callers = {str(path.relative_to(ROOT)) for path in files if "read_trusted(" in path.read_text(encoding="utf-8")}
    assert callers == {"crossmae/checkpoints/reading/trusted.py", "crossmae/checkpoints/reading/files.py"}
