"""The formats of MNIST and CIFAR, read with nothing trusted: sizes and checksums are compared before anything is used."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runner.data.locations import CifarFiles
from runner.faults import BadData, MissingInput


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An idx file of unsigned bytes, plain or .gz: two zero bytes, type 8, number of dimensions, sizes, values."""
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (struct.error, EOFError, zlib.error, OSError) as error:
        raise BadData(f"{path}: not a readable idx file ({error}); delete it and get it again") from error
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if (zeros, kind) != (0, 8) or not shape or len(values) != int(np.prod(shape)):
        raise BadData(
            f"{path}: header says type {kind} and shape {shape}, the file holds {len(values)} bytes of values"
        )
    return values.reshape(shape).copy()


def verified_pickles(root: Path, files: CifarFiles) -> dict[str, Any]:
    """Unpickle the files of the folder, or straight out of the archive, each only after its MD5 was found right.

    A pickle may run any code: the very bytes that were checked are the ones that are loaded.
    """
    expected = files.train | files.test | files.meta
    where = root / files.folder
    if where.is_dir():
        raw = {name: (where / name).read_bytes() for name in expected if (where / name).is_file()}
    else:
        where = root / files.archive
        raw = _tar_members(where, {f"{files.folder}/{name}": name for name in expected})
    for name, md5 in expected.items():
        if name not in raw:
            raise MissingInput(f"{where}: {name} is missing; get the data set again")
        if hashlib.md5(raw[name], usedforsecurity=False).hexdigest() != md5:
            raise BadData(f"{where}: {name} is damaged or not the original (MD5 differs); it was not loaded")
    return {name: pickle.load(io.BytesIO(raw[name]), encoding="latin1") for name in expected}


def _tar_members(archive: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """Contents of the wanted members, read in one pass; nothing is unpacked to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() and member.name in wanted else None
                if stream:
                    found[wanted[member.name]] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadData(f"{archive}: the archive is damaged ({error}); delete it and get it again") from error
    return found
