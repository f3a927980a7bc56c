"""Runs in a Cloud Storage bucket, named gs://BUCKET/FOLDER or mounted by Cloud Storage FUSE, as far as they differ.

A bucket holds objects, each there whole or not at all. Nothing can be added to an object, and a folder, which is only
what names have in common, is not renamed in one go. So a checkpoint is written where it stays and counts once its
commit file is there, the last file to be written and the first to go. What grows is written on the local disk, and a
thread copies it up.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

from etils import epath

from resattn_jax.errors import UsageError, reason
from resattn_jax.rules import shortened
from resattn_jax.signals import SIGNALS

COMMIT_FILE, _METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"  # Orbax's
MOUNTS = pathlib.Path("/proc/mounts")
MOUNTED = {"fuse.gcsfuse", "fuse"}  # the second is what GKE's driver for Cloud Storage FUSE calls it
PAUSE = 1.0  # seconds: an object may be written once a second

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.ASCII | re.IGNORECASE)
_FOLDER = re.compile(r"gs://[\w.-]+(/+(?!\.{1,2}(/|$))[\w.,+=@-]+)+/*", re.ASCII)  # nothing that gcsfs or Orbax expands


def is_url(path: epath.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return os.fspath(path).startswith("gs://")


def opened(path: epath.PathLike) -> epath.Path:
    """The path to work with; `~` is the home folder. Raises UsageError for an address that cannot be worked with."""
    text = os.fspath(path)
    if not _ADDRESS.match(text):
        return epath.Path(path).expanduser()
    if not is_url(text):
        raise UsageError(f"{shortened(text)} is no path; a folder in a bucket is written gs://BUCKET/FOLDER")
    if not _FOLDER.fullmatch(text):
        raise UsageError(f"{shortened(text)}: write gs://BUCKET/FOLDER, of letters, digits, and .,_-+=@")
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(f"{shortened(text)} needs gcsfs; install it: pip install -e '.[gcs]'")
    import fsspec

    # gcsfs would go on to list what it listed before, without what TensorStore or another process has written since.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    for library in ("gcsfs", "google.auth"):  # they log at length what they raise
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return epath.Path(text)


def faults() -> tuple[type[Exception], ...]:
    """What reading and writing raise: OSError, and what gcsfs and the libraries under it raise besides."""
    kinds = ("gcsfs.retry", "HttpError"), ("google.auth.exceptions", "GoogleAuthError"), ("aiohttp", "ClientError")
    return OSError, *(getattr(sys.modules[module], name) for module, name in kinds if module in sys.modules)


def absolute(path: epath.Path) -> epath.Path:
    """An absolute path; an address is one."""
    return path if is_url(path) else path.absolute()


def listed(folder: epath.Path) -> list[epath.Path]:
    """The paths in a folder. A folder of a bucket that holds nothing is none, and has none."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        if is_url(folder):
            return []
        raise


def write(path: epath.Path, content: bytes) -> None:
    """Writes an object, whole or not at all."""
    _files().pipe_file(str(path), content)


# ---- Checkpoints.


def commits_by_file(folder: epath.Path) -> bool:
    """Whether a checkpoint in `folder` counts by its commit file, since folders are not renamed in one go there."""
    return is_url(folder) or file_system(folder) in MOUNTED


def committed(step: epath.Path) -> bool:
    """Whether a checkpoint was written to its end, where `commits_by_file`."""
    if (step / COMMIT_FILE).exists():
        return True
    if is_url(step):
        return False
    try:  # Orbax before 0.12.3 renamed the folder on a mount too, and wrote down when instead of a commit file
        metadata = json.loads((step / _METADATA).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(metadata, dict) and metadata.get("commit_timestamp_nsecs") is not None


def file_system(path: epath.PathLike) -> str:
    """The type of the file system that a local path lies on, as Linux names it; "" where nothing says so."""
    parts = pathlib.Path(os.path.realpath(path)).parts
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return ""
    best, found = 0, ""
    for line in lines:  # of two mounts in one place the later one is seen
        _, place, kind, *_ = line.split(b" ")
        plain = re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), place)
        there = pathlib.Path(os.fsdecode(plain)).parts
        if len(there) >= best and parts[: len(there)] == there:
            best, found = len(there), kind.decode()
    return found


