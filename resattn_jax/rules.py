"""A rule for each key of a config: what it can be, what to do about others, how it is written on a command line.

`RULES` is a table with a line for each key of configs/default.py. Nothing here imports JAX.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
import typing
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

from resattn_jax.errors import UsageError, nearest
from resattn_jax.models.nets import MOST_UNITS, NETS, Spec

REQUIRED: Any = object()  # of `Rule.absent`: every run has the key
Freedom = Literal["never", "measuring", "always"]


def shortened(text: str, most: int = 80) -> str:
    """A text as a message has it: on one line, the middle left out where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value as a message has it, quoted where it is a text."""
    try:
        return shortened(repr(value))
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "too long a number"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds of the value of one key.

    holds: true of the values that can be. says: what to do about others. choices: for "did you mean".
    read: the value that a text on the command line stands for; a text that stands for none is left as it is.
    may_change: "never": the key is part of what a run is. "measuring": it may differ when the trained net is measured
      or taken away. "always": also when the run goes on.
    absent: the value it had in runs that were written before there was the key.
    """

    holds: Callable[[Any], bool]
    says: str
    choices: Collection[Any] = ()
    read: Callable[[str], Any] = str
    may_change: Freedom = "never"
    absent: Any = REQUIRED

    def check(self, key: str, value: Any) -> None:
        """Raises UsageError naming the key, the value and the rule."""
        if not self.holds(value):
            near = nearest(value, self.choices) if isinstance(value, str) else ""
            raise UsageError(f"config.{key} is {shown(value)}{near}; {self.says}")

    def parse(self, key: str, written: str) -> Any:
        """The value of --config.KEY=WRITTEN, where "None" unsets. Raises UsageError as `check` does."""
        value = None if written == "None" else self.read(written)
        self.check(key, value)
        return value


# ---- Kinds of rules.


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _reader(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(written: str) -> Any:
        try:
            return kind(written) if written.isascii() else written
        except ValueError:
            return written

    return read


def _read_tuple(written: str) -> tuple[Any, ...]:
    """(0.1, 0.2) of '(0.1, 0.2)', '[0.1, 0.2]' or '0.1, 0.2', and ('30%',) of '30%'."""
    value: Any = written
    if len(written) <= 1000:
        try:
            with warnings.catch_warnings(action="ignore"):  # Python's, of what would be odd in a program
                value = ast.literal_eval(written)
        except Exception:  # of many kinds: it is a text, and the rule says what is wrong with it
            pass
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def whole(low: int, high: int, **options: Any) -> Rule:
    """A whole number from low to high, both included."""
    return Rule(
        lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high,
        f"it must be {low} or more, a whole number of at most {high:,}",
        read=_reader(int),
        **options,
    )


def real(low: float, high: float, *, above: bool = False, below: bool = False, **options: Any) -> Rule:
    """A finite number from low to high; above: more than low; below: less than high."""
    return Rule(
        lambda x: _is_number(x) and (x > low if above else x >= low) and (x < high if below else x <= high),
        f"it must be {'over' if above else 'from'} {low:g} {'and' if above else 'to'}"
        f" {'less than ' if below else 'at most ' if above else ''}{high:,.15g}",
        read=_reader(float),
        **options,
    )


def reals(low: float, high: float, lengths: range, example: str, **options: Any) -> Rule:
    """A tuple of so many finite numbers, each from low to high."""
    one = real(low, high)
    many = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return Rule(
        lambda x: isinstance(x, tuple | list) and len(x) in lengths and all(map(one.holds, x)),
        f"write {many} numbers, {one.says.removeprefix('it must be ')}, such as {example}",
        read=_read_tuple,
        **options,
    )


def interval(high: float, example: str, **options: Any) -> Rule:
    """(least, most), over 0 and up to `high`."""
    return Rule(
        lambda x: isinstance(x, tuple | list) and len(x) == 2 and all(map(_is_number, x)) and 0 < x[0] <= x[1] <= high,
        f"write (least, most), such as {example}, over 0 and at most {high:g}",
        read=_read_tuple,
        **options,
    )


def flag(**options: Any) -> Rule:
    """True or False."""
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    return Rule(
        lambda x: isinstance(x, bool),
        "it must be True or False",
        choices=(True, False),
        read=lambda written: words.get(written.lower(), written),
        **options,
    )


def choice(choices: Collection[Any], **options: Any) -> Rule:
    """One of the choices, texts or whole numbers, which may grow later."""
    return Rule(
        lambda x: type(x) in (str, int) and x in choices,
        f"it must be one of {textwrap.shorten(', '.join(map(str, choices)), 200, placeholder=' …')}",
        choices=choices,
        read=lambda written: {str(c): c for c in choices}.get(written, written),
        **options,
    )


def text(says: str, like: str = ".+", **options: Any) -> Rule:
    """A text that is not blank, of the form of a regular expression."""
    form = re.compile(like, re.ASCII | re.DOTALL)
    return Rule(
        lambda x: isinstance(x, str) and bool(x.strip()) and "\0" not in x and bool(form.fullmatch(x)), says, **options
    )


_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(steps?|epochs?|%)\s*", re.ASCII)
MOST_STEPS, MOST_EPOCHS = 2**31 - 1, 1_000_000
_MOST = {"s": MOST_STEPS, "e": MOST_EPOCHS, "%": 100}


def parse_duration(x: object) -> tuple[float, str] | None:
    """(number, "s", "e" or "%"), or None for what is no duration."""
    match = _DURATION.fullmatch(x) if isinstance(x, str) and len(x) < 40 else None
    return (float(match[1]), match[2][0]) if match else None


def duration(*, zero: bool = False, **options: Any) -> Rule:
    """A duration of over 0; zero: also 0, for never."""

    def holds(x: Any) -> bool:
        parsed = parse_duration(x)
        return parsed is not None and (zero or parsed[0] > 0) and parsed[0] <= _MOST[parsed[1]]

    says = f"write '500 steps', '5 epochs' or '30%', at most {MOST_STEPS:,} steps, {MOST_EPOCHS:,} epochs or 100%"
    return Rule(holds, says if zero else f"{says}, over 0; None is for the end alone", **options)


def durations(**options: Any) -> Rule:
    """A tuple of durations, each over 0."""
    one = duration()
    return Rule(
        lambda x: isinstance(x, tuple | list) and all(map(one.holds, x)),
        "write durations over 0, such as ('30%', '60%') or ('500 steps', '5 epochs')",
        read=_read_tuple,
        **options,
    )


def optional(rule: Rule) -> Rule:
    """What the rule says, or None, which is also what an older run without the key had."""
    says = rule.says if rule.says.endswith("alone") else f"{rule.says}, or unset"
    absent = None if rule.absent is REQUIRED else rule.absent
    return dataclasses.replace(rule, holds=lambda x: x is None or rule.holds(x), says=says, absent=absent)


def or_zero(rule: Rule) -> Rule:
    """What the rule says, or 0, for never."""
    says = rule.says.replace("it must be ", "it must be 0, or ")
    return dataclasses.replace(rule, holds=lambda x: (_is_number(x) and x == 0) or rule.holds(x), says=says)


# ---- The rules.


def _options_of(field: str) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(Spec)[field])


