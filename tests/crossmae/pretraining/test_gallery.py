"""Proves what is written for image files: the same bytes each time, masks by content, any number of channels."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from crossmae.checkpoints.pretrained import Pretrained
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.pretraining.gallery import (
    END_MS,
    FRAME_MS,
    animation_frame,
    load_images,
    mean_psnr,
    output_names,
    possible_ratios,
    save_gif,
    write_gallery,
)
from crossmae.pretraining.reconstruction import Panels


def pretrained(channels: int = 3, decoder: str = "cross", img_size: Any = (16, 32), patch_size: int = 4) -> Pretrained:
    torch.manual_seed(0)
    model = CrossMAE(img_size, patch_size, channels, 16, 2, 2, 16, 2, 2, decoder=decoder)  # type: ignore[arg-type]
    return Pretrained(Path("model"), model.eval(), (0.5,) * channels, (0.2,) * channels, 8, (), {})


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(mode) if mode != "L" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, bands), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode=None).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_image(tmp_path / f"images/{name}.png", seed) for seed, name in enumerate("abc")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_bytes_twice_and_all_files_told(tmp_path: Path, images: list[Path]) -> None:
    for run in ("one", "two"):
        results = write_gallery(pretrained(), images, tmp_path / run, 0.75, [0.25, 0.5, 0.75])
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    files = {"overview-1.png", "psnr.json"} | {f"grids/{n}.png" for n in "abc"} | {f"animations/{n}.gif" for n in "abc"}
    assert one.keys() == files
    record = json.loads(one["psnr.json"])
    assert [image["psnr_masked"] for image in record["images"]] == [result.psnr_masked for result in results]
    assert record["mean"]["psnr_pasted"] == pytest.approx(np.mean([result.psnr_pasted for result in results]))
    assert (record["mask_ratio"], record["seed"], record["img_size"]) == (0.75, 0, [16, 32])
    for path in (tmp_path / "one/animations").iterdir():
        with Image.open(path) as gif:
            assert gif.n_frames == 4  # forth and back


def test_a_full_sheet_starts_another(tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmae.pretraining.gallery.SHEET", 2)
    results = write_gallery(pretrained(), images, tmp_path / "out")
    assert [result.image for result in results] == list(map(str, images))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grids",
        "overview-1.png",
        "overview-2.png",
        "psnr.json",
    ]


def test_masks_depend_on_content_and_seed_alone(tmp_path: Path, images: list[Path]) -> None:
    copy = tmp_path / "elsewhere.png"
    shutil.copy(images[1], copy)
    noise = load_images(images, pretrained(), seed=0)[1]
    assert torch.equal(load_images([images[2], copy], pretrained(), seed=0)[1], noise[[2, 1]])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(load_images(images, pretrained(), seed=1)[1], noise)


@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_grey_and_alpha(tmp_path: Path, decoder: str) -> None:
    for channels, mode in ((1, "L"), (4, "RGBA")):
        path = write_image(tmp_path / f"{mode}.png", 0, (16, 32), mode)
        pixels, _ = load_images([path], pretrained(channels), 0)
        with Image.open(path) as image:
            expected = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) / np.float32(255)
        np.testing.assert_allclose(pixels[0], expected, atol=1e-6)  # the model's size: nothing is resampled
        results = write_gallery(pretrained(channels, decoder), [path], tmp_path / f"out-{mode}", 0.5, [0.5])
        assert math.isfinite(results[0].psnr_masked)


def test_two_channels(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs the extra [data]")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 2), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    loaded, _ = load_images([tmp_path / "a.tif"], pretrained(2), 0)
    np.testing.assert_allclose(loaded[0], pixels.transpose(2, 0, 1) / np.float32(255), atol=1e-6)
    write_gallery(pretrained(2), [tmp_path / "a.tif"], tmp_path / "out")
    assert (tmp_path / "out/grids/a.png").is_file()


def test_names_are_unique() -> None:
    paths = [Path(name) for name in ("a/1.jpg", "b/1.jpg", "b/1.png", "c/2.jpg", "c/b-1.jpg", "d/B-1.JPG")]
    names = output_names(paths)
    assert names == ["1", "b-1", "1-2", "2", "c-b-1", "d-B-1"]
    assert len({name.casefold() for name in names}) == len(paths)


def test_ratios_that_a_small_grid_allows() -> None:
    assert possible_ratios(pretrained(img_size=32).model) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert possible_ratios(pretrained(img_size=8).model) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_mean_leaves_perfect_matches_out() -> None:
    assert mean_psnr([10.0, math.inf, 20.0]) == 15
    assert mean_psnr([math.inf]) is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mask_ratio": 1.0}, "mask ratio 1.0: leaves no patch of 32 to see or none to predict"),
        ({"gif_ratios": [0.5, 0.0]}, "mask ratio 0.0"),
        ({"gif_ratios": [1.5]}, "mask ratio 1.5"),
        ({"paths": "broken"}, "broken.png: cannot be read as an image"),
        ({"output": "images/a.png"}, "--output"),
    ],
)
def test_errors_leave_nothing(tmp_path: Path, images: list[Path], changed: dict[str, Any], told: str) -> None:
    broken = tmp_path / "images/broken.png"
    broken.write_bytes(images[0].read_bytes()[:200])
    arguments: dict[str, Any] = {"paths": images, "output": tmp_path / "out"} | changed
    if "paths" in changed:
        arguments["paths"] = [*images, broken]
    arguments["output"] = tmp_path / arguments["output"]
    before = contents(tmp_path)
    with pytest.raises(UserError, match=told):
        write_gallery(pretrained(), **arguments)
    assert contents(tmp_path) == before


def test_nothing_is_overwritten_unless_forced(tmp_path: Path, images: list[Path]) -> None:
    output = tmp_path / "out"
    write_gallery(pretrained(), images[:1], output)
    before = contents(output)
    with pytest.raises(UserError, match=r"2 of 4 output files already exist, for example .*overview-1.png"):
        write_gallery(pretrained(), images[1:], output, seed=1)
    assert contents(output) == before
    write_gallery(pretrained(), images[:1], output, seed=1, force=True)
    assert contents(output).keys() == before.keys()
    assert contents(output)["grids/a.png"] != before["grids/a.png"]


def panels(height: int, width: int, hidden_rows: int) -> Panels:
    torch.manual_seed(0)
    given, predicted = torch.rand(2, 1, 3, height, width).round(decimals=1)
    hidden = torch.zeros(1, 1, height, width, dtype=torch.bool)
    hidden[:, :, :hidden_rows] = True
    return Panels(given, torch.where(hidden, predicted, given), hidden, norm_pix_loss=False)


def test_a_frame_holds_both_panels_pixel_by_pixel() -> None:
    frame = np.asarray(animation_frame(panels(16, 24, 8), 0.5, 12.34))
    enlarged = 10  # 24 pixels to 240
    pasted = (panels(16, 24, 8).pasted[0] * 255).round().byte().permute(1, 2, 0).numpy()
    big = pasted.repeat(enlarged, 0).repeat(enlarged, 1)
    height, width, _ = big.shape
    places = [
        (y, x)
        for y in range(frame.shape[0] - height + 1)
        for x in range(frame.shape[1] - width + 1)
        if (frame[y, x : x + width] == big[0]).all() and (frame[y : y + height, x : x + width] == big).all()
    ]
    assert len(places) == 1
    assert places[0][1] > frame.shape[1] / 2 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (128, 128), (224, 224), (1024, 512), (64, 16), (16, 64)])
def test_frames_are_moderate_and_wide_enough_for_their_text(height: int, width: int) -> None:
    frame = animation_frame(panels(height, width, 8), 0.95, 100.0)
    assert 512 <= frame.width <= 760
    assert frame.height <= 440
    border = np.concatenate([np.asarray(frame)[:, :4].ravel(), np.asarray(frame)[:, -4:].ravel()])
    assert (border == 255).all()


def test_a_gif_plays_forth_and_back(tmp_path: Path) -> None:
    frames = [animation_frame(panels(32, 32, rows), rows / 32, 10.0 + rows) for rows in (8, 16, 24)]
    save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    assert [duration for _, duration in shown] == [END_MS, FRAME_MS, END_MS, FRAME_MS]
    pictures = [np.asarray(picture).astype(int) for picture, _ in shown]
    for picture, index in zip(pictures, (0, 1, 2, 1), strict=True):
        assert np.abs(picture - np.asarray(frames[index])).mean() < 6  # 256 colours
    np.testing.assert_array_equal(pictures[1], pictures[3])
    # Rows that no mask reached are the same in every frame of the right panel.
    right = [picture[230:280, 280:500] for picture in pictures]
    assert all(np.array_equal(right[0], other) for other in right)


def test_one_frame_is_a_gif_as_well(tmp_path: Path) -> None:
    save_gif([animation_frame(panels(32, 32, 8), 0.25, float("inf"))], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 1
