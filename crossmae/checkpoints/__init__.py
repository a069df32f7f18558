"""Weight files: read every supported layout, load it strictly, convert it for another library.

| function  | purpose                                                                             |
| --------- | ----------------------------------------------------------------------------------- |
| `inspect` | describe the content of a file and its possible conversions                         |
| `load`    | load a file into a model and account for every tensor; all tools use this function  |
| `convert` | write a file for another library, and check that it computes the same               |
| `read`    | return the tensors of a file under plain names                                      |
"""

from crossmae.checkpoints.conversion.convert import Sizes, convert
from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.conversion.targets import TARGETS
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.weights import read_weights as read

__all__ = ["TARGETS", "Sizes", "convert", "inspect", "load", "read"]
