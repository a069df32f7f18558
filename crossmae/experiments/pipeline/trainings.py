"""The trainings of the pipeline: recipes, command lines, and a short run of each to measure its speed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crossmae.data.annotations.split import id_key, select
from crossmae.errors import UserError, named_by
from crossmae.experiments.cells import Cell, Step, run_cells
from crossmae.experiments.pipeline.plan import Length, Timing
from crossmae.experiments.worth.grid import TIMED_PRETRAINING, timing_reader
from crossmae.experiments.worth.plan import RESULTS, seconds_of_kind
from crossmae.files import read_json, write_json
from crossmae.pretraining.config import PretrainConfig, load_config

START_SECONDS = 10.0  # of a training program, about, on an idle core
TIMED_DETECTION = 12  # steps of a short run
MOST_TIMED_IMAGES = 32  # validation images of a short run
EVALUATIONS = 4  # during pretraining
CONTINUED_LR = "optim.lr=1.5e-4"  # of pretrain/continue.yaml: a higher rate forgets more of the weights
# Names of model sizes by their width. The decoder has the size of this model, unless the file records another.
MODEL_NAMES = {
    192: "tiny_patch16",
    384: "small_patch16",
    768: "base_patch16",
    1024: "large_patch16",
    1280: "huge_patch14",
}


@dataclass(frozen=True)
class Recipe:
    """Configs that fit each other.

    Attributes:
        pretrain, detect: names of config files.
        sizes: longest sides of the images that the detector may see, in pixels, from small to large.
        size: the size of the config.
        has_windows: most blocks of the detector's encoder attend to windows only.
        detect_batch: images of a step of the detector.
    """

    pretrain: str
    detect: str
    sizes: tuple[int, ...]
    size: int
    has_windows: bool
    detect_batch: int = 8

    def config(self, settings: Sequence[str] = ()) -> PretrainConfig:
        """Read the config of pretraining."""
        return load_config(self.pretrain, ["data.train=IMAGES", "output_dir=OUT", *settings])


LAPTOP = Recipe("pretrain/laptop.yaml", "laptop_mask_rcnn.yaml", (128, 192, 256, 320, 384, 512), 256, has_windows=False)
ONE_GPU = Recipe("pretrain/small.yaml", "small_mask_rcnn.yaml", (256, 384, 512, 640, 768, 1024), 512, has_windows=True)


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled images of a detector.

    Attributes:
        json: COCO file. images: the folder of its images.
        count: number of images that are used. Images without objects are evaluated, but not trained on.
    """

    json: Path
    images: Path
    count: int


