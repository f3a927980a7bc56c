"""What a config refuses, for each key at the bounds and far beyond, and what it accepts up to the bounds."""

import copy
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from helpers import plain_spec

from configs import default
from resattn_jax.config import Durations, check, flatten
from resattn_jax.errors import UsageError
from resattn_jax.experiment import build
from resattn_jax.models import create_model
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.models.nets import NETS, smallest_side
from resattn_jax.rules import RULES, shown
from resattn_jax.runtime import make_mesh
from resattn_jax.state import random_key

# What each key can be, written down a second time.
WHOLE = {
    "seed": (0, 2**32 - 1), "batch_size": (1, 2**20), "accumulate": (1, 2**20), "total_steps": (1, 2**31 - 1),
    "batch_norm_span": (1, 2**20),
    "steps_per_dispatch": (1, 10_000), "model.p": (0, 64), "model.t": (0, 64), "model.r": (0, 64),
    "model.last": (0, 64), "data.image_size": (8, 4096), "data.workers": (0, 1024), "augment.crop_padding": (0, 512),
    "augment.randaugment": (0, 16), "augment.cutout": (0, 4096), "eval.batch_size": (1, 2**20),
    "eval.max_examples": (1, 2**40), "eval.image_size": (8, 4096), "checkpoint.keep_newest": (1, 2**20),
    "checkpoint.keep_best": (0, 2**20),
}  # fmt: skip
UP, DOWN = math.inf, -math.inf  # of nextafter
REAL = {  # the least and the most that can be
    "total_epochs": (5e-324, 1e6), "data.label_noise": (0, 1), "augment.randaugment_magnitude": (0, 10),
    "augment.pca_lighting": (0, 10), "augment.random_erasing": (0, 1), "label_smoothing": (0, math.nextafter(1, DOWN)),
    "augment.mixup_alpha": (1e-6, 100), "augment.cutmix_alpha": (1e-6, 100),  # and 0
    "optimizer.momentum": (0, math.nextafter(1, DOWN)), "optimizer.weight_decay": (0, 10),
    "optimizer.clip_norm": (5e-324, 1e6), "schedule.learning_rate": (0, 1000), "schedule.factor": (5e-324, 10),
    "ema_decay": (0, math.nextafter(1, DOWN)), "eval.crop_fraction": (0.01, 1),
    "watchdog_minutes": (0, 1e6), "sam.rho": (0, 100),
}  # fmt: skip
FLAG = [
    "sync_batch_norm", "model.remat", "data.mean_image", "augment.flip", "augment.random_resized_crop",
    "augment.alternating_flip", "augment.trivialaugment", "optimizer.nesterov", "optimizer.decay_norms_and_biases",
    "optimizer.decay_norm_scales", "data.exif_orientation",
]  # fmt: skip
CHOICE = {
    "model.name": list(NETS), "model.dtype": ["auto", "float32", "bfloat16"], "model.wiring": ["paper", "double_skip"],
    "model.attention": ["mixed", "channel", "spatial"], "model.learning": ["arl", "nal"],
    "model.mask": ["encoder_decoder", "local_convolutions"], "model.init": ["he_fan_in", "he_fan_out", "pytorch"],
    "data.pipeline": ["auto", "resident", "streaming"], "data.broken": ["fail", "skip"],
    "optimizer.name": ["sgd", "lars"], "schedule.name": ["step", "cosine", "linear", "constant"],
    "augment.crop_mode": ["zeros", "reflect"], "eval.views": [1, 2, 10], "on_nan": ["fail", "skip"],
    "tracker": ["wandb"], "all_reduce_dtype": ["float32", "bfloat16"],
}  # fmt: skip
TEXT = {  # (that can be, that cannot)
    "init_from": (["runs/a", "~/a:best", "a b:12"], [":best"]),
    "data.name": (
        ["digits", "folder:~/a b", "cifar10", "synthetic", "imagenet2012/subset:5.*"],
        ["folder", "folder: "],
    ),
    "data.dir": (["~/x", "none", "Bilder/größer"], []),
    "data.train_split": (
        ["train", "train[:90%]+test[10:20]", "all"],
        ["train[", "train[]", "[:5]", "a]b", "a" * 99 + "["],
    ),
    "data.eval_split": (["test", "train[-10%:]", "val"], ["test[:", "test[ a ]", "]"]),
}
DURATION = {  # whether 0 is one
    "log_every": False, "eval.every": False, "checkpoint.every": False, "schedule.warmup": True,
    "augment.mixup_off_last": True, "sam.last": True,
}  # fmt: skip
REALS = {"data.mean": (0, 1, range(1, 5)), "data.std": (1e-6, 100, range(1, 5)), "augment.color_jitter": (0, 1, [3])}
INTERVAL = {"augment.crop_area": 1, "augment.crop_aspect": 100}
OPTIONAL = {
    "total_epochs", "total_steps", "init_from", "steps_per_dispatch", "log_every", "model.wiring", "model.attention",
    "model.learning", "model.mask", "model.p", "model.t", "model.r", "model.last", "model.init", "data.dir",
    "data.image_size", "optimizer.clip_norm", "optimizer.decay_norm_scales", "ema_decay", "eval.every",
    "eval.max_examples", "eval.image_size", "checkpoint.every", "batch_norm_span", "tracker",
}  # fmt: skip

