"""Frames come upright, in their colours and at their times; what is written keeps them, and browsers can play it."""

import errno
import sys
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
pytest.importorskip("av", reason='PyAV is not installed: pip install -e ".[video]"')

import av

from crossmae.data.paths import VIDEO_SUFFIXES
from crossmae.errors import UserError
from det.inference.video import Frame, Video, is_video, letterbox, write_video
from tests.det.videos import CORNER, GROUND, encode, picture


def frames(count, rate, pixels=None):
    return [Frame(picture() if pixels is None else pixels, Fraction(i) / rate) for i in range(count)]


def close(pixel, color):
    return np.abs(pixel.astype(int) - color).max() <= 8  # what is lost by yuv420p


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(60)])
def test_rate_and_number_of_frames_are_kept(tmp_path, rate):
    write_video(tmp_path / "a.mp4", frames(7, rate), rate)
    video = Video(tmp_path / "a.mp4")
    assert (video.rate, video.frames) == (rate, 7)
    assert [frame.time for frame in video] == [pytest.approx(i / rate, abs=1e-4) for i in range(7)]
    assert len(list(video)) == 7  # from its beginning again


def test_frames_keep_their_times_where_the_rate_changes(tmp_path):
    times = [Fraction(t, 100) for t in (0, 10, 15, 40, 45, 100)]
    write_video(tmp_path / "a.mp4", [Frame(picture(), time) for time in times], Fraction(6))
    assert [frame.time for frame in Video(tmp_path / "a.mp4")] == times


def test_time_is_counted_from_the_first_frame(tmp_path):
    late = [Frame(frame.pixels, frame.time + 2) for frame in frames(3, Fraction(10))]
    write_video(tmp_path / "a.mp4", late, Fraction(10))
    assert [frame.time for frame in Video(tmp_path / "a.mp4")] == [0, Fraction(1, 10), Fraction(2, 10)]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (49, 64), (48, 65), (51, 63)])
def test_pixels_keep_their_place_and_color_and_sides_become_even(tmp_path, height, width):
    write_video(tmp_path / "a.mp4", frames(3, Fraction(10), picture(height, width)), Fraction(10))
    for frame in Video(tmp_path / "a.mp4"):
        assert frame.pixels.shape == (height + height % 2, width + width % 2, 3)
        assert frame.pixels.dtype == np.uint8
        assert close(frame.pixels[5, 5], CORNER)
        for y, x in ((5, -1), (-1, 5), (-1, -1)):
            assert close(frame.pixels[y, x], GROUND)


def test_browsers_can_play_it(tmp_path):
    """H.264 with 4:2:0 colours, tagged, and the index in front of the pictures."""
    write_video(tmp_path / "a.mp4", frames(3, Fraction(10)), Fraction(10))
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace) == ("h264", "yuv420p", 1)
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_videos_of_telephones_are_turned_upright(tmp_path, turn):
    path = tmp_path / "phone.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(turn)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = Video(path)
    height, width = (48, 64) if turn in (0, 180) else (64, 48)
    assert frame.pixels.shape == (height, width, 3)
    corners = {0: (5, 5), 90: (-5, 5), 180: (-5, -5), -90: (5, -5)}  # where the upper left one is, counter-clockwise
    for angle, (y, x) in corners.items():
        assert close(frame.pixels[y, x], CORNER if angle == turn else GROUND)


def test_writing_is_atomic_and_nothing_is_no_file(tmp_path):
    def broken():
        yield from frames(3, Fraction(10))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "a.mp4", broken(), Fraction(10))
    write_video(tmp_path / "a.mp4", [], Fraction(10))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video: Invalid data"):
        Video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"none\.mp4: cannot be read as a video: No such file"):
        Video(tmp_path / "none.mp4")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match=r"sound\.mkv: has no pictures"):
        Video(tmp_path / "sound.mkv")


def cut_off(path, share):
    """Write 60 frames of noise, and of their bytes only a share."""
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(60))
    write_video(path, [Frame(pixels, Fraction(i, 10)) for i, pixels in enumerate(noise)], Fraction(10))
    content = path.read_bytes()
    start = content.find(b"mdat") + 4
    path.write_bytes(content[: start + int(share * (len(content) - start))])
    return Video(path)


