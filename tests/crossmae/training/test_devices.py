"""Proves how `auto` chooses precision and compilation, and that compiled blocks compute and copy like others.

`auto` takes the precision that a run has recorded, else what is faster on the device.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmae.classification.vit import Architecture, build_vit
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.layers import DropPath
from crossmae.training import devices, state
from crossmae.training.devices import (
    BF16_WIDTH,
    choose_compilation,
    choose_precision,
    compile_blocks,
    multiplies_bf16,
    open_device,
    widest_float,
)
from crossmae.training.resume import resumed_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("width", [0, BF16_WIDTH - 1, BF16_WIDTH])
def test_auto_takes_bf16_on_a_cpu_that_multiplies_it_and_for_wide_models(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, width: int
) -> None:
    monkeypatch.setattr("crossmae.training.devices.multiplies_bf16", lambda: has_bf16)
    expected = "bf16" if has_bf16 and width == BF16_WIDTH else "fp32"
    assert choose_precision("auto", CPU, width=width) == expected


@pytest.mark.parametrize("recorded", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_precision(monkeypatch: pytest.MonkeyPatch, recorded: str, tmp_path: Path) -> None:
    write_record(tmp_path, 1, {"fingerprint": {"precision": recorded}})
    for has_bf16 in (True, False):
        monkeypatch.setattr("crossmae.training.devices.multiplies_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert choose_precision(resumed_precision("auto", tmp_path), CPU, width=BF16_WIDTH) == recorded
    assert choose_precision(resumed_precision("fp16", tmp_path), CPU, width=BF16_WIDTH) == "fp16"


@pytest.mark.parametrize("names, expected", [(["avx512_bf16"], True), (["amx_bf16"], True), (["avx2"], False)])
def test_capabilities_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, names: list[str], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)
    assert multiplies_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert multiplies_bf16() is False


@pytest.mark.parametrize("major", [7, 8])
def test_auto_takes_bf16_on_a_gpu_that_computes_it(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """GPUs before Ampere emulate bf16, which torch counts as support unless it is asked."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or major >= 8

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda")
    assert choose_precision("auto", gpu) == ("bf16" if major >= 8 else "fp32")
    if major < 8:
        with pytest.raises(UserError, match=r"cuda has no bf16\. Choose fp16 or fp32"):
            choose_precision("bf16", gpu)


def test_the_chosen_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint waits for the current GPU, and its copies must be complete."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_device("cuda:1", "runtime.device") == torch.device("cuda:1")
    assert open_device("auto", "runtime.device", local_rank=3, processes=4) == torch.device("cuda:3")
    open_device("cpu", "runtime.device")
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:3")]


