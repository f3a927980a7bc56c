"""What a net says of many pictures: lines on the console, or a file, written as the net goes along."""

from __future__ import annotations

import contextlib
import csv
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import rich.cells

from resattn_jax.errors import RunError, UsageError, nearest, printable, reason

KINDS = (".csv", ".jsonl", ".parquet")
_WIDEST = 60, 24  # letters of the columns for a path and for a class on the console
_ROWS = 4096  # that a group of a Parquet file has


class Prediction(NamedTuple):
    """A picture's path, its (class, probability) from the most probable on, and why it could not be read."""

    image: str
    top: Sequence[tuple[str, float]] = ()
    error: str | None = None


Write = Callable[[Prediction], None]


def check_output(path: str) -> None:
    """Raises UsageError when a file of this name cannot be written, so that it is told before anything is computed."""
    file = pathlib.Path(path)
    if file.suffix not in KINDS:
        raise UsageError(
            f"--output={printable(path)}: its name must end in .csv, .jsonl or .parquet{nearest(file.suffix, KINDS)}"
        )
    if not file.parent.is_dir():
        raise UsageError(f"--output={printable(path)}: there is no folder {printable(str(file.parent))}")
    if file.suffix == ".parquet":
        _pyarrow()


@contextlib.contextmanager
def writing(path: str, count: int) -> Iterator[Write]:
    """Gives what writes a row of a file, whose name says which kind; `count` classes of each picture.

    A row has image, class1, probability1, …, and error, which is empty for a picture that was read; in .jsonl it is
    {"image", "top": [{"class", "probability"}, …]} or {"image", "error"}. Bytes of a path that are no UTF-8 are
    Python's surrogates in .jsonl, from which the path can be made again, and are escaped in the other kinds, which hold
    text alone. The file is there whole or not at all. Raises RunError when it cannot be written.
    """
    file = pathlib.Path(path)
    temporary = file.with_name(f".{file.name}.tmp")
    write = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix]
    try:
        with write(temporary, count) as write_row:
            yield write_row
        temporary.replace(file)
    except OSError as error:
        raise RunError(f"{printable(path)} cannot be written: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _columns(count: int) -> list[str]:
    return ["image", *(f"{what}{i}" for i in range(1, count + 1) for what in ("class", "probability")), "error"]


def _row(prediction: Prediction, count: int) -> list[Any]:
    """The values of `_columns`, None where there is none."""
    values: list[Any] = [value for pair in prediction.top for value in pair]
    values += [None] * (2 * count - len(values))
    return [_text(value) for value in (prediction.image, *values, prediction.error)]


def _text(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


@contextlib.contextmanager
def _csv(path: pathlib.Path, count: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_columns(count))
        yield lambda prediction: rows.writerow(
            f"{value:.6g}" if isinstance(value, float) else value for value in _row(prediction, count)
        )


@contextlib.contextmanager
def _jsonl(path: pathlib.Path, count: int) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(prediction: Prediction) -> None:
            row: dict[str, Any] = {"image": prediction.image}
            if prediction.error is None:
                row["top"] = [{"class": name, "probability": share} for name, share in prediction.top]
            else:
                row["error"] = prediction.error
            file.write(json.dumps(row) + "\n")

        yield write


@contextlib.contextmanager
def _parquet(path: pathlib.Path, count: int) -> Iterator[Write]:
    pa, pq = _pyarrow()
    kinds = {"p": pa.float32()}  # of the probabilities; every other column is text
    schema = pa.schema([(name, kinds.get(name[0], pa.string())) for name in _columns(count)])
    waiting: list[list[Any]] = []
    with pq.ParquetWriter(str(path), schema) as file:

        def flush() -> None:
            columns = [list(column) for column in zip(*waiting, strict=True)] or [[] for _ in schema]
            file.write_table(pa.table(columns, schema=schema))
            waiting.clear()

        def write(prediction: Prediction) -> None:
            waiting.append(_row(prediction, count))
            if len(waiting) == _ROWS:
                flush()

        yield write
        flush()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("a .parquet file needs PyArrow: pip install pyarrow; .csv and .jsonl do not") from error
    return pyarrow, pyarrow.parquet


def printing(images: Sequence[str], labels: Sequence[str]) -> Write:
    """What prints a line for each picture, in columns."""
    longest = [max(map(rich.cells.cell_len, map(printable, texts))) for texts in (images, labels)]
    widths = list(map(min, longest, _WIDEST))

    def write(prediction: Prediction) -> None:
        if prediction.error is not None:
            found = f"broken: {prediction.error}"
        else:
            found = "   ".join(f"{_wide(name, widths[1])} {share:6.1%}" for name, share in prediction.top)
        print(f"{_wide(prediction.image, widths[0])}   {found}")

    return write


def _wide(text: str, width: int) -> str:
    """The text as it may be printed, filled up to a width; a longer one is not cut."""
    text = printable(text)
    return text + " " * max(width - rich.cells.cell_len(text), 0)