HUGE = 10**5000  # more digits than Python writes
NONSENSE = [  # for every key
    math.nan, math.inf, -math.inf, HUGE, -HUGE, -(10**30), 1e300, 0.123j, b"train", object(), {}, {"a": 1}, {1}, len,
    "", " ", "\t\n", "a\0b", (None,), ((),), (math.nan,), ("",), (HUGE,), (object(),), np.ones((3, 3)),
]  # fmt: skip
NO_DURATIONS = [
    "5", "steps", "x epochs", "-3 steps", "+3 steps", "1e999 steps", "1e3 steps", "nan steps", "inf epochs", "٣ steps",
    "² epochs", "200%", "100.001%", f"{10**30} steps", "2147483648 steps", "1000001 epochs", "5 epoch s", "5 minutes",
    "1,000 steps", "5 steps 3", "0x10 steps", "1" * 50, "%",
]  # fmt: skip


def bad(key):
    """Values that a key cannot have."""
    values = [*NONSENSE, *([] if key in OPTIONAL else [None])]
    if key in WHOLE:
        low, high = WHOLE[key]
        values += [low - 1, high + 1, low + 0.5, float(low), str(low), True, False, "1e3", 2**64, 10**30, (low,), "²"]
    elif key in REAL:
        low, high = REAL[key]
        values += [math.nextafter(low, DOWN) if low else -5e-324, math.nextafter(high, UP), -1, 10**400, 1e7]
        values += [True, False, "0.5", "nan", (0.5,), str(low)]
        values += [0] if low == 5e-324 else []
    elif key in FLAG:
        values += [0, 1, 0.0, "True", "yes", (True,), 2]
    elif key in CHOICE:
        values += ["unknown", True, False, 1.0, 3, *(f"{c}x" for c in CHOICE[key]), *((c,) for c in CHOICE[key])]
        values += [f" {c}" for c in CHOICE[key]] + [str(c).upper() for c in CHOICE[key] if str(c).upper() != c]
    elif key in TEXT:
        values += [*TEXT[key][1], 3, 0.5, True, ("train",)]
    elif key in DURATION:
        values += [*NO_DURATIONS, 5, 0.3, True, ("5 steps",)]
        values += [] if DURATION[key] else ["0 steps", "0%", "0.0 epochs", "00 steps"]
    elif key in REALS:
        low, high, lengths = REALS[key]
        values += [(low,) * n for n in range(8) if n not in lengths] + [low, str(low), 0.5]
        outside = math.nextafter(low, DOWN) if low else -5e-324
        for one in (outside, math.nextafter(high, UP), math.nan, math.inf, 10**400, "0.5", None, True, (0.5,), 1j):
            values += [(*(high,) * (lengths[-1] - 1), one), (one, *(high,) * (lengths[-1] - 1))]
    elif key in INTERVAL:
        high = INTERVAL[key]
        values += [0.5, "0.5", (), (0.5,), (0.5, 0.6, 0.7), (0.6, 0.5), (0, 0.5), (-0.5, 0.5), (0.5, high + 1)]
        values += [
            (0.5, math.nextafter(high, UP)),
            (0.5, math.nan),
            (math.nan, 0.5),
            (0.5, None),
            ("a", "b"),
            (True, 1),
        ]
    else:
        assert key == "schedule.boundaries"
        values += [("abc",), "30%", ("30%", 5), (0.3, 0.6), ("0 steps",), ("30%", None), *((d,) for d in NO_DURATIONS)]
    return values