def test_a_video_that_was_cut_off_gives_its_frames_and_a_warning(tmp_path, caplog):
    count = len(list(cut_off(tmp_path / "a.mp4", 0.5)))
    assert 20 < count < 40
    assert f"a.mp4: {count} frames could be read, the file lists 60" in caplog.text


def test_a_video_without_a_whole_frame_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"a\.mp4: "):
        list(cut_off(tmp_path / "a.mp4", 0.001))


def test_videos_are_told_by_their_names():
    assert all(map(is_video, ("a.mp4", "b/C.MOV", "d.webm", "e.mkv", "f.avi")))
    assert not any(map(is_video, ("a.jpg", "mp4", "video/a.png")))


def test_without_the_library_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'reading and writing videos needs av: pip install -e "\.\[video\]"'):
        Video(tmp_path / "a.mp4")


def test_a_file_that_can_not_be_written_is_an_os_error_and_the_frames_that_are_left_are_not_taken(tmp_path):
    """Whatever goes wrong in the encoder, some of whose errors are none of the system's."""
    given = iter(frames(4, Fraction(10), np.zeros((2, 200_000, 3), np.uint8)))  # wider than x264 goes
    with pytest.raises(OSError, match=r"a\.mp4"):
        write_video(tmp_path / "a.mp4", given, Fraction(10))
    assert list(tmp_path.iterdir()) == []
    assert 0 < len(list(given)) < 4
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(OSError, match=r"b\.mp4") as caught:
        write_video(tmp_path / "b.mp4", frames(2, Fraction(10)), Fraction(10))
    assert caught.value.errno == errno.EISDIR


KINDS = {
    **dict.fromkeys(("mp4", "m4v", "mov", "3gp", "3g2", "f4v"), ("libx264", None)),
    **dict.fromkeys(("mkv", "flv"), ("libx264", None)),
    **dict.fromkeys(("ts", "mts", "m2t", "m2ts"), ("libx264", "mpegts")),
    **dict.fromkeys(("mpg", "mpeg", "mpe"), ("mpeg2video", "mpeg")),
    **dict.fromkeys(("wmv", "asf"), ("wmv2", "asf")),
    **dict.fromkeys(("avi", "divx"), ("mpeg4", "avi")),
    "webm": ("libvpx", None),
    "qt": ("libx264", "mov"),
    "ivf": ("libvpx", "ivf"),
    "vob": ("mpeg2video", "vob"),
    "mxf": ("mpeg2video", "mxf"),
    "ogv": ("libvpx", "ogg"),
    "rm": ("rv20", "rm"),
    "m1v": ("mpeg1video", "mpeg1video"),
    "m2v": ("mpeg2video", "mpeg2video"),
    "mjpeg": ("mjpeg", "mjpeg"),
    "h264": ("libx264", "h264"),
    "hevc": ("libx265", "hevc"),
    "y4m": ("rawvideo", "yuv4mpegpipe"),
    "dv": ("dvvideo", "dv"),
}


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES - {".rmvb"}))  # another name of .rm
def test_every_container_is_read(tmp_path, suffix):
    codec, kind = KINDS[suffix[1:]]
    size = (720, 576) if suffix == ".dv" else (128, 96)
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(tmp_path / f"a{suffix.upper()}", [size] * 4, codec, kind=kind, pix_fmt=pix_fmt, **quiet)
    assert is_video(path)
    found = list(Video(path))
    assert len(found) == 4
    assert all(close(frame.pixels[40, 40], CORNER) for frame in found)
    write_video(tmp_path / "copy.mp4", found, Video(path).rate)
    assert len(list(Video(tmp_path / "copy.mp4"))) == 4


