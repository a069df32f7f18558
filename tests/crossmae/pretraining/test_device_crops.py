"""Proves that crops of the device are the crops of the CPU, to two grey levels, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF

from crossmae.data.pixels import CropBox
from crossmae.pretraining.device_crops import (
    PackedCrops,
    bicubic_weights,
    cut_out,
    pack_crops,
    resize_crops,
)

CPU = torch.device("cpu")
# Photographs, enlargements of few pixels, strips, large reductions, and the sides of views.
SHAPES = [(300, 400), (50, 40), (3, 5), (1, 1), (1, 300), (300, 1), (900, 30), (700, 800), (2, 2), (64, 64), (32, 56)]
SIZES = [(64, 64), (32, 56), (80, 48)]


def pixels_of(kind: str, channels: int, shape: tuple[int, int], draw: np.random.Generator) -> Tensor:
    """Draw an image (C, H, W) with its channels last in memory, as decoded images have them."""
    height, width = shape
    if kind == "noise":
        pixels = draw.integers(0, 256, (height, width, channels), np.uint8)
    elif kind == "black and white":
        pixels = draw.integers(0, 2, (height, width, channels), np.uint8) * np.uint8(255)
    else:
        y, x = np.mgrid[:height, :width] / max(height, width, 2)
        pixels = np.stack([255 * (y * (c % 2) + x * ((c + 1) % 2)) for c in range(channels)], -1).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def view_of(pixels: Tensor, box: CropBox, size: tuple[int, int]) -> Tensor:
    """Compute a view as the loader does on the CPU."""
    bicubic = InterpolationMode.BICUBIC
    view = VF.resized_crop(pixels, *box[:4], size=list(size), interpolation=bicubic, antialias=True)
    return VF.horizontal_flip(view) if box.is_flipped else view


def crops_of(
    kind: str, channels: int, shapes: Sequence[tuple[int, int]] = SHAPES
) -> tuple[list[Tensor], list[CropBox]]:
    """Draw larger images and their crops of these shapes, every second one flipped."""
    draw = np.random.default_rng(channels)
    images = [pixels_of(kind, channels, (height + 9, width + 7), draw) for height, width in shapes]
    return images, [CropBox(4, 3, *shape, number % 2 == 0) for number, shape in enumerate(shapes)]


def packed(kind: str, channels: int, size: tuple[int, int], most: int = 2**24) -> PackedCrops:
    return pack_crops([cut_out(*pair) for pair in zip(*crops_of(kind, channels), strict=True)], size, most)


def difference(first: Tensor, second: Tensor) -> Tensor:
    """The differences of all views in grey levels."""
    assert first.dtype == second.dtype == torch.uint8
    return (first.int() - second.int()).abs()


@pytest.mark.parametrize("kind", ["noise", "black and white", "gradients"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_views_are_those_of_the_cpu_to_two_grey_levels(size: tuple[int, int], channels: int, kind: str) -> None:
    images, boxes = crops_of(kind, channels)
    expected = torch.stack([view_of(*pair, size) for pair in zip(images, boxes, strict=True)])
    found = difference(resize_crops(packed(kind, channels, size), CPU), expected)
    assert found.max() <= 2
    assert found.float().mean() < 0.02


def test_photographs_are_those_of_the_cpu_to_two_grey_levels() -> None:
    pytest.importorskip("skimage", reason="scikit-image has the photographs")
    from tools.make_demo_data import load_photograph

    names = ("astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg")
    images = [VF.pil_to_tensor(load_photograph(name, 1200)) for name in names]
    boxes = [CropBox(20, 30, 200 + 10 * n, 250, n % 2 == 0) for n in range(4)] + [CropBox(5, 7, 40, 30, True)]
    images.append(images[0])
    expected = torch.stack([view_of(*pair, (224, 224)) for pair in zip(images, boxes, strict=True)])
    crops = pack_crops([cut_out(*pair) for pair in zip(images, boxes, strict=True)], (224, 224))
    found = difference(resize_crops(crops, CPU), expected)
    assert found.max() <= 2
    assert found.float().mean() < 0.01


@pytest.mark.parametrize("side", [1, 2, 3, 7, 64, 100, 1000])
@pytest.mark.parametrize("size", [1, 8, 64, 225])
def test_weights_are_those_of_pillow(side: int, size: int) -> None:
    """Pillow resizes the rows of an identity matrix to the columns of the weights."""
    identity = Image.fromarray(np.eye(side, dtype=np.float32))
    expected = torch.from_numpy(np.array(identity.resize((size, side), Image.Resampling.BICUBIC))).T
    sides, flip = torch.tensor([side, side]), torch.tensor([0, 1])
    weights = bicubic_weights(sides, side + 5, size, flip)
    assert torch.equal(weights[1], weights[0].flip(0))
    assert not weights[..., side:].any()
    torch.testing.assert_close(weights[0, :, :side], expected, rtol=0, atol=2e-5)


def test_images_of_more_bits_are_resized_without_rounding() -> None:
    images, boxes = crops_of("noise", 2)
    deep = [image / 255 for image in images]
    expected = torch.stack([view_of(*pair, (32, 56)) for pair in zip(deep, boxes, strict=True)]).clamp(0, 1)
    views = resize_crops(pack_crops([cut_out(*pair) for pair in zip(deep, boxes, strict=True)], (32, 56)), CPU)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-4)


def test_results_repeat_to_the_bit_also_within_autocast() -> None:
    crops = packed("noise", 3, (64, 64))
    views = resize_crops(crops, CPU)
    assert torch.equal(resize_crops(crops, CPU), views)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_crops(crops, CPU), views)


class Operations(TorchDispatchMode):
    """Records the operators, and the number of elements of their largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_chunks_bound_the_memory_and_change_nothing() -> None:
    """Small chunks, and bands of rows of single crops. Sums of other order may move a value across a rounding."""
    images, boxes = crops_of("noise", 3)
    largest = []
    for most in (2**24, 100_000):
        crops = packed("noise", 3, (64, 64), most)
        with Operations() as operations:
            views = resize_crops(crops, CPU, most)
        largest.append(operations.largest)
        assert sorted(crops.table[:, 0].tolist()) == list(range(len(images)))
        assert [chunk[0] for chunk in crops.chunks[1:]] == [chunk[1] for chunk in crops.chunks[:-1]]
        reference = torch.cat(
            [
                resize_crops(pack_crops([cut_out(image, box)], (64, 64)), CPU)
                for image, box in zip(images, boxes, strict=True)
            ]
        )
        found = difference(views, reference)
        assert found.max() <= 1
        assert found.float().mean() < 1e-3
    assert largest[0] > 3 * 700 * 800
    # The views, the packed pixels, or the first product of the tallest crop: no bound applies to these.
    assert largest[1] <= max(len(images) * 3 * 64 * 64, 3 * 900 * 64, 100_000)


