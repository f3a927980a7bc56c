"""What holds for the nets whatever their weights: shapes, types, gradients, refusals. Sizes are in test_counts.py."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import images, random_variables, trace

from resattn_jax.models import NETS, check_options, create_model, model_names
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.models.network import ResidualAttentionNetwork

# One net of each design, at its own size, larger, smaller and odd: pooling is global, so that any size works.
SIZES = {
    "ra56": [(224, 224), (320, 320), (97, 65)],
    "ranext56": [(224, 224), (96, 96)],
    "ra56_double_skip": [(224, 224), (320, 320), (33, 33)],
    "ra92_448": [(448, 448), (224, 224)],
    "ra92_cifar": [(32, 32), (45, 33)],
    "ra92_cifar_pooled": [(32, 32), (96, 96)],
    "ra56_cifar_slim": [(32, 32), (33, 96)],
    "ra_tiny": [(8, 8), (9, 5), (32, 32), (224, 224)],
}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in SIZES.items() for size in sizes])
def test_any_input_size_gives_logits(name, size):
    model = create_model(name, num_classes=7)
    logits, variables = trace(model, (*size, 3), batch=3)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
    assert variables["params"]["stem_conv"]["kernel"].shape[2] == 3


@pytest.mark.parametrize("name", ["ra56", "ra92_cifar", "ra_tiny"])
def test_parameters_do_not_depend_on_the_input_size(name):
    model = create_model(name, num_classes=7)
    assert variable_shapes(model, (32, 32, 3)) == variable_shapes(model, (96, 64, 3))


@pytest.mark.parametrize("name", ["ra56", "ra92_cifar", "ra_tiny"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_may_have_any_number_of_channels(name, channels):
    variables = variable_shapes(create_model(name, num_classes=10), (32, 32, channels))
    stem = NETS[name].stem
    kernel = variables["params"]["stem_conv"]["kernel"]
    assert kernel.shape == (stem.kernel_size, stem.kernel_size, channels, stem.features)


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_the_head_has_one_output_a_class(classes):
    logits, variables = trace(create_model("ra_tiny", num_classes=classes), (8, 8, 1))
    assert logits.shape == (2, classes)
    assert variables["params"]["head"]["kernel"].shape == (128, classes)
    assert variables["params"]["head"]["bias"].shape == (classes,)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "resnext", "wiring": "double_skip", "attention": "channel", "learning": "nal"},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(options):
    model = ResidualAttentionNetwork(dataclasses.replace(NETS["ra_tiny"], **options), num_classes=10)
    variables = random_variables(model, (8, 8, 3))
    x = images(4, 8, 8, 3)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.apply({**variables, "params": params}, x, train=False) ** 2)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf != 0), path


@pytest.mark.parametrize("name", ["ra56", "ranext56", "ra92_448", "ra92_cifar_pooled", "ra92_cifar_slim"])
def test_the_logits_read_every_parameter(name):
    """For the nets too large to compute here, by the traced forward pass, from the logits back."""
    model = create_model(name, num_classes=10)
    variables = variable_shapes(model, (64, 64, 3))
    statistics = variables["batch_stats"]

    def forward(params, statistics, x):
        return model.apply({"params": params, "batch_stats": statistics}, x, train=False)

    jaxpr = jax.make_jaxpr(forward)(variables["params"], statistics, jnp.zeros((2, 64, 64, 3))).jaxpr
    read = {id(var) for var in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if any(id(var) in read for var in eqn.outvars):
            read |= {id(var) for var in eqn.invars}
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((variables["params"], statistics))
    ]
    assert [n for n, var in zip(names, jaxpr.invars, strict=False) if id(var) not in read] == []


PORTABLE = {"pointwise": "convolution", "pooling": "window", "upsampling": "gathers", "sums": "apart"}
OTHERS = {"pointwise": "product", "pooling": "slices", "upsampling": "products", "sums": "together"}


@pytest.mark.parametrize("wiring", ["paper", "double_skip"])
def test_every_program_gives_the_same_numbers(wiring):
    """Logits, new statistics and gradients of a training step in float64, on maps of odd sides, at depths 2 and 1."""

    def numbers(programs):
        model = create_model("ra_tiny", num_classes=10, p=0, t=1, last=0, wiring=wiring, dtype=jnp.float64, **programs)
        variables = jax.tree.map(np.float64, random_variables(model, (9, 13, 3)))

        def loss(params, x):
            logits, new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 3]), (logits, new)

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return step(variables["params"], np.float64(images(4, 9, 13, 3)))

    with jax.enable_x64(True):
        portable, others = numbers(PORTABLE), numbers(OTHERS)
    pairs = zip(jax.tree.leaves_with_path(portable), jax.tree.leaves(others), strict=True)
    whole = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(portable))
    errors = {jax.tree_util.keystr(path): np.linalg.norm(a - b) / whole for (path, a), b in pairs}
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


def test_the_portable_programs_are_the_default():
    model = create_model("ra_tiny", num_classes=10)
    assert model == create_model("ra_tiny", num_classes=10, **PORTABLE)
    assert {key: getattr(model, key) for key in PORTABLE} == PORTABLE


@pytest.mark.parametrize("programs", [PORTABLE, OTHERS], ids=["portable", "others"])
def test_the_net_is_made_of_the_programs_it_is_given(programs):
    """A 1x1 kernel is in no convolution of the others; a window and a gather are in none but the portable."""
    model = create_model("ra_tiny", num_classes=10, **programs)
    variables = variable_shapes(model, (8, 8, 3))
    text = jax.jit(functools.partial(model.apply, train=False)).lower(variables, jnp.zeros((2, 8, 8, 3))).as_text()
    kernels_of_one = len([line for line in text.splitlines() if "convolution(" in line and "tensor<1x1x" in line])
    found = kernels_of_one > 0, "reduce_window" in text, "stablehlo.gather" in text
    assert found == ((True,) * 3 if programs == PORTABLE else (False,) * 3)


def test_the_table_of_nets_needs_no_jax():
    """What checks a config, or lists the nets, starts without seconds of imports."""
    code = (
        "import sys; from resattn_jax import models; models.check_options('ra56', {'p': 2}); "
        "print({name.partition('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'flax'}, models.NETS['ra56'])"
    )
    root = pathlib.Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.startswith("set() Spec(")


def test_a_type_may_be_named():
    model = create_model("ra_tiny", num_classes=10, dtype="bfloat16")
    assert model == create_model("ra_tiny", num_classes=10, dtype=jnp.bfloat16)
    assert create_model("ra_tiny", num_classes=10).dtype == jnp.float32


def test_an_example_does_not_see_its_batch_in_evaluation():
    model = create_model("ra_tiny", num_classes=10)
    variables = random_variables(model, (8, 8, 3))
    x = images(4, 8, 8, 3)
    apply = jax.jit(lambda x: model.apply(variables, x, train=False))
    others = np.concatenate([x[:1], 9 * x[1:]])
    np.testing.assert_array_equal(apply(x)[0], apply(others)[0])


def test_training_returns_new_statistics_and_nothing_else():
    model = create_model("ra_tiny", num_classes=10)
    variables = variable_shapes(model, (8, 8, 3))
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, new = jax.eval_shape(train, variables, jnp.zeros((2, 8, 8, 3)))
    assert logits.shape == (2, 10)
    assert new == {"batch_stats": variables["batch_stats"]}


# Bound of bfloat16: its relative rounding error is 2**-8 = 0.4 %; logits may be off by five of them.
BFLOAT16_BOUND = 0.02


def test_bfloat16_is_close_to_float32():
    """Computed in bfloat16, kept in float32: parameters, statistics and logits."""
    models = [create_model("ra56_cifar", num_classes=10, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    variables = random_variables(models[0], (32, 32, 3))
    x = images(2, 32, 32, 3)
    exact, rounded = (jax.jit(functools.partial(model.apply, train=False))(variables, x) for model in models)
    assert rounded.dtype == jnp.float32
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < BFLOAT16_BOUND


def test_bfloat16_keeps_its_variables_in_float32():
    model = create_model("ra_tiny", num_classes=10, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 8, 8, 3))
    variables = variable_shapes(model, (8, 8, 3))
    logits, new = jax.eval_shape(functools.partial(model.apply, train=True, mutable=["batch_stats"]), variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables, new))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("dtype", "attention", "programs"),
    [
        ("bfloat16", "mixed", PORTABLE),
        ("bfloat16", "channel", OTHERS),
        ("float16", "spatial", OTHERS),
        ("float64", "channel", PORTABLE),
        ("float64", "mixed", OTHERS),
    ],
)
def test_gradients_and_statistics_have_the_type_of_the_variables(dtype, attention, programs):
    """float32, whatever the net computes in."""
    with jax.enable_x64(dtype == "float64"):
        model = create_model("ra_tiny", num_classes=10, dtype=dtype, attention=attention, **programs)
        pictures = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        variables = variable_shapes(model, (8, 8, 3))

        def loss(params, rest, x):
            logits, new = model.apply({"params": params, **rest}, x, train=True, mutable="batch_stats")
            return logits.sum(), new

        rest = {"batch_stats": variables["batch_stats"]}
        gradients, new = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"], rest, pictures)
    results = {"params": gradients, **new}
    types, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (results, variables))
    assert types == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_images_of_another_type_are_taken():
    """The type in which images come does not decide in which the net computes."""
    model = create_model("ra_tiny", num_classes=10)
    variables = variable_shapes(model, (8, 8, 3))
    logits = jax.eval_shape(
        functools.partial(model.apply, train=False), variables, jnp.zeros((2, 8, 8, 3), jnp.bfloat16)
    )
    assert logits.dtype == jnp.float32


# Refusals.


@pytest.mark.parametrize(("name", "smallest"), [("ra56", 31), ("ra56_cifar_slim", 8), ("ra_tiny", 4)])
def test_an_input_too_small_for_the_poolings_is_refused(name, smallest):
    """Caffe's pooling halves a map, rounding down, and has nothing to give for a map of one.

    By hand: three poolings in a row need 8, which in ra56 the stem must leave: 31 -> 16 -> 8, but 30 -> 15 -> 7.
    """
    model = create_model(name, num_classes=10)
    assert trace(model, (smallest, smallest, 3))[0].shape == (2, 10)
    with pytest.raises(ValueError, match="the input is too small for this net"):
        trace(model, (smallest - 1, smallest, 3))


def test_a_pool_of_two_needs_two():
    with pytest.raises(ValueError, match="the input is too small for this net: a 1x1 map"):
        trace(create_model("ra92_cifar_pooled", num_classes=10), (1, 1, 3))


@pytest.mark.parametrize("name", ["ra56_double_skip", "ra92_cifar"])
def test_poolings_that_pad_both_sides_take_any_input(name):
    logits, _ = trace(create_model(name, num_classes=10), (1, 1, 3))
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("ra65", "ra56"), ("ra92-cifar", "ra92_cifar"), ("ra_tinny", "ra_tiny")]
)
def test_an_unknown_name_is_told_the_nearest_and_all(wrong, nearest):
    with pytest.raises(ValueError, match=f"unknown model '{wrong}'.*did you mean '{nearest}'") as error:
        create_model(wrong, num_classes=10)
    assert all(name in str(error.value) for name in model_names())


def test_an_unknown_option_is_told_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"unknown model option 'atention'.*did you mean 'attention'") as error:
        create_model("ra_tiny", num_classes=10, atention="mixed")
    for option in ("wiring", "attention", "learning", "mask", "init", "p", "t", "r", "last"):
        assert option in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("wiring", "caffe", "paper, double_skip"),
        ("attention", "Mixed", "mixed, channel, spatial"),
        ("learning", "none", "arl, nal"),
        ("mask", True, "encoder_decoder, local_convolutions"),
        ("init", "he", "he_fan_in, he_fan_out, pytorch"),
        ("p", -1, "it must be a number of units, 0 to 64"),
        ("t", 1.5, "it must be a number of units, 0 to 64"),
        ("r", "2", "it must be a number of units, 0 to 64"),
        ("last", 65, "it must be a number of units, 0 to 64"),
        ("p", True, "it must be a number of units, 0 to 64"),
    ],
)
def test_an_unknown_value_is_told_what_there_is(option, value, told):
    with pytest.raises(ValueError, match=rf"{option} is .*{told}"):
        create_model("ra_tiny", num_classes=10, **{option: value})
    with pytest.raises(ValueError, match=rf"{option} is .*{told}"):
        check_options("ra_tiny", {option: value})


@pytest.mark.parametrize("option", ["p", "t", "r", "last"])
def test_any_number_of_units_up_to_64_is_taken(option):
    for units in 0, 64:
        assert getattr(create_model("ra_tiny", num_classes=10, **{option: units}).spec, option) == units


@pytest.mark.parametrize("option", ["pointwise", "pooling", "upsampling", "sums"])
def test_an_unknown_program_is_told_what_there_is(option):
    told = f"{option} is 'fast'; it must be one of {PORTABLE[option]}, {OTHERS[option]}"
    with pytest.raises(ValueError, match=told):
        create_model("ra_tiny", num_classes=10, **{option: "fast"})


def test_shapes_of_a_net_are_no_options():
    with pytest.raises(ValueError, match="unknown model option 'stages'"):
        create_model("ra_tiny", num_classes=10, stages=())