@pytest.mark.parametrize("other", [(48, 64), (32, 24), (66, 50), (200, 40)])
def test_frames_of_another_size_are_letterboxed(tmp_path, caplog, other):
    """The first frame decides the size of what is written, and no picture is distorted."""
    sizes = [(64, 48), other]
    path = encode(tmp_path / "call.webm", [sizes[0], sizes[0], sizes[1]], "libvpx")
    with caplog.at_level("INFO"):
        found = list(Video(path))
    assert [frame.pixels.shape[1::-1] for frame in found] == [sizes[0], sizes[0], sizes[1]]
    text = "from frame 2 on, frames have {} x {} pixels, not {} x {}".format(*sizes[1], *sizes[0])
    assert [text in record.message for record in caplog.records] == [True]
    write_video(tmp_path / "a.mp4", found, Fraction(10))
    copies = [frame.pixels for frame in Video(tmp_path / "a.mp4")]
    assert {copy.shape[1::-1] for copy in copies} == {sizes[0]}
    (width, height), last = sizes[0], copies[2].astype(int)
    scale = min(width / sizes[1][0], height / sizes[1][1])
    inner = np.array([sizes[1][1] * scale, sizes[1][0] * scale])
    top, left = (np.array([height, width]) - inner) / 2
    for share, color in ((0.25, CORNER), (0.75, GROUND)):
        y, x = (np.array([top, left]) + inner * share).astype(int)
        assert np.abs(last[y, x] - color).max() <= 30
    if top >= 8:
        assert last[2].max() <= 20
    if left >= 8:
        assert last[:, 2].max() <= 20


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(None, (96, 96)), (Fraction(1), (96, 96)), (Fraction(16, 9), (171, 96)), (Fraction(8, 9), (96, 108))],
)
def test_pixels_become_square(tmp_path, aspect, size):
    video = Video(encode(tmp_path / "dv.mkv", [(96, 96)] * 2, aspect=aspect))
    assert video.pixel_aspect == (aspect or 1)
    for frame in video:
        assert frame.pixels.shape[1::-1] == size
        assert close(frame.pixels[size[1] // 2 - 6, size[0] // 2 - 6], CORNER)
        assert close(frame.pixels[size[1] // 2 + 6, size[0] // 2 - 6], GROUND)


def test_an_absurd_pixel_aspect_is_ignored(tmp_path):
    path = encode(tmp_path / "a.mkv", [(96, 96)], aspect=Fraction(10))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == 10
    assert Video(path).pixel_aspect == 1
    assert [frame.pixels.shape for frame in Video(path)] == [(96, 96, 3)]


def test_the_rotation_is_of_square_pixels(tmp_path):
    path = tmp_path / "phone.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = Video(path)
    assert frame.pixels.shape == (128, 48, 3)


def test_the_cover_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover, song = container.add_stream("mjpeg", rate=10), container.add_stream("aac", rate=8000, layout="mono")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        for stream, frame in ((cover, av.VideoFrame.from_ndarray(picture(), format="rgb24")), (song, sound)):
            container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(UserError, match=r"song\.mp4: has no pictures"):
        Video(tmp_path / "song.mp4")


@pytest.mark.parametrize("suffix", ["mkv", "ts", "avi"])
def test_a_video_cut_in_the_middle_gives_the_frames_before(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", [(64, 48)] * 40, "mpeg4" if suffix == "avi" else "libx264", g="5")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    found = []
    with suppress(UserError):  # some containers tell
        found.extend(frame.pixels for frame in Video(path))
    assert 0 < len(found) < 40
    assert all(close(pixels[5, 5], CORNER) for pixels in found[:-1])


def test_a_picture_of_one_pixel_can_be_written(tmp_path):
    write_video(tmp_path / "a.mp4", frames(2, Fraction(10), np.full((1, 1, 3), 200, np.uint8)), Fraction(10))
    assert [frame.pixels.shape for frame in Video(tmp_path / "a.mp4")] == [(2, 2, 3)] * 2


def test_a_letterboxed_strip_keeps_a_pixel():
    strip = np.full((1, 500, 3), 200, np.uint8)
    assert (letterbox(strip, (10, 50))[:, 25].max(axis=1) == [0] * 4 + [200] + [0] * 5).all()
    assert letterbox(strip, (1, 500)) is strip
