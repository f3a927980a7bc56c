"""Files of state dicts, read and written; nothing that is in them is ever executed.

PyTorch itself is needed for all but .safetensors, .npz and MXNet's .params, and is imported where a file needs it.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy

from resattn_jax import mxnet_files

_SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors", ".npz", ".params", ".tar", ".ckpt", ".bin", ".t7")

# Where checkpoints hold a state dict, the first that is there; averages of the weights come last.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema")

# How files begin that lie where a checkpoint should.
_STRAYS = {
    rb"version https://git-lfs": "is a git-lfs pointer, not the file it stands for; git lfs pull fetches that",
    rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml)": "is an HTML or XML page, not the file it should lead to",
}
_HEAD = 2**20  # bytes of a file that tell its kind


def read_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a state dict from a file, executing nothing that is in it.

    Args:
      path: .safetensors, .npz or MXNet's .params, which need neither PyTorch nor MXNet, or .pkl, .pth, .pt, .tar,
        .ckpt, .bin or .t7 as torch.save writes them, in today's or the old format; the content decides which it is, of
        .npz the name. The state dict may lie under "state_dict",
        "model_state_dict", "model", "net", "state_dict_ema" or "model_ema", beside numbers and strings.

    Returns:
      {name: array}; bfloat16 is made float32, other types stay.

    Raises:
      ValueError: the file is not there, is no checkpoint, holds more than names and tensors, or is damaged; or PyTorch
        is needed and not installed. The message is one line.
    """
    if Path(path).expanduser().is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    path = _check_path(path)
    head = _read_head(path)
    torch = None if _is_without_torch(path, head) else _import_torch(path)
    try:
        if torch:
            with path.open("rb") as file:  # given the path, torch.load goes by the suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
        elif head.startswith(mxnet_files.MAGIC):
            content = mxnet_files.decode(path.read_bytes())
        elif path.suffix.lower() == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                content = dict(arrays)
        else:
            content = safetensors.numpy.load_file(path)
        return {str(name): to_numpy(name, value) for name, value in find_state_dict(content).items()}
    except Exception as error:  # readers raise nearly everything on a broken file, and so do we on no state dict
        why = _reason(error)
        if not why.startswith("Unsupported global"):
            fault = f"is damaged, or holds something else than names and their tensors: {why}"
        elif b"torch.nn.modules" in head:
            fault = f"holds a whole pickled module, which is code; save net.state_dict() alone ({why})"
        else:
            fault = f"holds other objects than names and their tensors; save net.state_dict() alone ({why})"
        raise ValueError(f"{path} {fault}") from error


def write_torch(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes what `to_torch` gives: .safetensors and .npz without PyTorch, others that `read_torch` has by torch.save.

    Raises ValueError for another suffix, for .params, which MXNet alone writes, or when PyTorch is needed and not
    installed; OSError as `open` does.
    """
    path = _check_path(path)
    path.write_bytes(encode_torch(path, state_dict))


def encode_torch(path: str | os.PathLike[str], state_dict: Mapping[str, np.ndarray]) -> bytes:
    """What `write_torch` writes to `path`. Raises ValueError as it does."""
    path = _check_path(path)
    arrays = {name: np.array(array, order="C") for name, array in state_dict.items()}
    if path.suffix.lower() == ".safetensors":
        return safetensors.numpy.save(arrays)
    file = io.BytesIO()
    if path.suffix.lower() == ".npz":
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()
    if path.suffix.lower() == ".params":
        raise ValueError(f"{path} is read alone; write .npz, of which mx.nd.save makes one")
    torch = _import_torch(path)
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
    return file.getvalue()


def find_state_dict(content: Any) -> Mapping[Any, Any]:
    """The state dict in what a PyTorch file holds: the content itself, or what lies in the wrappers people use.

    Where there are several, averages of the weights for instance, a logged line names the one that is taken. Raises
    ValueError that says what there is instead: the type, or the keys of a mapping that has no arrays or holds mappings.
    """
    for _ in _WRAPPERS:  # as deep as a file may wrap it; a mapping that was unpickled may even contain itself
        there = [key for key in _WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)]
        if not there:
            break
        if len(there) > 1:
            logging.getLogger(__name__).warning("there are %s; %s is taken", " and ".join(there), there[0])
        content = content[there[0]]
    if not isinstance(content, Mapping):
        raise ValueError(f"it is of type {type(content).__name__}")
    arrays = {key for key, value in content.items() if hasattr(value, "dtype")}
    if (content and not arrays) or any(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(f"it has the keys {listed(sorted(content, key=arrays.__contains__))}")
    return content


def to_numpy(name: Any, value: Any) -> np.ndarray:
    """A torch tensor, known without importing torch, or an array; bfloat16, which numpy has not, becomes float32.

    Raises ValueError that names it, for what is neither, or a tensor of a kind that numpy has not.
    """
    if not hasattr(value, "dtype"):
        raise ValueError(f"{listed([name])} is of type {type(value).__name__}, not a tensor")
    is_bfloat16 = str(value.dtype).endswith("bfloat16")
    if not hasattr(value, "detach"):
        return np.asarray(value, np.float32 if is_bfloat16 else None)
    try:
        value = value.detach().cpu()
        return (value.float() if is_bfloat16 else value).numpy()
    except Exception as error:  # sparse, quantised and 8-bit tensors: TypeError, NotImplementedError, RuntimeError
        raise ValueError(f"{listed([name])} is no array for numpy: {_reason(error)}") from error


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first names, of at most 120 characters each, and how many more there are."""
    names = [str(name) for name in names]
    shown = ", ".join(_short(name, 120) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _short(text: str, most: int) -> str:
    """On one line and without its middle where it is too long; the end of a name says as much as its beginning."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def _reason(error: Exception) -> str:
    """The first sentence of a message; of PyTorch's, what follows its advice to load the file unsafely."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return _short((lines or [type(error).__name__])[0].split(". ")[0], 500)


def _check_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} is no PyTorch checkpoint by its name, which must end in {', '.join(_SUFFIXES)}")
    return path


def _read_head(path: Path) -> bytes:
    """The first bytes of a file. Raises ValueError for one that is not there, empty or plainly something else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    for beginning, kind in _STRAYS.items():
        if re.match(beginning, head, re.IGNORECASE):
            raise ValueError(f"{path} {kind}")
    return head


def _is_without_torch(path: Path, head: bytes) -> bool:
    """Whether a file is read without PyTorch: .npz by its name, as torch.save writes the same kind of archive.

    The others by their beginning, of safetensors a length in eight bytes and JSON; .safetensors by its name too when it
    has no beginning of torch.save's.
    """
    if head.startswith(mxnet_files.MAGIC) or path.suffix.lower() == ".npz" or head[8:9] == b"{":
        return True
    return path.suffix.lower() == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")


def _import_torch(path: Path) -> ModuleType:
    """PyTorch is an extra, and importing it takes seconds: only where a file needs it."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path} needs PyTorch, which is not installed: pip install -e '.[torch]'") from error
    return torch
