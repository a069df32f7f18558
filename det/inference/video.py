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

from crossmae.errors import UserError, import_extra, printable
from crossmae.files import write_atomically

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})

QUALITY = "18"  # constant rate factor of x264: keeps lines and letters sharp
TICKS = 90000  # time base per second: an integer per frame for all usual rates
BT709 = 1  # number of the colour standard in H.264
UNKNOWN_RATE = Fraction(25)  # frames per second, if the file does not tell


@dataclass(frozen=True)
class Frame:
    """One upright picture (H, W, 3) uint8 RGB of a video, with its time in seconds after the first frame."""

    pixels: NDArray[np.uint8]
    time: Fraction


class Video:
    """First video stream of a file. Each iteration reads it from the beginning.

    `rate` is the average number of frames per second. `frames` is the expected number of frames, or None if unknown.
    Raises UserError if PyAV is not installed, or if the file cannot be read or has no pictures.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as container:
            stream, seconds = container.streams.video[0], (container.duration or 0) / 1_000_000
            self.rate = Fraction(stream.average_rate or UNKNOWN_RATE)
            self._listed = int(stream.frames)
            self.frames = self._listed or round(seconds * self.rate) or None

    def __iter__(self) -> Iterator[Frame]:
        """Yield all frames upright. Warn about missing frames.

        If the file is damaged, raises UserError after the frames before the damage.
        """
        number, start = 0, Fraction(0)
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            try:
                for picture in container.decode(video=0):
                    time = number / self.rate if picture.pts is None else picture.pts * Fraction(picture.time_base)
                    start = start if number else time
                    # telephones record a rotation
                    upright = np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90))
                    yield Frame(np.ascontiguousarray(upright), time - start)
                    number += 1
            except pyav().FFmpegError as error:
                where = f"{printable(self.path)}: cannot be read after frame {number}"
                raise UserError(f"{where}: {error.strerror}") from error
        if not number:
            raise UserError(f"{printable(self.path)}: has no readable picture. Name another video.")
        if number < self._listed:  # the file was cut off, or trimmed without encoding
            log.warning("%s: %d frames could be read, the file lists %d", printable(self.path), number, self._listed)

    def _open(self) -> Any:
        try:
            container = pyav().open(str(self.path))
        except (pyav().FFmpegError, OSError) as error:
            raise UserError(f"{printable(self.path)}: cannot be read as a video: {error.strerror}") from error
        if not container.streams.video:
            container.close()
            raise UserError(f"{printable(self.path)}: has no pictures. Name another video.")
        return container


def is_video(path: str | Path) -> bool:
    """Check by its name whether a file is a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def write_video(path: Path, frames: Iterable[Frame], rate: Fraction) -> None:
    """Write at least one frame as H.264 in MP4, atomically.

    All frames have the same size. An odd last row or column is doubled, because the format needs even sides. Raises
    OSError if the file cannot be written. The remaining frames are then not consumed.
    """
    queue = iter(frames)
    first = next(queue, None)
    if first is not None:
        shape = first.pixels.shape
        try:
            write_atomically(path, lambda temporary: _encode(temporary, chain([first], queue), shape[:2], rate))
        except pyav().FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _encode(path: Path, frames: Iterable[Frame], size: tuple[int, ...], rate: Fraction) -> None:
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
            even = np.pad(frame.pixels, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
            picture = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="itu709")
            picture.pts, picture.time_base = tick, codec.time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def pyav() -> Any:
    """Import PyAV, or raise UserError."""
    return import_extra("av", "reading and writing videos", extra="video")
