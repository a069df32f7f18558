"""Every suite runs at tiny sizes, its two sides compute the same, and the results are a table, a JSON and a picture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]'")

from crossmae.models.crossmae import FeatureMixer
from tests.tools.command_line import exit_code
from tools import benchmark
from tools.benchmarks import backbone, pretraining, results, suites
from tools.benchmarks.measuring import Comparison, Gate, Row, measure, peak_memory
from tools.benchmarks.suites import open_suite, run_suite

CPU = torch.device("cpu")
MODEL = {
    **{"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2},
}
DETECTOR = (
    *("MODEL.VIT.EMBED_DIM=24", "MODEL.VIT.DEPTH=2", "MODEL.VIT.NUM_HEADS=2", "MODEL.VIT.OUT_CHANNELS=8"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM=16", "MODEL.VIT.IMG_SIZE=64", "TEST.DETECTIONS_PER_IMAGE=5"),
)
VIT = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "flops": {"sizes": ["base_patch16"], "depths": [8], "ratios": [0.25]},
    "pretrain": {"steps": [("small_patch16", 2, 1.0, 1.0, 2.0)], "overrides": MODEL, "curve": 3},
    "fusion": {"images": 2, "overrides": MODEL},
    "attention": {
        "layers": (("global", 1, 8, {"cpu": 1}, {}, {}, {}), ("window", 3, 4, {}, {}, {}, {})),
        **{"width": 32, "heads": 2},
    },
    "vitdet": {"img_size": 64, "size": VIT, "window": 3},
    "optimizer": {"overrides": MODEL},
    "checkpoint": {"overrides": MODEL},
    "detector": {"detectors": (("demo_mask_rcnn.yaml", 64, 2, (2,), {}, {}, {}),), "overrides": DETECTOR},
    "growth": {
        **{"sides": (32, 64), "batches": (1, 2), "files": (10, 20), "annotations": (100, 200)},
        "overrides": MODEL,
    },
    "loader": {"images": 3, "side": 60, "crop": 32, "files": 50, "shard_side": 40},
    "cocoeval": {
        **{"images": 4, "per_image": 6, "objects": 3, "categories": 2},
        **{"pasted": ((5, 64, 48, 1.0),), "annotations": 200},
    },
    "start": {"commands": [("python", ("-c", "pass"), 0, 1.0)]},
    "finetune": {
        **{"images": 2, "img_size": 32, "classes": 5},
        "overrides": {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
}


def run(name: str, **sizes: Any) -> list[Row | results.Growth]:
    found: list[Row | results.Growth] = []
    run_suite(name, open_suite(name, CPU, **sizes), CPU, 0.0, found.append, least=1, with_memory=name == "fusion")
    return found


@pytest.mark.parametrize("name", [name for name in TINY if name != "flops"])  # below
def test_a_suite_measures_all_its_rows(name):
    found = run(name, **TINY[name])
    assert found
    for row in found:
        if isinstance(row, results.Growth):
            assert len(row.sizes) == len(row.seconds) == len(row.megabytes) > 1
            continue
        assert (row.suite, row.device, row.void) == (name, "cpu", "")
        assert row.ratio is None or row.ratio > 0
        assert row.gate or row.note or row.clock == "count"


@pytest.mark.parametrize("both", [False, True], ids=["forward", "both passes"])
def test_attention_needs_a_fraction_of_detectron2s_memory(both):
    comparison = backbone.compare_attention("global", 1, 40, 48, 6, CPU, both, {}, {})
    comparison.ours(), comparison.other()
    ours, other = (peak_memory(side, CPU) for side in (comparison.ours, comparison.other))
    if ours is None or other is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert other > 6 * 40**4 * 4  # a matrix of all scores
    assert ours < other / 2  # a tenth was measured


def test_the_papers_arithmetic_is_counted():
    (row,) = run("flops", **TINY["flops"])
    assert isinstance(row, Row)
    assert (row.what, row.goal) == ("decoder of ViT-B, 25% predicted, depth 8", 3.88)
    assert (row.ratio, row.verdict) == (3.88, "met")


def test_broken_sides_void_their_rows(monkeypatch):
    tiny = {**MODEL, "decoder": "cross"}
    monkeypatch.setattr(pretraining.CrossMAE, "targets", lambda self, imgs, idx: torch.zeros(1))
    row = measure(pretraining.against_port("step", tiny, 2, CPU, "fp32", None), "pretrain", CPU, 0.0)
    assert row.verdict == "void"
    row = measure(pretraining.choose_patches(tiny, 2, CPU), "fusion", CPU, 0.0)
    assert row.verdict == "void"
    with monkeypatch.context() as patch:
        mix = FeatureMixer.forward
        patch.setattr(FeatureMixer, "forward", lambda self, maps: mix(self, maps) + 1e-4 * maps[0])
        row = measure(pretraining.fuse_maps(tiny, 2, CPU), "fusion", CPU, 0.0)
    assert row.verdict == "void"
    layer = partial(backbone.compare_attention, "global", 1, 4, 32, 2, CPU, True, {}, {})
    with monkeypatch.context() as patch:  # without relative positions
        patch.setattr(backbone.SpatialAttention, "forward", lambda self, x: self.proj(self.qkv(x)[..., :32]))
        assert measure(layer(), "attention", CPU, 0.0).verdict == "void"


def test_gates_compare_gradients(monkeypatch):
    comparison = backbone.compare_attention("global", 1, 4, 32, 2, CPU, True, {}, {})
    assert comparison.gate is not None
    assert comparison.gate().holds
    plain = backbone.SpatialAttention.forward

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = plain(self, x)
        return y + (y - y.detach())  # the same values, twice the gradient

    monkeypatch.setattr(backbone.SpatialAttention, "forward", forward)
    assert not comparison.gate().holds


def fail() -> Comparison:
    raise RuntimeError("no such\nlibrary")


def test_a_measurement_that_fails_is_a_void_row_and_the_others_continue():
    found: list[Any] = []
    run_suite("fusion", [partial(fail), lambda: Row("fusion", "w", "a", ratio=1.0)], CPU, 0.0, found.append)
    assert [row.void for row in found] == ["failed: RuntimeError: no such library", ""]
    assert found[0].what == "fail"


def test_exponents_are_those_of_a_power_law():
    assert results.fit_exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_the_command_writes_table_json_and_picture(tmp_path: Path, monkeypatch, capsys):
    rows = [
        Row("fusion", "met", "a", goal=2.0, ratio=2.5, lowest=2.0, highest=3.0, seconds=0.5, other_seconds=1.25),
        Row("fusion", "void", "b", gate=Gate(1.0, 1e-5), void="results differ"),
    ]
    growth = results.Growth("files", "files", (10, 100), (0.1, 1.0), (None, 2.5), 1.0)
    monkeypatch.setattr(suites, "open_suite", lambda *_: [lambda row=row: row for row in (*rows, growth)])
    out, picture, table = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "out.md"
    words = ["fusion", "--minutes", "0.1", "--json", str(out), "--plot", str(picture), "--table", str(table)]
    assert exit_code(benchmark.main, *words) == 0
    printed = capsys.readouterr().out
    assert "2.50" in printed
    assert "results differ" in printed
    record = json.loads(out.read_text())
    assert {"format", "command", "date", "versions", "machine", "threads", "device", "minutes"} < record.keys()
    assert {"git", "torch"} < record["versions"].keys()
    assert {"processor", "cores", "memory_gb"} < record["machine"].keys()
    assert record["command"].endswith(" ".join(words))
    met, void = record["rows"]
    assert (met["ratio"], met["goal"], met["verdict"], met["seconds"]) == (2.5, 2.0, "met", 0.5)
    assert (void["ratio"], void["verdict"], void["gate"]) == (None, "void", {"difference": 1.0, "limit": 1e-5})
    assert record["growth"][0]["sizes"] == [10, 100]
    assert "| fusion  | met" in table.read_text()
    with Image.open(picture) as image:
        assert image.width > 500


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("fusion", "--minutes", "0"), ("--threads", "-1"), ("fusion", "--json", "/nowhere/at/all.json")],
)
def test_wrong_arguments_are_named(arguments):
    assert exit_code(benchmark.main, *arguments) == 2


def test_every_suite_of_the_help_exists():
    assert set(suites.SUITES) == set(benchmark.NAMES) == set(TINY)
    assert set(suites.ON_GPU) <= set(benchmark.NAMES)


def test_a_missing_library_voids_its_suite_alone(monkeypatch, capsys):
    def open_suite(name, *_):
        if name == "attention":
            raise ModuleNotFoundError("No module named 'detectron2'")
        return [lambda: Row("fusion", "there", "a", ratio=2.5)]

    monkeypatch.setattr(suites, "open_suite", open_suite)
    assert exit_code(benchmark.main, "attention", "fusion", "--minutes", "0.1") == 0
    printed = capsys.readouterr().out
    assert "No module named 'detectron2'" in printed
    assert "fusion: there" in printed
