"""Device, precision and compilation of the computation."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from crossmae.errors import UserError, counted

# From this width on, bf16 is faster than fp32 on processors that multiply it. Below, conversions cost more than that.
BF16_WIDTH = 384

TRITON_CAPABILITY = (7, 0)  # lowest compute capability that Triton supports
_REGION = re.compile(r"(.*\.)?((decoder_)?blocks\.\d+|wfm)")  # names of the modules that `compile_blocks` compiles


def open_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of a device, disabled for "fp32"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def open_device(name: str, key: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Find a device by name, and test the device.

    A GPU becomes the current one, to which pinned memory, compiled code and `torch.cuda.synchronize` belong.

    Args:
        name: such as "cpu", "cuda:1" or "mps" (Apple's GPU, where nothing was tested). "auto" is a CUDA GPU if there
            is one, else the CPU. "cuda" is the GPU of this process.

    Raises:
        UserError: If this machine has no such device, or all processes would share one GPU.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if processes > 1 and chosen.startswith("cuda:"):
        raise UserError(
            f"{key}: {processes} processes cannot share {chosen}. Use cuda: each process takes its own GPU."
        )
    check_mps(chosen, key)
    if processes > 1 and chosen.startswith("mps"):
        raise UserError(f"{key}: {processes} processes cannot share {chosen}. Start one process, or use cpu.")
    try:
        device = torch.device(f"cuda:{local_rank}" if chosen == "cuda" else chosen)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{key}: {chosen!r} cannot be used: {str(error).splitlines()[0]}. Name another device."
        ) from None
    return device


def check_mps(name: str, key: str) -> None:
    """Reject the device "mps" where torch does not have it."""
    if name.startswith("mps") and not torch.backends.mps.is_available():
        raise UserError(
            f"{key}: torch has no {name} here, which needs a Mac with Apple silicon. Use {key}=cpu, or cuda with a GPU."
        )


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def choose_precision(precision: str, device: torch.device, key: str = "runtime.precision", width: int = 0) -> str:
    """Resolve "auto" to "bf16" where it is faster, else to "fp32".

    On a CPU, bf16 is faster if its instructions multiply bf16 and the model is wide.

    Args:
        width: width of the encoder. 0: "auto" is "fp32" on a CPU.

    Raises:
        UserError: If the device has no bf16.
    """
    if precision == "auto":
        pays = width >= BF16_WIDTH and multiplies_bf16() if device.type == "cpu" else has_bf16(device)
        return "bf16" if pays else "fp32"
    if precision == "bf16" and not has_bf16(device):
        raise UserError(f"{key}: {device} has no bf16. Choose fp16 or fp32.")
    return precision


def has_bf16(device: torch.device) -> bool:
    """Check for bf16 on a device.

    GPUs before Ampere only emulate bf16: slower than fp32, and Triton does not compile it.
    """
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" or on_gpu


def multiplies_bf16() -> bool:
    """Check for instructions of this processor that multiply bf16.

    False if torch cannot tell.
    """
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(found.get(name)) for name in ("amx_bf16", "avx512_bf16"))


def describe_place(device: torch.device, precision: str, processes: int) -> str:
    """Format device, processes and precision for the log."""
    more = f" and {counted(processes - 1, 'more process')}" if processes > 1 else ""
    return f"{device}{more} in {precision}"


def choose_compilation(wanted: bool | Literal["auto"], device: torch.device) -> tuple[bool, str]:
    """Resolve "auto": compile on a GPU where torch.compile works.

    Returns:
        The decision, and a sentence about it for the log. The sentence is "" for a CPU without compilation.
    """
    obstacle = compile_obstacle(device) if wanted == "auto" else ""
    if wanted == "auto":
        wanted = device.type == "cuda" and not obstacle
    if wanted:
        return True, "the blocks are compiled, so the first step takes longer"
    return False, f"the blocks are not compiled: {obstacle}" if obstacle else ""


def compile_obstacle(device: torch.device) -> str:
    """Return the reason why torch cannot compile for a GPU, or ""."""
    if device.type != "cuda":
        return ""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if (found := torch.cuda.get_device_capability(device)) < TRITON_CAPABILITY:
        return f"Triton does not support compute capability {found[0]}.{found[1]}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler"
    return ""


def compile_blocks(
    model: nn.Module, dynamic: bool | None = False, fullgraph: bool = True, backend: str = "inductor"
) -> list[str]:
    """Compile every transformer block and the mix of feature maps, in place.

    Blocks of equal structure share their compiled code, so that 24 blocks take the time of one. State dicts, pickles
    and deep copies of the model do not change: copies are not compiled.

    Args:
        dynamic: False: each input shape is compiled. None: after a second shape, code for all shapes.
        fullgraph: raise an error where a block cannot be one graph.
        backend: see `torch.compile`.

    Returns:
        Names of the compiled modules.
    """
    regions = {name: module for name, module in model.named_modules() if _REGION.fullmatch(name)}
    for module in regions.values():
        module.compile(dynamic=dynamic, fullgraph=fullgraph, backend=backend)
    return list(regions)
