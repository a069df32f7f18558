"""Proves that several processes train like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crossmae.errors import UserError
from crossmae.pretraining.train import pretrain
from crossmae.training.processes import find_ranks
from tests.crossmae.pretraining.runs import assert_same, digest, judged, log_lines, make_config

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_to_the_bit(images: Path, labelled: Path, tmp_path: Path) -> None:
    """Two processes with half the batch each see the same images as one: equal curves and weights up to rounding."""
    single = make_config(images, tmp_path / "single", **judged(labelled))
    pretrain(single)
    half = make_config(images, tmp_path / "half", **judged(labelled), optim={"batch_size": 2})
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(half.model_dump(mode="json")))

    def launch(*words: str) -> None:
        module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*module, str(ROOT / "tools/pretrain.py"), "--config-file", str(path), *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    launch()
    for key in ("loss", "val_loss", "knn_accuracy"):
        one, two = (log_lines(tmp_path / name, key) for name in ("single", "half"))
        assert [step for step, _ in one] == [step for step, _ in two]
        assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=1e-4)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("single", "half")}
    for name, tensor in weights["single"].items():
        torch.testing.assert_close(weights["half"][name], tensor, rtol=1e-3, atol=2e-4)  # Adam enlarges rounding
    whole = digest(tmp_path / "half")
    launch(f"output_dir={tmp_path / 'parts'}", "schedule.max_steps=4")
    launch(f"output_dir={tmp_path / 'parts'}", "--resume")
    assert_same(whole, digest(tmp_path / "parts"))
    with pytest.raises(UserError, match="processes was 2, is 1"):
        pretrain(half, resume=True)


def test_processes_without_an_address_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set\. .*torchrun"):
        find_ranks()