def test_number_of_operators_depends_on_chunks_only() -> None:
    counts = []
    for images in (1, 9):
        shapes = [(40, 30 + number) for number in range(images)]
        cuts = [cut_out(*pair) for pair in zip(*crops_of("noise", 3, shapes), strict=True)]
        crops = pack_crops(cuts, (32, 32))
        with Operations() as operations:
            resize_crops(crops, CPU)
        counts.append(len(operations.names))
    assert counts[0] == counts[1] < 150


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_host_never_waits_for_the_device(dtype: torch.dtype) -> None:
    """Fake tensors have no values: reading one on the host is an error."""
    crops = packed("noise", 3, (32, 56), 100_000)
    with FakeTensorMode(), Operations() as operations:
        pixels = torch.empty(crops.pixels.shape, dtype=dtype, device="cuda")
        table = torch.empty(crops.table.shape, dtype=torch.int64, device="cuda")
        views = resize_crops(crops._replace(pixels=pixels, table=table), torch.device("cuda"), 100_000)
        assert (views.shape, views.dtype, views.device.type) == ((len(SHAPES), 3, 32, 56), dtype, "cuda")
        with pytest.raises(DataDependentOutputException):
            table[0, 0].item()
    assert operations.names[-1] == "_local_scalar_dense"
    hosts = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}
    assert not hosts & set(operations.names[:-1])


def test_memory_of_a_batch_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader pins tensors of tuples, and turns plain tuples into lists."""
    crops = packed("noise", 3, (32, 56))
    seen: list[Tensor] = []

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    copy = pin_memory(crops)
    assert isinstance(copy, PackedCrops)
    assert len(seen) == 2
    assert torch.equal(resize_crops(copy, CPU), resize_crops(crops, CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_gpu_computes_what_the_cpu_computes(channels: int) -> None:
    """To one grey level, to the bit each time, and without a synchronisation."""
    device = torch.device("cuda")
    for kind in ("noise", "black and white", "gradients"):
        crops = packed(kind, channels, (64, 64), 200_000)
        pinned = pin_memory(crops)
        first = resize_crops(pinned, device, 200_000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = resize_crops(pinned, device, 200_000)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, second)
        assert difference(first.cpu(), resize_crops(crops, CPU, 200_000)).max() <= 1
