"""Proves that every checkpoint case of ../shared/cases ends as the table says: a right result, or one clear line."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

from crossmae.checkpoints.weights import read_weights
from crossmae.classification.probe.features import open_encoder
from crossmae.classification.train.config import ClassifierConfig, LabelledDataConfig
from crossmae.classification.train.train import build_model
from crossmae.errors import UserError
from tests.cases.conftest import Tool, Written
from tools import convert_checkpoint, inspect_checkpoint

# The file, the exit code of inspect_checkpoint, and a pattern that its output contains.
FACTS: dict[str, tuple[int, str]] = {
    "moco_vits.pth.tar": (0, r"heads +by the name vit_small of its trainer's model, as in moco-v3"),
    "int8.pth": (2, r"int8\.pth: quantized weights: .* \(int8\).* dequantize it there"),
    "fp8.pth": (2, r"fp8\.pth: quantized weights: .* \(float8_e4m3fn\).* dequantize it there"),
    "plain.pth": (0, r"heads +unknown.*--set num_heads=N(.|\n)*assumed +img_size: 32 is assumed for a square of 4 x 4"),
    "no_cls.pth": (0, r"assumed +norm_eps: 1e-06 is assumed(.|\n)*assumed +activation: gelu is assumed"),
}


@pytest.mark.parametrize("case", FACTS)
def test_what_a_file_does_not_tell(case: str, written: Written, tool: Tool) -> None:
    code, pattern = FACTS[case]
    found, output = tool(inspect_checkpoint.main, written("pretraining/checkpoints.py") / case)
    assert found == code, output
    assert re.search(pattern, output), output
    if code:
        assert len(output.strip().splitlines()) == 1


def test_moco_v3_keeps_its_heads_everywhere(written: Written, tool: Tool, tmp_path: Path) -> None:
    source = written("pretraining/checkpoints.py") / "moco_vits.pth.tar"
    code, output = tool(convert_checkpoint.main, source, tmp_path / "a.pth", "--to", "detectron2", "--drop", "head")
    assert code == 2, output  # nothing was to drop
    code, output = tool(convert_checkpoint.main, source, tmp_path / "a.pth", "--to", "detectron2")
    assert (code, "num_heads" in output) == (0, False), output
    assert '"num_heads": 12' in read_weights(tmp_path / "a.pth").metadata["model"]
    assert open_encoder(read_weights(source), "avg", None).architecture.num_heads == 12
    with pytest.raises(UserError, match=r"moco_vits\.pth\.tar: its encoder has num_heads 12, not 6"):
        open_encoder(read_weights(source), "avg", None, num_heads=6)


def test_heads_that_nothing_tells_are_said_and_stay_assumed(
    written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(written("pretraining/checkpoints.py") / "moco_vits.pth.tar", weights_only=True)
    prefix = "module.base_encoder."
    alone = {name.removeprefix(prefix): t for name, t in content["state_dict"].items() if name.startswith(prefix)}
    torch.save(alone, tmp_path / "alone.pth")
    line = "num_heads: 6 is assumed from the width 384, the file does not tell. Set model.num_heads=12 if it differs"
    assert line in open_encoder(read_weights(tmp_path / "alone.pth"), "avg", None).notes
    with caplog.at_level(logging.INFO):
        _, _, kept = build_model(
            ClassifierConfig(init=tmp_path / "alone.pth"), LabelledDataConfig(train="x"), 0, 2, None
        )
    assert f"model.init: {line}" in caplog.messages
    assert "num_heads" in kept["assumed"]
    given = ClassifierConfig(init=tmp_path / "alone.pth", num_heads=12)
    architecture, _, kept = build_model(given, LabelledDataConfig(train="x"), 0, 2, None)
    assert (architecture.num_heads, "num_heads" in kept["assumed"]) == (12, False)