_FREE: dict[str, Any] = {"may_change": "always"}
_MEASURED: dict[str, Any] = {"may_change": "measuring"}
_COUNT = 1 << 20
_SPLIT = r"[^][]+(\[[-\w%:.]+\][^][]*)*"

# A line for each key of configs/default.py, in its order.
RULES: dict[str, Rule] = {
    "seed": whole(0, 2**32 - 1),  # JAX takes the lower 32 bits of a larger one
    "batch_size": whole(1, _COUNT),
    "accumulate": whole(1, _COUNT, absent=1, **_FREE),
    "total_epochs": optional(real(0, MOST_EPOCHS, above=True, **_FREE)),
    "total_steps": optional(whole(1, MOST_STEPS, **_FREE)),
    "sync_batch_norm": flag(absent=False),
    "batch_norm_span": optional(whole(1, _COUNT)),
    "all_reduce_dtype": choice(("float32", "bfloat16"), absent="float32", **_FREE),
    "init_from": optional(text("write a workdir, WORKDIR:best, WORKDIR:STEP or a net on board", "[^:].*")),
    "steps_per_dispatch": optional(whole(1, 10_000, **_FREE)),
    "log_every": optional(duration(**_FREE)),
    "on_nan": choice(("fail", "skip"), absent="fail", **_FREE),
    "watchdog_minutes": real(0, 1e6, absent=10.0, **_FREE),
    "tracker": optional(choice(("wandb",), **_FREE)),
    "model.name": choice(NETS),
    "model.dtype": choice(("auto", "float32", "bfloat16"), absent="auto", **_MEASURED),
    "model.remat": flag(absent=False, **_FREE),
    "model.wiring": optional(choice(_options_of("wiring"))),
    "model.attention": optional(choice(_options_of("attention"))),
    "model.learning": optional(choice(_options_of("learning"))),
    "model.mask": optional(choice(_options_of("mask"))),
    "model.p": optional(whole(0, MOST_UNITS)),
    "model.t": optional(whole(0, MOST_UNITS)),
    "model.r": optional(whole(0, MOST_UNITS)),
    "model.last": optional(whole(0, MOST_UNITS)),
    "model.init": optional(choice(_options_of("init"))),
    "data.name": text("write digits, folder:DIR, synthetic or a TFDS set's name", r"(?!folder:?\s*$).+", **_MEASURED),
    "data.dir": optional(text("write a folder", **_FREE)),
    "data.train_split": text("write 'train' or 'train[:90%]'", _SPLIT),
    "data.eval_split": text("write 'test' or 'train[90%:]'", _SPLIT, **_MEASURED),
    "data.pipeline": choice(("auto", "resident", "streaming"), absent="auto", **_MEASURED),
    "data.image_size": optional(whole(8, 4096)),
    "data.workers": whole(0, 1024, absent=0, **_FREE),
    "data.broken": choice(("fail", "skip"), absent="fail", **_FREE),
    "data.exif_orientation": flag(absent=False),
    "data.mean": reals(0, 1, range(1, 5), "(0.5,)"),
    "data.std": reals(1e-6, 100, range(1, 5), "(0.25,)"),
    "data.mean_image": flag(absent=False),
    "data.label_noise": real(0, 1, absent=0.0),
    "augment.crop_padding": whole(0, 512, absent=0),
    "augment.crop_mode": choice(("zeros", "reflect"), absent="zeros"),
    "augment.flip": flag(absent=False),
    "augment.alternating_flip": flag(absent=False),
    "augment.random_resized_crop": flag(absent=False),
    "augment.crop_area": interval(1, "(0.08, 1.0)", absent=(0.08, 1.0)),
    "augment.crop_aspect": interval(100, "(0.75, 1.33)", absent=(0.75, 4 / 3)),
    "augment.randaugment": whole(0, 16, absent=0),
    "augment.randaugment_magnitude": real(0, 10, absent=9.0),
    "augment.trivialaugment": flag(absent=False),
    "augment.color_jitter": reals(0, 1, range(3, 4), "(0.4, 0.4, 0.4)", absent=(0.0, 0.0, 0.0)),
    "augment.pca_lighting": real(0, 10, absent=0.0),
    "augment.random_erasing": real(0, 1, absent=0.0),
    "augment.cutout": whole(0, 4096, absent=0),
    "augment.mixup_alpha": or_zero(real(1e-6, 100, absent=0.0)),
    "augment.cutmix_alpha": or_zero(real(1e-6, 100, absent=0.0)),
    "augment.mixup_off_last": duration(zero=True, absent="0 steps"),
    "label_smoothing": real(0, 1, below=True, absent=0.0),
    "optimizer.name": choice(("sgd", "lars"), absent="sgd"),
    "optimizer.momentum": real(0, 1, below=True),
    "optimizer.nesterov": flag(),
    "optimizer.weight_decay": real(0, 10),
    "optimizer.decay_norms_and_biases": flag(absent=True),
    "optimizer.decay_norm_scales": optional(flag()),
    "optimizer.clip_norm": optional(real(0, 1e6, above=True)),
    "sam.rho": real(0, 100, absent=0.0, **_FREE),  # a run may be finished with it and without
    "sam.last": duration(zero=True, absent="100%", **_FREE),
    "schedule.name": choice(("step", "cosine", "linear", "constant")),
    "schedule.learning_rate": real(0, 1000),
    "schedule.boundaries": durations(absent=("30%", "60%", "90%")),
    "schedule.factor": real(0, 10, above=True, absent=0.1),
    "schedule.warmup": duration(zero=True, absent="0 steps"),
    "ema_decay": optional(real(0, 1, below=True)),
    "eval.every": optional(duration(**_FREE)),
    "eval.batch_size": whole(1, _COUNT, absent=500, **_FREE),
    "eval.max_examples": optional(whole(1, 2**40, **_FREE)),
    "eval.image_size": optional(whole(8, 4096, **_FREE)),
    "eval.crop_fraction": real(0.01, 1, absent=0.875, **_FREE),
    "eval.views": choice((1, 2, 10), absent=1, **_FREE),
    "checkpoint.every": optional(duration(**_FREE)),
    "checkpoint.keep_newest": whole(1, _COUNT, absent=2, **_FREE),
    "checkpoint.keep_best": whole(0, _COUNT, absent=1, **_FREE),
}
