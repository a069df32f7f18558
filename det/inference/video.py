"""Video files: reading of upright frames one by one, and writing of MP4 for browsers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmae.data.paths import VIDEO_SUFFIXES
from crossmae.errors import UserError, counted, import_extra, printable
from crossmae.files import write_atomically

log = logging.getLogger(__name__)

QUALITY = "18"  # constant rate factor of x264: keeps lines and letters sharp
TICKS = 90000  # time base per second: an integer per frame for all usual rates
BT709 = 1  # number of the colour standard in H.264
UNKNOWN_RATE = Fraction(25)  # frames per second, if the file does not tell
MOST_ASPECT = 4  # width of a pixel divided by its height, or the inverse; larger ones are mistakes


@dataclass(frozen=True)
class Frame:
    """One upright picture (H, W, 3) uint8 RGB of square pixels, with its time in seconds after the first frame."""

    pixels: NDArray[np.uint8]
    time: Fraction


class Video:
    """First video stream of a file. Each iteration reads it from the beginning.

    `rate` is the average number of frames per second. `frames` is the expected number of frames, or None if unknown.
    `pixel_aspect` is the width of a stored pixel divided by its height. Frames may differ in size. Raises UserError if
    PyAV is not installed, or if the file cannot be read or has no pictures.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as container:
            stream, seconds = _pictures(container), (container.duration or 0) / 1_000_000
            self.rate = Fraction(stream.average_rate or UNKNOWN_RATE)
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.pixel_aspect = aspect if Fraction(1, MOST_ASPECT) <= aspect <= MOST_ASPECT else Fraction(1)
            self._listed = int(stream.frames)
            self.frames = self._listed or round(seconds * self.rate) or None

    def __iter__(self) -> Iterator[Frame]:
        """Yield all frames upright. Warn about missing frames.

        If the file is damaged, raises UserError after the frames before the damage.
        """
        number, start = 0, Fraction(0)
        size: tuple[int, int] | None = None
        with self._open() as container:
            stream = _pictures(container)
            stream.thread_type = "AUTO"
            try:
                for picture in container.decode(stream):
                    if size not in (None, (picture.width, picture.height)):
                        message = "%s: from frame %d on, frames have %d x %d pixels, not %d x %d"
                        log.info(message, printable(self.path), number, picture.width, picture.height, *size)
                    size = picture.width, picture.height
                    time = number / self.rate if picture.pts is None else picture.pts * Fraction(picture.time_base)
                    start = start if number else time
                    # telephones record a rotation
                    upright = np.rot90(_square_pixels(picture, self.pixel_aspect), round(picture.rotation / 90))
                    yield Frame(np.ascontiguousarray(upright), time - start)
                    number += 1
            except pyav().FFmpegError as error:
                where = f"{printable(self.path)}: cannot be read after frame {number}"
                raise UserError(f"{where}: {error.strerror}") from error
        if not number:
            raise UserError(f"{printable(self.path)}: has no readable picture. Name another video.")
        if number < self._listed:  # the file was cut off, or trimmed without encoding
            log.warning(
                "%s: %s could be read, the file lists %d", printable(self.path), counted(number, "frame"), self._listed
            )

    def _open(self) -> Any:
        try:
            container = pyav().open(str(self.path))
        except (pyav().FFmpegError, OSError) as error:
            raise UserError(f"{printable(self.path)}: cannot be read as a video: {error.strerror}") from error
        if _pictures(container) is None:
            container.close()
            raise UserError(f"{printable(self.path)}: has no pictures. Name another video.")
        return container


def _pictures(container: Any) -> Any:
    """Return the first video stream other than a cover picture, if any."""
    cover = pyav().stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def _square_pixels(picture: Any, aspect: Fraction) -> NDArray[np.uint8]:
    """Convert a frame to RGB (H, W, 3), enlarged to square pixels."""
    if aspect == 1:
        pixels: NDArray[np.uint8] = picture.to_ndarray(format="rgb24")
        return pixels
    width, height = round(picture.width * max(aspect, 1)), round(picture.height / min(aspect, 1))
    square: NDArray[np.uint8] = picture.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return square


def is_video(path: str | Path) -> bool:
    """Check by its name whether a file is a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def write_video(path: Path, frames: Iterable[Frame], rate: Fraction) -> None:
    """Write at least one frame as H.264 in MP4, atomically.

    All frames get the size of the first one: others are scaled to fit, with black margins. An odd last row or column is
    doubled, because the format needs even sides. Raises WriteError if the file cannot be written. The remaining frames
    are then not consumed.
    """
    queue = iter(frames)
    first = next(queue, None)
    if first is not None:
        shape = first.pixels.shape
        write_atomically(path, lambda temporary: _encode(temporary, chain([first], queue), shape[:2], rate))


def _encode(path: Path, frames: Iterable[Frame], size: tuple[int, ...], rate: Fraction) -> None:
    try:
        _encode_frames(path, frames, size, rate)
    except pyav().FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _encode_frames(path: Path, frames: Iterable[Frame], size: tuple[int, ...], rate: Fraction) -> None:
    with pyav().open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": QUALITY})
        stream.height, stream.width = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = Fraction(1, TICKS)
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        tick = -1
        for frame in frames:
            tick = max(round(frame.time * TICKS), tick + 1)  # times must increase
            even = np.pad(letterbox(frame.pixels, size), ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
            picture = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="itu709")
            picture.pts, picture.time_base = tick, codec.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def letterbox(pixels: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Scale a picture to fit into (height, width), with black margins."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    scale = min(height / pixels.shape[0], width / pixels.shape[1])
    inner = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    canvas = Image.new("RGB", (width, height))
    place = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas.paste(Image.fromarray(pixels).resize(inner, Image.Resampling.BICUBIC), place)
    return np.asarray(canvas)


def pyav() -> Any:
    """Import PyAV, or raise UserError."""
    return import_extra("av", "reading and writing videos", extra="video")
