"""Writing so that nothing is ever half there: whole files by rename, whole lines by one append."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.faults import StorageError

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put `content` at `path`: readers see the old file or the new one, also after a power cut where `durable`.

    Raises StorageError with the number of bytes needed; the old file stays, the temporary one is removed.
    """
    write_together({path: content}, durable=durable)


def write_together(contents: Mapping[Path, bytes], *, durable: bool = True) -> None:
    """The same of several files: all of them are written before the first takes its name, so a full disk changes none."""
    temporaries: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in contents.items():
            if path.is_dir() and not path.is_symlink():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporaries[path] = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            _write_new(temporaries[path], content, durable)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
            if durable:
                sync_folder(path.parent)
    except OSError as error:
        for temporary in temporaries.values():
            remove(temporary)
        raise StorageError(f"{path}: could not write {len(contents[path]):,} bytes: {reason(error)}") from error


def _write_new(path: Path, content: bytes, durable: bool) -> None:
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
    try:
        write_all(handle, content)
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any], *, durable: bool = False) -> None:
    """A JSON file, whole or not at all."""
    write_atomic(path, json_bytes(value), durable=durable)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of such a file."""
    return (json.dumps(value, indent=1, allow_nan=False, default=str) + "\n").encode()


def write_all(handle: int, content: bytes) -> None:
    """os.write until everything is written; a full disk may take only a part."""
    view = memoryview(content)
    while view:
        written = os.write(handle, view)
        if written == 0:
            raise OSError(errno.ENOSPC, "nothing more could be written")
        view = view[written:]


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete if it is there; a failure to tidy up is never the error that a person sees."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def still_true(folder: Path, status: Mapping[str, Any]) -> dict[str, Any]:
    """The status of a run folder; a process that was killed could not write that it is no longer running.

    Whoever works in the folder holds its lock, so a lock that is free tells; where there is none, the status is believed.
    """
    told = dict(status)
    if told.get("state") == "running" and is_abandoned(folder):
        told |= {"state": "interrupted", "reason": "its process is gone; run the same command again to go on"}
    return told


def is_abandoned(folder: Path) -> bool:
    """Whether the lock of a run folder is there and free."""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY | NO_FOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def reason(error: OSError) -> str:
    """What the operating system says, with a hint where one helps."""
    hints = {errno.ENOSPC: "; free some space and run the same command again", errno.EROFS: "; the disk is read-only"}
    return f"{error.strerror or error}{hints.get(error.errno or 0, '')}"
