"""The one error of data/prepare.py that a user sees, and packages that only some sources need."""

import importlib
from types import ModuleType


class PrepareError(Exception):
    """Something that the user can mend; the message is one line that names the option or the file."""


def library(name: str) -> ModuleType:
    """Import a package of requirements-data.txt. Raises PrepareError with what to do where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PrepareError(f"the package {error.name} is missing: pip install -r requirements-data.txt") from None