def good(key):
    """Values up to the bounds."""
    values = [None] if key in OPTIONAL else []
    if key in WHOLE:
        low, high = WHOLE[key]
        values += [low, low + 1, (low + high) // 2, high - 1, high]
    elif key in REAL:
        low, high = REAL[key]
        values += [low, math.nextafter(low, UP), (low + high) / 2, math.nextafter(high, DOWN), high]
        values += [0, 0.0] if "alpha" in key else []
    elif key in FLAG:
        values += [True, False]
    elif key in CHOICE:
        values += CHOICE[key]
    elif key in TEXT:
        values += TEXT[key][0]
    elif key in DURATION:
        values += ["1 step", "0.5 steps", "2147483647 steps", "5 epochs", "1000000 epochs", ".5epoch", " 30 %", "100%"]
        values += ["0 steps", "0%"] if DURATION[key] else []
    elif key in REALS:
        low, high, lengths = REALS[key]
        values += [one for n in lengths for one in ((low,) * n, (high,) * n, ((low + high) / 2,) * n, [high] * n)]
    elif key in INTERVAL:
        high = INTERVAL[key]
        values += [(5e-324, high), (high, high), (0.08, 1.0), (0.5, 0.5), [0.5, 1]]
    else:
        values += [
            (),
            ("30%",),
            ("30%", "60%", "90%"),
            ("1 step", "2147483646 steps"),
            ("5 epochs", "10%"),
            ("9%", "9%"),
        ]
    return values


BASE = default.get_config()
BASE.total_steps = 2**31 - 1


def changed(changes):
    """A config as a run's config.json gives it, without the types that a recipe's has."""
    plain = BASE.to_dict()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (plain[section] if section else plain)[name] = value
    return ml_collections.ConfigDict(plain)


def refusal(changes):
    """The one line that refuses a config with these changes."""
    with pytest.raises(UsageError) as caught:
        check(changed(changes))
    message = str(caught.value)
    assert message.isprintable()  # so it is one line
    assert len(message) < 400
    return message


def test_every_key_is_in_one_of_the_tables():
    keys = [*WHOLE, *REAL, *FLAG, *CHOICE, *TEXT, *DURATION, *REALS, *INTERVAL, "schedule.boundaries"]
    assert len(keys) == len(set(keys))
    assert set(keys) == RULES.keys() == flatten(BASE).keys()
    assert sum(len(bad(key)) for key in keys) > 2000


@pytest.mark.parametrize("key", RULES)
def test_nonsense_is_refused_by_key_value_and_rule(key):
    for value in bad(key):
        if isinstance(value, dict):  # a section to a ConfigDict; a run's config.json may have one
            with pytest.raises(UsageError, match=f"config.{key} is "):
                RULES[key].check(key, value)
            continue
        message = refusal({key: value})
        assert message.startswith(f"config.{key} is {shown(value)}"), message
        assert message.endswith(RULES[key].says), message


@pytest.mark.parametrize("key", RULES)
def test_what_lies_within_the_bounds_is_accepted(key):
    for value in good(key):
        together = {
            "accumulate": {"batch_size": value},
            "batch_norm_span": {"batch_size": value or 64},
            "total_epochs": {"total_steps": None if value else 5},
            "total_steps": {"total_epochs": None if value else 5.0},
        }
        config = changed({key: value, **together.get(key, {})})
        check(config)
        assert Durations(config, examples=config.batch_size).total >= 1


@pytest.mark.parametrize("key", RULES)
def test_a_command_line_writes_every_value(key):
    for value in good(key):
        read = RULES[key].parse(key, str(value))
        assert read == (tuple(value) if isinstance(value, list) else value)
        assert type(read) is type(value) or isinstance(value, int | list)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_smoothing", 2.0), ("ema_decay", 1.5), ("augment.mixup_alpha", -1.0), ("augment.random_erasing", 7.0),
        ("optimizer.momentum", 3.0), ("optimizer.weight_decay", -1.0), ("schedule.learning_rate", -0.1),
        ("checkpoint.keep_newest", -3), ("steps_per_dispatch", -2), ("eval.batch_size", 0), ("augment.cutout", -4),
        ("augment.crop_padding", -1), ("schedule.factor", -1.0), ("optimizer.clip_norm", -1.0),
        # Once accepted, or ended in a traceback.
        ("schedule.factor", math.nan), ("schedule.boundaries", ("abc",)), ("optimizer.momentum", 1.0),
        ("augment.cutmix_alpha", math.nan), ("augment.crop_padding", 5000), ("seed", 2**64), ("total_epochs", math.nan),
        ("total_epochs", 1e12), ("steps_per_dispatch", 2**64), ("data.mean", (math.nan,)), ("data.std", (0.0,)),
        ("augment.randaugment", 2**64), ("batch_size", 2**31), ("data.image_size", 1), ("data.image_size", 100_000),
        ("data.image_size", 2**31), ("model.r", 1_000_000), ("data.mean", (10**400,)), ("data.std", (1e-300,)),
        ("augment.mixup_alpha", 1e-40), ("eval.crop_fraction", 1e-310), ("schedule.warmup", f"{10**30} steps"),
        ("schedule.boundaries", ("0 steps",)), ("seed", 2**32),
    ],
)  # fmt: skip
def test_values_that_people_tried(key, value):
    assert refusal({key: value}).startswith(f"config.{key} is {shown(value)}; ")