def test_apples_gpu_is_taken_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 by default. Not run on one."""
    with pytest.raises(UserError, match=r"^runtime\.device: torch has no mps here, .* Use runtime\.device=cpu"):
        open_device("mps", "runtime.device")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: device)
    device = open_device("mps", "runtime.device")
    assert device.type == "mps"
    assert choose_precision("auto", device, width=768) == "fp32"
    assert choose_compilation("auto", device) == (False, "")
    assert widest_float(device) == torch.float32
    with pytest.raises(UserError, match=r"2 processes cannot share mps"):
        open_device("mps", "runtime.device", processes=2)


def write_record(run: Path, step: int, content: Any) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps(content))


def test_the_precision_is_that_of_the_newest_checkpoint_that_records_one(tmp_path: Path) -> None:
    assert resumed_precision("auto", tmp_path) == "auto"
    for step, precision in enumerate(["fp32", "bf16"]):
        write_record(tmp_path, step, {"fingerprint": {"precision": precision}})
        assert resumed_precision("auto", tmp_path) == precision
    for step, odd in enumerate([[], {}, {"fingerprint": 3}, {"fingerprint": {"precision": ["fp32"]}}], start=2):
        write_record(tmp_path, step, odd)
        assert resumed_precision("auto", tmp_path) == "bf16"


@pytest.mark.parametrize(
    ("obstacle", "expected"),
    [
        (None, (True, "the blocks are compiled")),
        ("triton", (False, "the blocks are not compiled: Triton is not installed")),
        ("capability", (False, "the blocks are not compiled: Triton does not support compute capability 6.1")),
        ("compiler", (False, "the blocks are not compiled: Triton needs a C compiler")),
    ],
)
def test_auto_compiles_on_a_gpu_where_torch_can(
    monkeypatch: pytest.MonkeyPatch, obstacle: str | None, expected: tuple[bool, str]
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None if obstacle == "triton" else name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1) if obstacle == "capability" else (9, 0))
    monkeypatch.setattr(devices.shutil, "which", lambda name: None if obstacle == "compiler" else name)
    monkeypatch.delenv("CC", raising=False)
    gpu = torch.device("cuda")
    decision, sentence = choose_compilation("auto", gpu)
    assert decision is expected[0]
    assert sentence.startswith(expected[1])
    assert choose_compilation("auto", CPU) == (False, "")
    for device in (CPU, gpu):
        assert choose_compilation(False, device) == (False, "")
        assert choose_compilation(True, device)[0]


Network = tuple[nn.Module, Callable[[nn.Module], Tensor], list[str]]


def network(name: str) -> Network:
    """A model, its loss, and the names of its modules that are compiled."""
    torch.manual_seed(0)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    blocks = [f"blocks.{index}" for index in range(12)]
    if name == "classifier":
        vit = build_vit(Architecture((32, 32), 8, 3, 16, 12, 2, 4.0), 5)
        return vit, lambda model: model(images).square().mean(), blocks
    pretrained = CrossMAE(32, 8, 3, 16, 12, 2, 16, 12, 2, decoder=name)  # type: ignore[arg-type]
    names = [*blocks, *(["wfm"] if pretrained.fused_blocks else []), *(f"decoder_{block}" for block in blocks)]
    return pretrained, lambda model: model(images, noise=noise).loss, names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("name", "count"), [("cross", 3), ("cross_self", 3), ("self", 2), ("classifier", 1)])
def test_blocks_of_equal_structure_share_code_and_copies_are_not_compiled(
    name: str, count: int, graphs: list[Any]
) -> None:
    """Twelve blocks are more than torch compiles of one function, so that they must share."""
    model, loss_of, names = network(name)
    expected = loss_of(model)
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    keys = list(model.state_dict())
    state.compile_blocks(model)
    loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], msg=key)
    assert len(graphs) == count
    assert [key for key, module in model.named_modules() if module._compiled_call_impl] == names
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(module._compiled_call_impl for module in other.modules())
        for parameter in other.parameters():
            parameter.data.zero_()
        assert loss_of(other) != loss  # it has its own weights
    assert loss_of(model) == loss
    assert len(graphs) == count


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_drop_rates_share_code_and_drop_as_often(graphs: list[Any]) -> None:
    model = build_vit(Architecture((32, 32), 8, 3, 16, 12, 2, 4.0), 5, drop_path=0.3)
    state.compile_blocks(model)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert len(graphs) == 2  # the first block drops nothing
    layers = nn.ModuleDict({"blocks": nn.ModuleList(DropPath(rate) for rate in (0.0, 0.3, 0.9))})
    compile_blocks(layers, backend="eager")
    for layer in layers["blocks"]:  # type: ignore[attr-defined]
        dropped = layer(torch.ones(20_000, 2))
        assert torch.equal(dropped[:, 0], dropped[:, 1])
        share = 1 - layer.drop_prob
        assert dropped.unique().tolist() == pytest.approx([0, 1 / share] if share < 1 else [1])
        assert (dropped[:, 0] > 0).float().mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's advice about fp32
@pytest.mark.parametrize("name", ["cross", "classifier"])
def test_compiled_blocks_on_a_gpu_compute_the_same(name: str) -> None:
    """Not run on a GPU yet."""
    if obstacle := devices.compile_obstacle(torch.device("cuda")):
        pytest.skip(obstacle)
    with torch.device("cuda"):
        model, loss_of, _ = network(name)
    expected = loss_of(model)
    torch.compiler.reset()
    compile_blocks(model)
    torch.testing.assert_close(loss_of(model), expected, rtol=1e-4, atol=1e-5)
