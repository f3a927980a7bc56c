"""--mode=attention: what the attention modules of a net do to pictures, drawn, or over a whole split, measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import ml_collections
from etils import epath

from resattn_jax import runtime
from resattn_jax.classifier import Classifier, Image, open_net
from resattn_jax.cli import Command
from resattn_jax.data.listing import list_pictures, split_rows
from resattn_jax.data.pictures import BrokenPicture, Picture
from resattn_jax.data.sources import open_source
from resattn_jax.data.spec import DataSpec, check_same_classes
from resattn_jax.errors import UsageError, printable, reason
from resattn_jax.experiment import build_to_measure
from resattn_jax.mask_statistics import Summary, summarise
from resattn_jax.report.attention import Look, attention_page, drawn_look, look, product_of
from resattn_jax.report.attention_figure import attention_figure
from resattn_jax.report.attention_summary import print_summary, summary_page
from resattn_jax.report.page import write_files

MOST = 100  # pictures on a page


def run(command: Command) -> None:
    """Prints where the page lies, and with --summary the tables on it."""
    output = epath.Path(command.output or command.run.path / "attention")
    runtime.keep_programs()
    if not command.summary:
        texts = [text for text in command.images if split_rows(text) is None]
        list_pictures(texts)  # a mistake is told before the net is opened
    net = open_net(command.run, command.config, command.checkpoint)
    if command.summary:
        summary = summarise_net(net)
        print_summary(summary)
        write_summary(net, summary, output)
        print(f"the summary of {net} is in {printable(str(output))}: summary.html, summary.json")
        return
    write_looks(net, looks_at(net, command.images), output)
    print(f"what {net} looks at is drawn in {printable(str(output / 'index.html'))}")


def looks_at(net: Classifier, given: tuple[str, ...]) -> Iterator[Look]:
    """Looks at the pictures that were named, as `Command.images` has them; broken ones are told of and passed over.

    Raises UsageError when there are more than a page holds, or none can be read.
    """
    named = [one for text in given for one in _named(net, text)]
    if len(named) > MOST:
        raise UsageError(
            f"--images names {len(named):,} pictures; a page holds {MOST}. --mode=predict takes any number"
        )
    seen, last = 0, ""
    for name, image, label in named:
        try:
            yield look(net, pixels(name, image, net.spec), name, label)
            seen += 1
        except UsageError as error:
            last = str(error)
            print(last)
    if not seen:
        raise UsageError(f"none of the pictures could be read; the last: {last}")


def _named(net: Classifier, text: str) -> Iterator[tuple[str, str | bytes, str | None]]:
    """(name, a path or the content of a file, the true class or None) of each picture that a text stands for."""
    rows = split_rows(text)
    if rows is None:
        yield from ((path, path, None) for path in list_pictures([text]))
        return
    data = net.config.data
    source = open_source(data.name, data.eval_split, data.dir)
    check_same_classes(net.labels, source.class_names, "the net")
    for row in rows:
        if row >= len(source):
            raise UsageError(f"--images={printable(text)}: the evaluation split has rows 0 to {len(source) - 1:,}")
        content, label = source[row]
        yield source.name(row), content, net.labels[label]


def pixels(name: str, image: str | bytes, spec: DataSpec) -> Image:
    """A picture as `look` takes it. image: a path, or the content of a file. Raises UsageError."""
    if isinstance(image, str):
        return image
    try:
        return Picture(image, upright=spec.exif_orientation).pixels(channels=spec.eval_shape[-1])
    except BrokenPicture as error:
        raise UsageError(f"{printable(name)} cannot be read: {reason(error)}") from error


def write_looks(net: Classifier, looks: Iterable[Look], output: epath.PathLike) -> None:
    """Writes index.html and a figure for each picture, picture_1.png, … Raises UsageError when they cannot be."""
    files, drawn = {}, []
    for i, one in enumerate(looks, 1):
        files[f"picture_{i}.png"] = attention_figure(one, product_of(net))
        drawn.append(drawn_look(one, f"picture_{i}.png"))
    write_files(output, {**files, "index.html": attention_page(net, drawn)})


def summarise_net(net: Classifier, devices: list[jax.Device] | None = None) -> Summary:
    """Measures a net's modules over config.data.eval_split, the centre view of each picture, on all devices."""
    config = _single_view(net.config)
    experiment = build_to_measure(config, net.spec, runtime.make_mesh(devices))
    stream, variables = experiment.open_eval(config), experiment.on_every_device(net.variables)
    return summarise(experiment, variables, stream, say=lambda what: print(what, flush=True))


def _single_view(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    one = config.copy_and_resolve_references()
    one.eval.views = 1
    return one


def write_summary(net: Classifier, summary: Summary, output: epath.PathLike) -> None:
    """Writes summary.json and summary.html. Raises UsageError when they cannot be written."""
    plain: dict[str, Any] = {"net": str(net), "model": net.config.model.name, **dataclasses.asdict(summary)}
    content = json.dumps(plain, indent=2) + "\n"
    write_files(output, {"summary.json": content.encode(), "summary.html": summary_page(net, summary)})