MIXED = {"augment.mixup_alpha": 0.2}
STREAMED = [
    {"data.pipeline": "streaming"}, {"augment.random_resized_crop": True}, {"augment.randaugment": 2},
    {"eval.views": 10}, {"data.image_size": 32, "eval.image_size": 64},
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"total_steps": None}, "config.total_steps is None and config.total_epochs is None; exactly one"),
        ({"total_epochs": 3.0, "total_steps": 9}, "total_steps is 9 and config.total_epochs is 3.0; exactly one"),
        ({"total_steps": 9, "schedule.warmup": "10 steps"}, "config.schedule.warmup is '10 steps'; it must not be"),
        ({"total_steps": None, "total_epochs": 4.5, "schedule.warmup": "5 epochs"}, "the run, which has 4.5 epochs"),
        ({**MIXED, "total_steps": 9, "augment.mixup_off_last": "10 steps"}, "config.augment.mixup_off_last is '10 st"),
        ({"augment.cutmix_alpha": 1.0, "total_steps": 9, "augment.mixup_off_last": "10 steps"}, "which has 9 steps"),
        ({"sam.rho": 0.1, "total_steps": 9, "sam.last": "10 steps"}, "config.sam.last is '10 steps'; it must no"),
        ({"schedule.boundaries": ("60%", "30%")}, "config.schedule.boundaries is ('60%', '30%'); they must be"),
        ({"total_steps": 100, "schedule.boundaries": ("50 steps", "40%")}, "('50 steps', '40%'); they must be in asc"),
        ({"total_steps": 100, "schedule.boundaries": ("100 steps",)}, "each must lie before the end of the run"),
        ({"schedule.boundaries": ("30%", "100%")}, "each must lie before the end of the run"),
        ({"schedule.boundaries": tuple(f"{i}%" for i in range(90, 9, -1))}, "config.schedule.boundaries is ('90%', "),
        ({"batch_size": 64, "accumulate": 3}, "config.accumulate is 3; it must divide config.batch_size, which is 64"),
        ({"batch_size": 64, "accumulate": 128}, "config.accumulate is 128; it must divide config.batch_size"),
        ({"sync_batch_norm": True, "batch_norm_span": 32}, "sync_batch_norm is True and config.batch_norm_span is 32"),
        ({"batch_size": 64, "batch_norm_span": 128}, "config.batch_norm_span is 128; it must be at most config.batch"),
        ({**MIXED, "batch_size": 63}, "config.batch_size is 63; mixup and CutMix pair the images"),
        ({"data.mean": (0.5,) * 3, "data.std": (0.5,) * 4}, "config.data.mean has 3 values and config.data.std 4"),
        ({"data.image_size": 32, "augment.cutout": 33}, "config.augment.cutout is 33; it must be no larger than"),
        ({"data.image_size": 32, "augment.crop_padding": 33}, "config.augment.crop_padding is 33; it must be no"),
        ({"augment.flip": True, "augment.alternating_flip": True}, "config.augment.flip and config.augment.a"),
        ({"model.name": "ra56", "data.image_size": 30}, "config.data.image_size is 30; ra56 needs images of 31x31"),
        ({"model.wiring": "paper", "model.name": "ra92_448", "eval.image_size": 62}, "config.eval.image_size is 62; r"),
        *[({"data.pipeline": "resident", **why}, "config.data.pipeline is 'resident', but") for why in STREAMED[1:]],
        *[({"data.mean_image": True, **why}, "config.data.mean_image is True; it is for resident") for why in STREAMED],
        *[({"steps_per_dispatch": 2, **why}, "config.steps_per_dispatch is 2; a streamed set") for why in STREAMED],
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(changes, named):
    assert named in refusal(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"total_steps": 9, "schedule.warmup": "9 steps"},
        {"total_steps": 9, "schedule.warmup": "100%"},
        {"total_steps": 9, "schedule.warmup": "10 epochs"},  # the number of examples decides
        {"total_steps": 9, "augment.mixup_off_last": "10 steps"},  # nothing is mixed
        {"total_steps": 9, "schedule.name": "cosine", "schedule.boundaries": ("99 steps", "5 steps")},
        {"total_steps": 100, "schedule.boundaries": ("50 steps", "1 epoch", "60%", "60%", "99 steps")},
        {"total_steps": 9, "sam.last": "10 steps"},  # there is no SAM
        {"batch_size": 63},
        {**MIXED, "batch_size": 2},
        {"batch_size": 63, "accumulate": 21},
        {"data.mean": (0.5,) * 3, "data.std": (0.5,)},
        {"data.image_size": 32, "augment.cutout": 32, "augment.crop_padding": 32},
        {"model.name": "ra56", "data.image_size": 31},
        {"model.name": "ra56", "data.image_size": 8, "model.mask": "local_convolutions"},
        {"data.pipeline": "resident", "data.image_size": 32, "eval.image_size": 32, "data.mean_image": True},
        {"steps_per_dispatch": 1, "eval.views": 10},
        {"optimizer.momentum": 0.0, "optimizer.nesterov": True},
    ],
)
def test_keys_that_agree_are_accepted(changes):
    check(changed(changes))


