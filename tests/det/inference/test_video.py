"""Frames come upright, in their colours and at their times; what is written keeps them, and browsers can play it."""

import errno
import sys
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
pytest.importorskip("av", reason='PyAV is not installed: pip install -e ".[video]"')

import av

from crossmae.errors import UserError
from det.inference.video import Frame, Video, is_video, write_video

CORNER, GROUND = (20, 180, 60), (200, 40, 90)


def picture(height=48, width=64):
    """All one colour, but for the upper left quarter."""
    pixels = np.full((height, width, 3), GROUND, np.uint8)
    pixels[: height // 2, : width // 2] = CORNER
    return pixels


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
