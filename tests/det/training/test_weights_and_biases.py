"""Weights & Biases gets what the log of a detector's run has. The library is not needed: a stand-in notes the calls."""

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from tools.train_net import main


def test_weights_and_biases_gets_losses_and_ap(command, tmp_path, monkeypatch, no_pictures):
    logged, given = [], {}
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **settings: given.update(settings) or run, Image=lambda path: path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    main([*command, "WANDB=mine", "SOLVER.MAX_ITER=2"])
    assert (given["project"], given["config"]["SOLVER"]["MAX_ITER"]) == ("mine", 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    sent = {step: set().union(*(values for one, values in logged if one == step)) for step, _ in logged}
    assert {"loss", "lr", "bbox/AP", "segm/AP"} <= sent[2]
    assert all(line.keys() - {"step", "epoch"} <= sent[line["step"]] for line in lines)