@dataclass(frozen=True)
class Trainings:
    """Inputs of the command lines of all trainings.

    Attributes:
        output: folder of the pipeline.
        pretrain_list, val_list: lists of image files.
        objects: folder of object crops with "train" and "val", for the check of features; None: no check.
        train, val: labelled images; None: no detector.
        object_share: median length of training objects as a share of their image; 0 without objects.
        weights: where pretraining starts; None: random weights.
    """

    recipe: Recipe
    output: Path
    pretrain_list: Path
    val_list: Path | None
    objects: Path | None
    train: LabelledSplit | None
    val: LabelledSplit | None
    has_masks: bool
    has_broken: bool
    weights: Path | None
    seed: int
    pretrain_settings: tuple[str, ...] = ()
    detect_settings: tuple[str, ...] = ()
    object_share: float = 0.0

    def pretrain_words(
        self, length: Length, images_per_step: int, run: Path, evaluations: int = EVALUATIONS
    ) -> tuple[str, ...]:
        """Write the arguments of tools/pretrain.py.

        Args:
            evaluations: number of evaluations after the one at the start.
        """
        epochs = round(length.epochs)
        every = max(1, math.ceil(epochs / evaluations))
        words = [
            *self._start_words(images_per_step),
            f"schedule.epochs={epochs}",
            f"schedule.warmup_epochs={round(epochs / 20, 3):g}",
            f"log.pictures_every_steps={max(1, length.steps // evaluations)}",
            f"checkpoint.every_epochs={max(1, math.ceil(epochs / 10))}",
        ]
        if self.val_list:
            words += [f"data.val={self.val_list}", f"validation.every_epochs={every}", "validation.images=200"]
        if self.objects:
            words += [f"probe.{split}={self.objects / split}" for split in ("train", "val")]
            words.append(f"probe.every_epochs={every}")
        if self.has_broken:
            words.append("data.broken=substitute")
        return (*words, *self.pretrain_settings, f"output_dir={run}")

    def start_words(self, images_per_step: int, run: Path) -> tuple[str, ...]:
        """Write the arguments of tools/pretrain.py for the weights that pretraining starts from."""
        words = [*self._start_words(images_per_step), "log.pictures=0", *self.pretrain_settings]
        return (*words, "schedule.max_steps=0", f"output_dir={run}")

    def _start_words(self, images_per_step: int) -> list[str]:
        words = ["--config-file", self.recipe.pretrain, f"data.train={self.pretrain_list}"]
        if images_per_step != self.recipe.config().optim.images_per_process:
            words += [f"optim.batch_size={images_per_step}", "optim.accumulate=1"]
        words += [f"model.init={self.weights}"] if self.weights else []
        return [*words, f"runtime.seed={self.seed}"]

    def detect_words(self, steps: int, size: int, weights: Path | None, run: Path) -> tuple[str, ...]:
        """Write the arguments of tools/train_net.py.

        Args:
            weights: the encoder; None: random weights.
        """
        assert self.train is not None
        assert self.val is not None
        return (
            *("--config-file", self.recipe.detect, "--train-json", str(self.train.json)),
            *("--train-images", str(self.train.images), "--val-json", str(self.val.json)),
            *("--val-images", str(self.val.images), f"MODEL.WEIGHTS={weights or ''}"),
            *((f"INPUT.SIZE={size}",) if size != self.recipe.size else ()),
            *(() if self.has_masks else ("MODEL.MASK_ON=False",)),
            *((f"SOLVER.IMS_PER_BATCH={self.detect_batch}",) if self.detect_batch < self.recipe.detect_batch else ()),
            *(f"SOLVER.MAX_ITER={steps}", f"SOLVER.CHECKPOINT_PERIOD={max(20, steps // 8)}", "TEST.EVAL_PERIOD=0"),
            *(f"SEED={self.seed}", *self.detect_settings, f"OUTPUT_DIR={run}"),
        )

    @property
    def detect_batch(self) -> int:
        """Images of a step of the detector, at most all training images."""
        return min(self.recipe.detect_batch, self.train.count) if self.train else self.recipe.detect_batch


