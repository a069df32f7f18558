"""Every file gets its own picture and its own entry, nothing is overwritten, and what cannot be read is reported."""

import errno
import json
import shutil
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from crossmae.errors import UserError
from det.config import image_limits
from det.inference.draw import class_color
from det.inference.predict import Classes
from det.inference.predict_files import FilePredictions, check_output, find_media, output_names
from det.inference.video import Frame, Video, write_video
from tests.det.videos import encode

needs_av = pytest.mark.skipif(find_spec("av") is None, reason='PyAV is not installed: pip install -e ".[video]"')

CLASSES = Classes(("cat", "dog"), (7, 9))
BOX = (10.0, 12.0, 30.0, 26.0)


class OneDog:
    """Finds a dog of score 0.75 that fills `BOX` in every image, and remembers how many it was given at once."""

    limits = image_limits()

    def __init__(self):
        self.batches = []

    def predict_raw(self, images):
        self.batches.append(len(images))
        return [self._instances(*image.shape[:2]) for image in images]

    def _instances(self, height, width):
        fields = {"pred_boxes": Boxes(torch.tensor([BOX])), "scores": torch.tensor([0.75])}
        fields |= {"pred_classes": torch.tensor([1]), "pred_masks": torch.ones(1, 1, 28, 28)}
        return Instances((height, width), **fields)


def save_image(path, height=40, width=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


def save_clip(path, count=5):
    frames = [Frame(np.full((40, 60, 3), 20 * i, np.uint8), Fraction(i, 10)) for i in range(count)]
    write_video(path, frames, Fraction(10))
    return path


def predict(tmp_path, *arguments, **options):
    job = FilePredictions(OneDog(), CLASSES, tmp_path / "out", **options)
    root, sources = find_media([str(argument) for argument in arguments])
    job.write(sources, {"image_folder": str(root)})
    return job, json.loads((tmp_path / "out/predictions.json").read_text())


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_becomes_a_folder_of_the_same_names(tmp_path):
    for name in ("b.jpg", "a.png", "sub/a.png"):
        save_image(tmp_path / "in" / name)
    job, content = predict(tmp_path, tmp_path / "in", batch_size=2)
    assert written(tmp_path / "out") == ["a.png", "b.png", "predictions.json", "sub/a.png"]
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.jpg", "sub/a.png"]
    assert content["info"]["image_folder"] == str(tmp_path / "in")
    assert job.predictor.batches == [2, 1]
    assert (job.images, job.objects, job.failures) == (3, 3, [])


def test_the_file_is_one_that_coco_tools_read(tmp_path):
    save_image(tmp_path / "in/a.jpg", 40, 60)
    save_image(tmp_path / "in/b.jpg", 50, 70)
    predict(tmp_path, tmp_path / "in")
    coco = COCO(tmp_path / "out/predictions.json")
    assert coco.dataset["categories"] == [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    assert sorted(coco.anns) == [1, 2]
    for image_id, (name, height, width) in {1: ("a.jpg", 40, 60), 2: ("b.jpg", 50, 70)}.items():
        assert coco.imgs[image_id] == {"id": image_id, "file_name": name, "width": width, "height": height}
        (annotation,) = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert (annotation["category_id"], annotation["score"]) == (9, 0.75)
        assert annotation["bbox"] == [10, 12, 20, 14]
        assert (annotation["area"], coco.annToMask(annotation).sum()) == (280, 280)


def test_pictures_show_the_objects_and_small_ones_are_enlarged(tmp_path):
    save_image(tmp_path / "in/small.png", 40, 60)
    save_image(tmp_path / "in/large.png", 400, 600)
    predict(tmp_path, tmp_path / "in")
    small, large = (np.asarray(Image.open(tmp_path / f"out/{name}.png")) for name in ("small", "large"))
    assert small.shape == (40 * 9, 60 * 9, 3)  # 9 * 60 is the first multiple over 512
    assert large.shape == (400, 600, 3)
    assert (large[26, 15:25] == class_color(1)).all()  # the lower edge of the box
    assert (large[300:] == 90).all()
    tinted = np.full(3, 0.65 * 90) + 0.35 * np.array(class_color(1))
    assert np.abs(small[19 * 9, 20 * 9] - tinted).max() <= 2


@needs_av
def test_every_frame_of_a_video_is_predicted_drawn_and_listed(tmp_path):
    save_image(tmp_path / "in/a.jpg")
    clip = save_clip(tmp_path / "in/clip.mp4")
    job, content = predict(tmp_path, tmp_path / "in/a.jpg", clip, batch_size=2)
    assert written(tmp_path / "out") == ["a.png", "clip.mp4", "predictions.json"]
    assert job.predictor.batches == [1, 2, 2, 1]
    frames = content["images"][1:]
    assert [frame["frame"] for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame["time"] for frame in frames] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert {frame["file_name"] for frame in frames} == {"clip.mp4"}
    assert [annotation["image_id"] for annotation in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    drawn = Video(tmp_path / "out/clip.mp4")
    pixels = [frame.pixels for frame in drawn]
    assert (drawn.rate, len(pixels)) == (10, 5)
    for index, frame in enumerate(pixels):
        assert frame.shape == (360, 540, 3)
        assert np.abs(frame[300:340, 400:].astype(int) - 20 * index).max() <= 6  # clear of the object
        assert np.abs(frame[26 * 9 - 1, 20 * 9].astype(int) - class_color(1)).max() <= 60


@needs_av
def test_frames_of_another_size_keep_their_own_pixels(tmp_path):
    """Boxes count the pixels of their frame, and the drawn video shows them within the size of the first frame."""
    clip = tmp_path / "call.webm"
    encode(clip, [(60, 40), (60, 40), (120, 160)], "libvpx")
    job, content = predict(tmp_path, clip)
    assert [(image["width"], image["height"]) for image in content["images"]] == [(60, 40), (60, 40), (120, 160)]
    assert [annotation["bbox"] for annotation in content["annotations"]] == [[10.0, 12.0, 20.0, 14.0]] * 3
    last = list(Video(tmp_path / "out/call.mp4"))[-1].pixels.astype(int)
    assert last.shape == (360, 540, 3)
    scale = 360 / 160  # of the last frame within the first
    left = (540 - 120 * scale) / 2
    x, y = (round(left + 20 * scale), round(26 * scale) - 1)  # the lower edge of the box
    assert np.abs(last[y, x] - class_color(1)).max() <= 90
    assert last[:, : int(left) - 8].max() <= 12
    assert job.failures == []


@needs_av
def test_a_pixel_aspect_is_undone_and_recorded(tmp_path):
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in/dv.mkv", [(60, 40)] * 2, aspect=Fraction(2))
    _, content = predict(tmp_path, tmp_path / "in")  # the videos of a folder are found, too
    found = [(image["width"], image["height"], image["pixel_aspect"]) for image in content["images"]]
    assert found == [(120, 40, 2.0)] * 2


def test_videos_of_a_folder_need_pyav(tmp_path, monkeypatch):
    save_image(tmp_path / "in/a.jpg")
    (tmp_path / "in/clip.ts").write_bytes(b"x")
    monkeypatch.setattr("det.inference.predict_files.find_spec", lambda name: None)
    assert [one.name for one in find_media([str(tmp_path / "in")])[1]] == ["a.jpg"]


def test_the_frames_of_an_animated_picture_are_counted(tmp_path, caplog):
    frames = [Image.new("RGB", (60, 40), (90 * number, 0, 0)) for number in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    save_image(tmp_path / "b.jpg")
    _, content = predict(tmp_path, tmp_path / "a.gif", tmp_path / "b.jpg")
    assert len(content["images"]) == 2
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/a.gif has 3 frames, of which the first is predicted"
    ]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 6000), (6000, 2)])
