"""Packages that only some kinds of text files need."""

import importlib
from types import ModuleType

from minitron_mcore.errors import UserError


def optional_import(module: str, path: str) -> ModuleType:
    """Import a module that reads the file `path`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{path} needs {package}, which is not installed: pip install 'minitron_mcore[data]'."
        ) from error
