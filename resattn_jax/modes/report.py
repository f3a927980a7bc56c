"""--mode=report: a page of a run, or of several beside each other."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import ml_collections

from resattn_jax import runtime
from resattn_jax.classifier import Classifier, open_net
from resattn_jax.cli import Command
from resattn_jax.data.sources import open_source
from resattn_jax.errors import RunError, UsageError, printable
from resattn_jax.experiment import build_to_measure
from resattn_jax.mistakes import Assessment, assess
from resattn_jax.modes.attention import pixels
from resattn_jax.report.attention import look
from resattn_jax.report.colours import MASK, draw, picture
from resattn_jax.report.page import write_files
from resattn_jax.report.record import read_record
from resattn_jax.report.run_page import Measured, Mistake, run_page, runs_page
from resattn_jax.run import Run

MISTAKES = 24  # on a page


def run(command: Command) -> None:
    """Prints where the page lies, and what is not on it."""
    runtime.keep_programs()
    output = Run(command.output).path if command.output else command.run.path / "report.html"
    if len(command.runs) > 1:
        content = runs_page([read_record(one) for one in command.runs])
        what = f"{len(command.runs)} runs beside each other"
    else:
        content, what = page_of_run(command.run, command.config), str(command.run)
    write_files(output.parent, {output.name: content})
    print(f"the report of {printable(what)} is {printable(str(output))}")


def page_of_run(run: Run, config: ml_collections.ConfigDict) -> bytes:
    """The page of one run, whose best checkpoint is measured, or the newest where none was.

    config: the run's with what may differ for measuring. What cannot be measured is left out, and the page says why.
    Raises UsageError when there is no run.
    """
    record, measured = read_record(run), None
    try:
        measured = measure(open_net(run, config, "best", or_newest=True))
    except (UsageError, RunError) as error:
        why = f"Nothing was measured anew, so there are no confusions, calibration or mistakes: {error}."
        record.notes.append(why)
        print(printable(why))
    return run_page(record, measured, runtime.describe_versions(runtime.make_mesh()))


def measure(net: Classifier, devices: list[jax.Device] | None = None) -> Measured:
    """Measures a net over config.data.eval_split on all devices, and looks at its most confident mistakes.

    Raises UsageError when the data cannot be opened, and RunError when a device is out of memory.
    """
    experiment = build_to_measure(net.config, net.spec, runtime.make_mesh(devices))
    stream = experiment.open_eval(net.config)
    assessment = assess(experiment, experiment.on_every_device(net.variables), stream)
    mistakes = list(_mistakes(net, assessment))
    return Measured(net=str(net), labels=net.labels, assessment=assessment, mistakes=mistakes)


def _mistakes(net: Classifier, assessment: Assessment) -> Iterator[Mistake]:
    data = net.config.data
    source = open_source(data.name, data.eval_split, data.dir)
    for place in assessment.most_confident_mistakes(MISTAKES):
        row, label = int(assessment.rows[place]), net.labels[assessment.labels[place]]
        try:
            name, content = source.name(row), source[row][0]
            seen = look(net, pixels(name, content, net.spec), name, label)
        except (UsageError, OSError) as error:  # it was there when it was measured
            print(f"left out of the mistakes: {printable(str(error))}")
            continue
        yield Mistake(
            name=name,
            label=label,
            predicted=net.labels[assessment.predicted[place]],
            confidence=float(assessment.confidence[place]),
            picture=picture(seen.pixels),
            masks={module: draw(mask.mean(-1), MASK) for module, (_, mask, _) in seen.modules.items()},
        )