def test_pictures_of_any_shape_are_drawn(tmp_path, height, width):
    save_image(tmp_path / "in/[1] a*.png", height, width)
    job, content = predict(tmp_path, tmp_path / "in")
    assert (job.failures, written(tmp_path / "out")) == ([], ["[1] a*.png", "predictions.json"])
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (width, height)


@needs_av
def test_without_pictures_the_numbers_are_the_same(tmp_path):
    clip = save_clip(save_image(tmp_path / "in/a.jpg").with_name("clip.mp4"))
    _, whole = predict(tmp_path, tmp_path / "in/a.jpg", clip)
    _, numbers = predict(tmp_path / "2", tmp_path / "in/a.jpg", clip, draw=False)
    assert numbers == whole
    assert written(tmp_path / "2/out") == ["predictions.json"]


@needs_av
def test_what_can_not_be_read_is_reported_and_the_rest_is_predicted(tmp_path):
    for name in ("a.jpg", "c.jpg"):
        save_image(tmp_path / "in" / name)
    (tmp_path / "in/b.jpg").write_text("no image")
    (tmp_path / "in/bad.mp4").write_text("no video")
    clip = save_clip(tmp_path / "in/good.mp4")
    job, content = predict(tmp_path, tmp_path / "in", tmp_path / "in/bad.mp4", clip, batch_size=3)
    assert [Path(failure.partition(": ")[0]).name for failure in job.failures] == ["b.jpg", "bad.mp4"]
    assert written(tmp_path / "out") == ["a.png", "c.png", "good.mp4", "predictions.json"]
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "c.jpg"] + ["good.mp4"] * 5
    assert [image["id"] for image in content["images"]] == list(range(1, 8))


