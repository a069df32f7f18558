"""Small videos of any container, size and pixel aspect."""

from fractions import Fraction

import numpy as np

CORNER, GROUND = (20, 180, 60), (200, 40, 90)


def picture(height=48, width=64):
    """All one colour, but for the upper left quarter."""
    pixels = np.full((height, width, 3), GROUND, np.uint8)
    pixels[: height // 2, : width // 2] = CORNER
    return pixels


def encode(path, sizes, codec="libx264", aspect=None, kind=None, pix_fmt="yuv420p", **options):
    """Write one frame of each size, from an encoder for each run of equal sizes, as calls over a network do."""
    import av  # optional

    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25 if kind else 10, options=options)
        (stream.width, stream.height), stream.pix_fmt = sizes[0], pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if len(set(sizes)) == 1:
            for width, height in sizes:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(height, width), format="rgb24")))
            container.mux(stream.encode(None))
        for number, (width, height) in enumerate(sizes if len(set(sizes)) > 1 else ()):
            own = av.CodecContext.create(codec, "w")
            own.width, own.height, own.pix_fmt, own.time_base = width, height, pix_fmt, Fraction(1, 10)
            frame = av.VideoFrame.from_ndarray(picture(height, width), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = 0, Fraction(1, 10)
            for packet in [*own.encode(frame), *own.encode(None)]:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, 10), stream
                container.mux(packet)
    return path
