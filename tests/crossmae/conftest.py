"""Small image folders, and graphs of compiled blocks, that tests of training share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossmae.training import state
from crossmae.training.devices import compile_blocks


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(13):
        slope, phase = rng.uniform(-6, 6, (2, 3)), rng.uniform(0, 6, 3)
        waves = np.sin(np.einsum("kyx,kc->yxc", np.mgrid[0:1:32j, 0:1:32j], slope) + phase)
        Image.fromarray((127.5 + 127.5 * waves).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes across or along, in folders train/ and val/ with one subfolder per class."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 6)):
        for name in ("across", "along"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                wave = 127.5 + 100 * np.sin(np.arange(32) * rng.uniform(0.4, 0.9) + rng.uniform(0, 6))
                pixels = np.broadcast_to(wave[:, None] if name == "across" else wave, (32, 32))
                Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs of the blocks that runs compile, which run as they are."""
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(state, "compile_blocks", partial(compile_blocks, backend=backend))
    torch.compiler.reset()
    return found
