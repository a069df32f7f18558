"""Proves that codes of quantizers are never read as weights, and that counters, indices and halves still are."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from crossmae.checkpoints import inspect
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
STATE = ViTEncoder(**TINY).state_dict()
LAYERS = [name for name, tensor in STATE.items() if name.startswith("blocks.") and tensor.ndim == 2]


def beside(suffix: str, tensor: Tensor) -> dict[str, Tensor]:
    return {f"{name.removesuffix('weight')}{suffix}": tensor.clone() for name in LAYERS}


def cast(dtype: torch.dtype) -> dict[str, Tensor]:
    return STATE | {name: (STATE[name] * 100).to(dtype) for name in LAYERS}


CODES: dict[str, dict[str, Tensor]] = {
    "int8": cast(torch.int8),
    "int8 with scales": cast(torch.int8) | beside("weight_scale", torch.ones(1)),
    "uint8": cast(torch.uint8),
    "int32": cast(torch.int32),
    "float8": cast(torch.float8_e4m3fn),
    "float8 with scales": cast(torch.float8_e5m2) | beside("weight_scale_inv", torch.ones(1)),
    "bitsandbytes, 8 bits": cast(torch.int8) | beside("SCB", torch.ones(16)),
    "bitsandbytes, 4 bits": STATE | beside("weight", torch.zeros(8, 1, dtype=torch.uint8)),
    "GPTQ and AWQ": STATE | beside("qweight", torch.zeros(2, 2, dtype=torch.int32)) | beside("scales", torch.ones(2)),
    "compressed-tensors": STATE | beside("weight_packed", torch.zeros(2, 2, dtype=torch.int32)),
    "scales next to halves": STATE | beside("weight_scale", torch.ones(1)),
}


def write(path: Path, tensors: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", CODES[kind])
    for read in (read_weights, inspect):
        with pytest.raises(UserError, match=rf"a{suffix}: quantized weights: blocks\.0\..*dequantize it there"):
            read(path)


def test_codes_in_a_pickle_of_arrays_are_refused(tmp_path: Path) -> None:
    arrays = {name: (tensor.numpy() * 100).astype(np.int8) for name, tensor in STATE.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=4))
    with pytest.raises(UserError, match=r"a\.pkl: quantized weights: .* \(int8\)"):
        read_weights(tmp_path / "a.pkl")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_counters_and_indices_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    tensors["head.0.num_batches_tracked"] = torch.tensor(3)
    tensors["blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    tensors["blocks.0.attn.mask"] = torch.ones(4, 4, dtype=torch.bool)
    assert read_weights(write(tmp_path / "a.pth", tensors)).tensors.keys() == tensors.keys()
