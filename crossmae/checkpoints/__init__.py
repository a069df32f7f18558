"""Weight files: read any of them, load them strictly, convert between the layouts of the field's libraries.

| function  | purpose                                                                             |
| --------- | ----------------------------------------------------------------------------------- |
| `inspect` | what a file is, and what it can become                                              |
| `load`    | its weights into a model, with every tensor accounted for; what every tool uses     |
| `convert` | a file for another library, proven to compute the same                              |
| `read`    | its tensors under plain names, for anything else                                    |
"""

from crossmae.checkpoints.conversion.convert import Sizes, convert
from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.conversion.targets import TARGETS
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.weights import read_weights as read

__all__ = ["TARGETS", "Sizes", "convert", "inspect", "load", "read"]
