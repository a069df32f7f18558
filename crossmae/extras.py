"""Libraries that only some data need, so that they are no part of the core."""

from __future__ import annotations

import importlib
from typing import Any

from crossmae.errors import UserError


def import_extra(module: str, what: str, extra: str = "data") -> Any:
    """Import a library of an extra in setup.py.

    Raises:
        UserError: not installed; names `what` needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(f'{what} needs {library}: pip install -e ".[{extra}]"') from None
