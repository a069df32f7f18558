"""Files in the folder of a classification run, as its page reads them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from crossmae.reports.run_folder import FileContent

CONFIG, FOLDER = "config.yaml", "evaluation"


class ClassRow(FileContent):
    """A class of an evaluation, with shares of 1, None where undefined for lack of images."""

    name: str
    samples: int
    recall: float | None
    precision: float | None
    ap: float | None = None


class ConfusedClasses(FileContent):
    """Images of one class that were taken for another, and their share of the true class."""

    true: str
    predicted: str
    count: int
    share: float


class Evaluation(FileContent):
    """Content of `evaluation.json`: numbers of the whole data set by name, and `about` what they are."""

    samples: int
    numbers: dict[str, float | None]
    top1_interval: tuple[float, float] | None = None
    classes: list[ClassRow]
    most_confused: list[ConfusedClasses] = Field([])
    about: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_headline(self) -> Evaluation:
        if self.metric not in self.numbers:
            raise ValueError("numbers have neither top1 nor mean_ap")
        return self

    @property
    def multi_label(self) -> bool:
        """True if an image can have several classes."""
        return self.metric == "mean_ap"

    @property
    def metric(self) -> str:
        """The name of the headline number."""
        return "mean_ap" if "mean_ap" in self.numbers else "top1"


class HardImage(FileContent):
    """A wrongly classified image: its picture or the fault that prevents one, and classes with probabilities."""

    name: str
    picture: str | None
    fault: str = ""
    true: list[tuple[str, float]]
    predicted: list[tuple[str, float]]


class Hardest(FileContent):
    """Content of `hardest.json`: the number of wrong images, and the worst of them."""

    wrong: int
    images: list[HardImage]