def settings_of_weights(path: Path, recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the settings that fit the encoder of a weight file.

    The first are settings of pretraining, the second of the detector.

    Patches and positions need no settings, because they are resampled.

    Raises UserError if there is no encoder in the file.
    """
    from crossmae.checkpoints.metadata import recorded_arguments  # slow imports
    from crossmae.checkpoints.weights import encoder_arguments, encoder_tensors, read_weights

    with named_by("--weights", path):
        weights = read_weights(path)
        encoder = encoder_arguments(encoder_tensors(weights), weights.metadata)
    sizes = {key: encoder[key] for key in ("embed_dim", "depth", "num_heads")}
    recorded = recorded_arguments(weights.metadata)
    decoder = {key: value for key, value in recorded.items() if key.startswith("decoder_") and value is not None}
    pretrain = (
        f"model.name=crossmae_vit_{MODEL_NAMES.get(sizes['embed_dim'], MODEL_NAMES[768])}",
        *(f"model.{key}={value}" for key, value in (sizes | decoder).items()),
    )
    detect = tuple(f"MODEL.VIT.{key.upper()}={value}" for key, value in sizes.items())
    if recipe.has_windows:
        last_of_quarters = [round(number * sizes["depth"] / 4) - 1 for number in (1, 2, 3, 4)]  # as in ViTDet
        detect = (*detect, f"MODEL.VIT.GLOBAL_BLOCKS={last_of_quarters}")
    return (*pretrain, CONTINUED_LR), detect


def images_per_step(recipe: Recipe, images: int, settings: Sequence[str] = ()) -> int:
    """Choose the number of images in a step of pretraining.

    It is the number of the config, or less for few images, because an epoch should have four steps.
    """
    given, wanted = recipe.config(settings).optim.images_per_process, max(1, images // 4)
    return given if given <= wanted else 2 ** int(math.log2(wanted))


def choose_size(recipe: Recipe, long_side: int) -> int:
    """Choose the smallest size that does not shrink most images.

    Args:
        long_side: median of the longer sides, in pixels.
    """
    return next((size for size in recipe.sizes if size >= long_side), recipe.sizes[-1])


def smaller_size(recipe: Recipe, size: int, epochs: float, wanted: float, least: float = 0) -> int | None:
    """Choose a size with which the detector sees its images `wanted` times.

    The time of a step is taken as proportional to the number of pixels.

    Args:
        least: smallest size, because objects must not become smaller than a patch.

    Returns None if no allowed size is smaller than `size`.
    """
    target = size * math.sqrt(epochs / wanted)
    smaller = [one for one in recipe.sizes if least <= one < size]
    return max([one for one in smaller if one <= target], default=smaller[0]) if smaller else None


def time_pretraining(trainings: Trainings, batch: int, images: int) -> Timing:
    """Measure some steps of pretraining, with its start and two evaluations.

    The overhead is that of a run with all its evaluations.
    """
    run = trainings.output / "timing" / "pretrain"
    epochs = math.ceil(TIMED_PRETRAINING / max(1, images // batch))
    words = trainings.pretrain_words(Length(images, epochs, TIMED_PRETRAINING, 0.0), batch, run, evaluations=1)
    words = (*words, f"schedule.max_steps={TIMED_PRETRAINING}", "log.every_steps=1")
    timing = _time("pretrain", ("tools/pretrain.py", *words), run, run / "model.safetensors", batch)
    evaluation = max(timing.overhead - START_SECONDS, 0.0) / 2
    return replace(timing, overhead=timing.overhead + (EVALUATIONS - 1) * evaluation)


def time_detection(trainings: Trainings, size: int) -> Timing:
    """Measure some steps of a detector, with its start and evaluation."""
    assert trainings.val is not None
    name = f"detect-{size}"
    run = trainings.output / "timing" / name
    val = _few_images(trainings.val, trainings.output / "timing" / "val.json")
    short = replace(trainings, val=val)
    words = ("tools/train_net.py", *short.detect_words(TIMED_DETECTION, size, None, run))
    timing = _time(name, words, run, run / "results.json", trainings.detect_batch)
    per_image = max(timing.overhead - START_SECONDS, 0.0) / val.count
    return replace(timing, overhead=timing.overhead + per_image * (trainings.val.count - val.count))


def _few_images(val: LabelledSplit, path: Path) -> LabelledSplit:
    """Write a COCO file with the first validation images."""
    if val.count <= MOST_TIMED_IMAGES:
        return val
    content = read_json(val.json)
    write_json(path, select(content, [id_key(image["id"]) for image in content["images"][:MOST_TIMED_IMAGES]]))
    return LabelledSplit(path, val.images, MOST_TIMED_IMAGES)


def _time(name: str, words: tuple[str, ...], run: Path, done: Path, images: int) -> Timing:
    cell = Cell(name, {"kind": name}, (Step(words, done, folder=run),), timing_reader(run / "log.jsonl"))
    logging.getLogger(run_cells.__module__).setLevel(logging.ERROR)  # its lines are those of a grid
    try:
        rows = run_cells([cell], run.parent / RESULTS)
    except KeyboardInterrupt:
        print("stopped while this machine was measured. Repeat the command.", flush=True)
        raise
    if not rows:
        raise UserError(f"{run}: the measurement was stopped. Repeat the command.")
    overhead, step = seconds_of_kind(rows[0], "wall_seconds")
    return Timing(overhead, step, images)