def test_a_key_without_a_rule_and_a_missing_one_are_told():
    assert refusal({"batch_sise": 3}) == "there is no config.batch_sise (did you mean 'config.batch_size'?)"
    assert "there is no config.data.na\\nme" in refusal({"data.na\nme": 3})
    assert refusal({"x" * 5000: 3}).startswith("there is no config.xxx")
    config = copy.deepcopy(BASE)
    del config.eval.views
    with pytest.raises(UsageError, match=r"the config has no config\.eval\.views"):
        check(config)


def test_the_data_alone_can_tell_that_a_warmup_is_longer_than_the_run():
    """It is noted and no error; however long it is, its steps fit 32 bits, as optax has them."""
    config = changed({"total_steps": 10, "batch_size": 10, "schedule.warmup": "2 epochs"})
    check(config)
    assert Durations(config, 100).notes() == [
        "config.schedule.warmup is '2 epochs', 20 steps, longer than the run of 10"
    ]
    assert Durations(config, 50).notes() == []
    config.schedule.warmup = "1000000 epochs"
    assert Durations(config, 10**9)("schedule.warmup") == 2**31 - 1
    config.schedule.warmup = "0.001 steps"
    assert Durations(config, 100)("schedule.warmup") == 1


def test_every_seed_has_randomness_of_its_own():
    """JAX takes the lower 32 bits of a seed, which is why there are no larger ones."""
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    keys = {tuple(np.asarray(jax.random.key_data(random_key(seed, "x")))) for seed in seeds}
    assert len(keys) == len({np.random.default_rng(seed).integers(2**60) for seed in seeds}) == len(seeds)
    RULES["seed"].check("seed", seeds[-1])
    key = jax.jit(lambda seed: jax.random.key_data(random_key(seed, "x")))
    assert {tuple(np.asarray(key(np.uint32(seed)))) for seed in seeds} == keys  # as a step has them


def test_a_net_for_larger_images_than_the_datas_is_refused():
    with pytest.raises(UsageError, match=r"config\.model\.name is 'ra56', which needs images of 31x31 at least"):
        build(changed({"model.name": "ra56"}), plain_spec((8, 8, 1)), make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("alpha", [1e-6, 100.0])
def test_the_outermost_alphas_mix(alpha):
    assert jnp.isfinite(jax.random.beta(jax.random.key(0), alpha, alpha, (1000,))).all()


@pytest.mark.parametrize("options", [{}, {"wiring": "double_skip"}, {"mask": "local_convolutions"}])
@pytest.mark.parametrize("name", ["ra_tiny", "ra92_cifar_pooled"])
def test_the_smallest_images_of_a_net_are_those_that_its_poolings_leave_something_of(name, options):
    model = create_model(name, num_classes=2, p=0, t=0, r=0, last=0, **options)

    def trace(side):
        return variable_shapes(model, (side, side, 3))

    least = smallest_side(name, **options)
    trace(least)
    if least > 1:
        with pytest.raises(ValueError, match="too small for this net"):
            trace(least - 1)
