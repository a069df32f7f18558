"""Steps of detectron2 without the statistics that it computes for the log.

Each number that Python reads from a GPU makes the host wait for all work queued before. Half of these numbers in a step
of detectron2 are statistics or assertions. They are left out in steps that are not logged. Losses and random numbers
stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, ROIHeads, fast_rcnn, mask_head
from torch import Tensor
from torch.overrides import TorchFunctionMode


class UnreadNumbers(TorchFunctionMode):
    """Answers `item()` with 1, and the truth of a tensor with True, without reading the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return 1
        return True if func is Tensor.__bool__ else func(*args, **(kwargs or {}))


def _unread(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with UnreadNumbers():
            return function(*args, **named)

    return call


def _nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    return wraps(function)(lambda *args, **named: None)


# Functions that read numbers only for statistics, or to assert that boxes and overlaps are valid.
_REPLACED: tuple[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]], ...] = (
    (fast_rcnn, "_log_classification_stats", _nothing),
    (mask_head, "mask_rcnn_loss", _unread),
    (RPN, "losses", _unread),
    (ROIHeads, "label_and_sample_proposals", _unread),
    (CascadeROIHeads, "_match_and_label_boxes", _unread),
    (Matcher, "__call__", _unread),
    (Box2BoxTransform, "get_deltas", _unread),
)


@contextmanager
def statistics_left_out() -> Iterator[None]:
    """Leave out statistics and assertions of detectron2's losses.

    The numbers that detectron2 puts into its storage are then wrong.
    """
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _REPLACED]
    for owner, name, replace in _REPLACED:
        setattr(owner, name, replace(vars(owner)[name]))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
