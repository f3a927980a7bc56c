"""The nets that the package brings with it, a folder each: weights/DATA/NET, as `export.write_folder` writes it.

result.json and README.md, the model card, come with it; `python -m benchmarks.put_on_board` writes all of them.
"""

from __future__ import annotations

import dataclasses
import pathlib

from etils import epath

from resattn_jax.errors import UsageError, nearest
from resattn_jax.export.folder import WEIGHTS
from resattn_jax.run import Run

FOLDER = pathlib.Path(__file__).parent / "weights"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A net on board. `resattn_jax.load(name)` opens it.

    data: config.data.name of what it was trained on. top1: of the weights as they lie here, on `examples` images that
    it was not trained on. size: of the weights in bytes.
    """

    name: str
    data: str
    net: str
    top1: float
    examples: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.net} on {self.data}, top-1 {self.top1:.2%} of {self.examples:,}, {self.size:,} bytes"
        )


def pretrained() -> list[Pretrained]:
    """The nets on board, by name."""
    return [_described(name) for name in _names()]


def find(name: epath.PathLike) -> Run:
    """The folder of a net on board. Raises UsageError for an unknown name, saying which there are."""
    names = _names()
    if str(name) not in names:
        near = nearest(name, names)
        raise UsageError(f"there is no folder {name}, and no net on board has this name{near}: {', '.join(names)}")
    return Run(FOLDER / str(name))


def _names() -> list[str]:
    return sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob(f"*/*/{WEIGHTS}"))


def _described(name: str) -> Pretrained:
    run = Run(FOLDER / name)
    config, result = run.config, run.result
    assert config  # the folder is the package's own
    assert result
    return Pretrained(
        name=name,
        data=config.data.name,
        net=config.model.name,
        top1=result["final"]["top1"],
        examples=result["final"]["examples"],
        size=(run.path / WEIGHTS).stat().length,
    )
