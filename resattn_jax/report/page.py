"""Pages: one self-contained file each, made of the templates beside this module. Nothing in one asks the network.

Every value is escaped, for class names and file names may hold anything.
"""

from __future__ import annotations

import base64
import io
import pathlib
from typing import Any

import jinja2
import PIL.Image
from etils import epath

from resattn_jax import buckets
from resattn_jax.errors import UsageError, printable, reason
from resattn_jax.run import Run

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> bytes:
    """A template with its values, as a file has it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = png_url
    return environment.get_template(template).render(values).encode()


def png(image: PIL.Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def png_url(image: PIL.Image.Image) -> str:
    """An image as an address that holds it, for `src` and `url()`."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def write_files(folder: epath.PathLike, files: dict[str, bytes]) -> None:
    """Writes files by their names into a folder, which is made; each whole or not at all. Raises UsageError."""
    run = Run(folder)
    try:
        run.make()
        for name, content in files.items():
            run.write_bytes(name, content)
    except buckets.faults() as error:
        raise UsageError(
            f"{printable(str(folder))} cannot be written: {reason(error)}; choose another --output"
        ) from error


def _finalize(value: Any) -> Any:
    """What is put out of a value: a text in one line. What a template made itself stays as it is."""
    return value if hasattr(value, "__html__") else printable(str(value))