def move(step: epath.Path, target: epath.Path) -> None:
    """Moves a checkpoint, in an order that leaves it under one name or under both, whenever the process ends."""
    _copy(step, target)
    delete(step)


def delete(step: epath.Path) -> None:
    """Deletes a checkpoint, which it no longer is before anything else of it goes."""
    for name in (COMMIT_FILE, _METADATA):
        (step / name).unlink(missing_ok=True)
    step.rmtree(missing_ok=True)


def _copy(source: epath.Path, target: epath.Path) -> None:
    if not is_url(target):
        target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name)


# ---- One writer.


def local_lock(folder: epath.Path) -> str:
    """The file on the local disk by which processes of this host and user keep each other out of a bucket's folder."""
    place = os.path.join(tempfile.gettempdir(), f"resattn_jax-{os.getuid()}")
    os.makedirs(place, mode=0o700, exist_ok=True)
    return os.path.join(place, f"{hashlib.blake2b(str(folder).encode(), digest_size=12).hexdigest()}.lock")


@contextlib.contextmanager
def claimed(lock: epath.Path, who: str) -> Iterator[None]:
    """Holds the object `lock`, which the bucket makes for one process alone, and deletes it at the end.

    who: "… user UID on HOST since …". What a dead process of the same user and host has left is taken over, so hold
    `local_lock` before. Raises UsageError naming who has it.
    """
    mine = who.encode()
    try:
        _files().pipe_file(str(lock), mine, mode="create")
    except FileExistsError:
        there = lock.read_bytes()
        if there != mine and _place(there) != _place(mine):  # its own where the answer to a first try was lost
            raise UsageError(
                f"{lock.parent} is in use by {there.decode(errors='replace').strip()}; wait until it ends, or end it."
                f" If it is dead, remove what it left: gcloud storage rm {lock}"
            ) from None
        write(lock, mine)

    def release() -> None:
        with contextlib.suppress(*faults()):
            if lock.read_bytes() == mine:
                lock.unlink()

    SIGNALS.at_end.append(release)
    try:
        yield
    finally:
        SIGNALS.at_end.remove(release)
        release()


def _place(who: bytes) -> bytes:
    return who.rpartition(b" user ")[2].rpartition(b" since ")[0]


# ---- What grows.


class Uploads:
    """Files that are written in `folder`, on the local disk, and copied to a bucket by a thread of its own.

    Use it as a context manager; at the end all is copied, and the folder goes. It stays where it could not be copied.
    """

    def __init__(self, target: epath.Path):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="resattn_jax-"))
        self._target = target
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "uploads")
        self._next: concurrent.futures.Future[None] | None = None
        self._copied: dict[str, int] = {}  # bytes of each file
        self._last, self._ending, self._failure = -PAUSE, threading.Event(), ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.begin()
        self._thread.shutdown()
        if not self._failure:
            shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self) -> None:
        """Begins to copy what is new, and returns."""
        if self._next is None or self._next.running() or self._next.done():
            self._next = self._thread.submit(self._copy)

    def wait(self) -> None:
        """Returns when what was new at the last `begin` is copied, or could not be."""
        if self._next:
            self._next.result()

    def _copy(self) -> None:
        self._ending.wait(max(0.0, self._last + PAUSE - time.monotonic()))
        try:
            for path in sorted(self.folder.iterdir()):
                content = path.read_bytes()
                if len(content) != self._copied.get(path.name):
                    write(self._target / path.name, content)
                    self._copied[path.name] = len(content)
            self._failure = ""
        except Exception as error:  # whatever the network does to gcsfs; the run is worth more than its log
            told, self._failure = self._failure, reason(error)
            if not told or self._ending.is_set():
                print(f"{self.folder} could not be copied to {self._target}: {self._failure}", file=sys.stderr)
        self._last = time.monotonic()


def _files() -> Any:
    """The file system that epath and Orbax use too."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