def test_an_image_above_the_limit_is_reported(tmp_path, monkeypatch):
    save_image(tmp_path / "in/a.jpg")
    monkeypatch.setattr(OneDog, "limits", image_limits(9))
    job, content = predict(tmp_path, tmp_path / "in")
    assert "INPUT.MAX_PIXELS is 9" in job.failures[0]
    assert content["images"] == []


@needs_av
def test_a_video_with_damage_in_it_gives_the_frames_before(tmp_path, monkeypatch):
    def damaged(video):
        yield from [Frame(np.zeros((40, 60, 3), np.uint8), Fraction(i, 10)) for i in range(3)]
        raise UserError(f"{video.path}: cannot be read after frame 3")

    clip = save_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr(Video, "__iter__", damaged)
    job, content = predict(tmp_path, clip, batch_size=2)
    monkeypatch.undo()
    assert job.failures == [f"{clip}: cannot be read after frame 3"]
    assert len(content["images"]) == len(content["annotations"]) == 3
    assert len(list(Video(tmp_path / "out/clip.mp4"))) == 3


def test_an_interrupted_call_leaves_no_numbers(tmp_path):
    """Nor does it leave those of an earlier call, which the pictures have begun to replace."""
    save_image(tmp_path / "in/a.jpg")
    job = FilePredictions(OneDog(), CLASSES, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.json").write_text("of an earlier call")
    job.predictor.predict_raw = lambda images: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        job.write(find_media([str(tmp_path / "in")])[1], {})
    assert written(tmp_path / "out") == []


@needs_av
def test_what_can_not_be_written_is_reported_and_counted(tmp_path):
    for name in ("a.jpg", "sub/b.jpg", "c.jpg"):
        save_image(tmp_path / "in" / name)
    clip = save_clip(tmp_path / "in/sub/clip.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").touch()
    (tmp_path / "out/c.png").mkdir()
    job, content = predict(tmp_path, tmp_path / "in", clip, batch_size=2)
    assert [failure.removeprefix(f"{tmp_path}/out/").partition(" (")[0] for failure in job.failures] == [
        "c.png: cannot be written: Is a directory",
        "sub/b.png: cannot be written: File exists",
        "sub/clip.mp4: cannot be written: File exists",
    ]
    assert written(tmp_path / "out") == ["a.png", "predictions.json", "sub"]
    assert (job.images, len(content["images"]), len(content["annotations"])) == (8, 8, 8)


@needs_av
def test_a_video_that_can_not_be_written_to_its_end_is_counted_to_its_end(tmp_path, monkeypatch):
    def fail(path, frames, rate):
        next(frames)
        next(frames)
        raise OSError(errno.EFBIG, "File too large")

    clip = save_clip(save_image(tmp_path / "in/a.jpg").with_name("clip.mp4"))
    monkeypatch.setattr("det.inference.predict_files.write_video", fail)
    job, content = predict(tmp_path, clip, batch_size=2)
    (failure,) = job.failures
    assert failure.startswith(f"{tmp_path}/out/clip.mp4: cannot be written: File too large (")
    assert [image["frame"] for image in content["images"]] == [0, 1, 2, 3, 4]


def test_a_full_disk_ends_it(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_image(tmp_path / "in/a.jpg")
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(UserError, match=r"a\.png: cannot be written: No space left on device \(.* GB free in "):
        predict(tmp_path, tmp_path / "in")
    assert written(tmp_path / "out") == []


def test_names_are_relative_to_the_common_folder_and_each_file_comes_once(tmp_path, monkeypatch):
    for name in ("x/a.png", "y/z/a.png", "y/b.png"):
        save_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    root, sources = find_media(["x/a.png", "y/**/*.png", "y/../x/a.png", "y"])
    assert root == tmp_path
    assert [source.name for source in sources] == ["x/a.png", "y/b.png", "y/z/a.png"]
    assert find_media(["y"])[0] == tmp_path / "y"
    assert find_media(["y/z/a.png"])[0] == tmp_path / "y/z"
    with pytest.raises(UserError, match="nowhere"):
        find_media(["x/a.png", "nowhere"])


def test_a_tilde_is_the_home_folder_or_the_beginning_of_a_name(tmp_path, monkeypatch):
    save_image(tmp_path / "home/a.png")
    save_image(tmp_path / "~no-such-user.png")
    save_image(tmp_path / "~/b.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert [source.path for source in find_media(["~no-such-user.png"])[1]] == [tmp_path / "~no-such-user.png"]
    shutil.rmtree(tmp_path / "~")
    root, sources = find_media(["~"])
    assert (root, sources[0].name) == (tmp_path / "home", "a.png")
    with pytest.raises(UserError, match=r"~no-such-user/\*\.png: no such file"):
        find_media(["~no-such-user/*.png"])
    with pytest.raises(UserError, match=r"home/out is in .*home, so the next call"):
        check_output(tmp_path / "home/out", sources, ["~"], force=False)


def test_no_two_inputs_are_drawn_onto_one_file():
    names = ["a.jpg", "a.png", "A.webp", "s/a.jpg", "a.b.jpg", "a.mp4", "a.mov", "a.png.png"]
    assert output_names(names) == [
        "a.png", "a.png.png", "A.webp.png", "s/a.png", "a.b.png", "a.mp4", "a.mov.mp4", "a.png.png.png",
    ]  # fmt: skip
    assert output_names(["a.jpg", "A.PNG/b.jpg", "x/c.mov", "x/c.mp4/d.png"]) == [
        "a.jpg.png", "A.PNG/b.png", "x/c.mov.mp4", "x/c.mp4/d.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "output", "message"),
    [
        (["in"], "in/out", "in/out is in in, so the next call would read it"),
        (["in"], "in", "in is in in, "),
        (["in/a.png"], "in", r"in/a.png is an image to predict and would be overwritten"),
        (["in/b.jpg"], "in", r"in/b.png exists already. Name another folder, or overwrite with --force"),
        (["in"], "done", r"done/predictions.json exists already"),
        (["in/**/*.jpg"], "in/out", r"in/out is in in/\*\*/\*.jpg, so the next call would read it"),
        (["{here}/**/b.*"], "in/out", r"in/out is in .*, so the next call"),
        (["i[mn]/*.jpg", "**/a.png"], "out", r"out is in \*\*/a.png, so the next call"),
        (["*/a.png"], "out", r"out is in \*/a.png, so the next call"),
        (["in/b.jpg"], "folders", r"folders/b.png cannot be written: Is a directory"),
        (["in/b.jpg"], "in/a.png", r"in/a.png/predictions.json cannot be written: Not a directory"),
        (["predictions.json", "in/b.jpg"], "o", r"o/predictions.json cannot be written: it is also the folder"),
        (["long"], "o", r"x.png.png cannot be written: File name too long"),
    ],
)
def test_what_would_be_overwritten_is_named(tmp_path, monkeypatch, arguments, output, message):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/b.jpg", "in/b.png"):
        save_image(tmp_path / name)
    save_image(tmp_path / "predictions.json/a.jpg")
    for suffix in ("png", "jpg"):
        save_image(tmp_path / "long" / f"{'x' * 251}.{suffix}")
    arguments = [argument.replace("{here}", str(tmp_path)) for argument in arguments]
    (tmp_path / "folders/b.png").mkdir(parents=True)
    (tmp_path / "done").mkdir()
    (tmp_path / "done/predictions.json").touch()
    _, sources = find_media(arguments)
    with pytest.raises(UserError, match=message):
        check_output(Path(output), sources, arguments, force=False)
    if "--force" in message or output == "done":
        check_output(Path(output), sources, arguments, force=True)
    else:
        with pytest.raises(UserError, match=message):
            check_output(Path(output), sources, arguments, force=True)


def test_patterns_that_do_not_reach_the_output_are_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "da[t]a/in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "da[t]a")
    save_image(Path("in/b.jpg"))
    for arguments, output in (
        (["in/*.jpg"], "in"),
        (["in/*.jpg"], "in/out"),
        (["in/b*"], "in/boxes"),
        (["in/**/*.jpg"], "out"),
        (["**/*.jpg"], "../out"),
        (["*/b.*"], "deep/er/out"),
    ):
        check_output(Path(output), find_media(arguments)[1], arguments, force=False)
    with pytest.raises(UserError, match="the next call"):
        check_output(Path("in/out"), find_media(["in/**"])[1], ["in/**"], force=False)


def test_threads_write_the_same_files(tmp_path, monkeypatch):
    for number in range(9):
        save_image(tmp_path / f"in/{number}.png", 40 + number, 60)
    found = []
    for threads in (0, 2):
        job, content = predict(tmp_path, tmp_path / "in", batch_size=2, threads=threads)
        pictures = {name: (tmp_path / "out" / name).read_bytes() for name in written(tmp_path / "out")}
        found.append((content, pictures, job.images, job.objects, job.failures, job.predictor.batches))
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1]
    assert found[0][2] == 9


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_in_a_thread_names_the_image_and_leaves_no_predictions(tmp_path, monkeypatch, threads):
    def fail(instances, number, *_):
        raise ArithmeticError(f"mask {number}")

    save_image(tmp_path / "in/a.png")
    monkeypatch.setattr("det.inference.predict_files.coco_annotations", fail)
    with pytest.raises(RuntimeError, match=r"a\.png: the predictions cannot be encoded: mask 1"):
        predict(tmp_path, tmp_path / "in", threads=threads)
    assert written(tmp_path / "out") == []
