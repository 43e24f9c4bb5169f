"""What every Python that the tests start does first, by its PYTHONPATH: it packs each script once in a test run.

Each run of train_gpt.py counts the bytes of its packed form, which takes 3 s. The packed scripts are kept in the folder
that the environment names, by the content of the script and of the packer. The tests' own processes pack anew.
"""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

KEPT = os.environ.get("PACKED_ONCE")
locate = importlib.util.spec_from_file_location


def keeping(pack, packer):
    """The packer's function `pack`, which takes a result from the folder, or leaves it there."""

    def packed(source):
        path = Path(KEPT, hashlib.sha256(packer + source).hexdigest())
        if not path.is_file():
            handle, name = tempfile.mkstemp(dir=KEPT)
            with os.fdopen(handle, "wb") as file:
                file.write(pack(source))
            os.replace(name, path)
        return path.read_bytes()

    return packed


def locate_and_keep(name, location=None, **options):
    """importlib's function; a module pack_code gets a `pack` that keeps its results."""
    spec = locate(name, location, **options)
    if name == "pack_code" and spec and Path(location).is_file():
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.pack = keeping(module.pack, Path(location).read_bytes())

        spec.loader.exec_module = exec_module
    return spec


if KEPT:
    importlib.util.spec_from_file_location = locate_and_keep
