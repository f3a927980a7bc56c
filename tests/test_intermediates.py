"""Maps by name: they cost nothing when nobody asks, and are the same however the net is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import built, eval_stream, images, plain_recipe, random_variables
from jax.sharding import PartitionSpec as P

from resattn_jax.experiment import Experiment
from resattn_jax.intermediates import attention_modules, given_mask, maps, stage_outputs
from resattn_jax.models import NETS, create_model
from resattn_jax.models.first_weights import variable_shapes
from resattn_jax.models.network import AttentionModule, ResidualAttentionNetwork
from resattn_jax.runtime import make_mesh


def lowered(config, devices):
    """The programs of a training step and of an evaluation step, as text."""
    experiment: Experiment = built(config, devices)
    stream = eval_stream(config, devices)
    batch, mask = next(iter(stream))
    variables = experiment.abstract_state().variables
    measure = experiment.eval_step(stream.take).lower(variables, stream.arrays, batch, mask)
    return experiment.train_steps.lower(*experiment.train_shapes()).as_text(), measure.as_text()


def test_named_maps_cost_nothing(tiny_config, one_device, monkeypatch):
    """The programs are to the letter those of a net that names none of its maps."""
    before = lowered(tiny_config, one_device)
    with monkeypatch.context() as without:
        for module in AttentionModule, ResidualAttentionNetwork:
            without.setattr(module, "sow", lambda *_: False)
        assert lowered(tiny_config, one_device) == before
    model = built(tiny_config, one_device).model  # they are there when somebody asks
    asked = functools.partial(model.apply, train=False, mutable=["intermediates"])
    _, kept = jax.eval_shape(asked, variable_shapes(model, (8, 8, 1)), jnp.zeros((1, 8, 8, 1)))
    assert set(kept["intermediates"]) == {"stage1_attention1", "last_map", "embedding"}


def test_variables_are_parameters_and_statistics_alone():
    variables = variable_shapes(create_model("ra_tiny", num_classes=10), (8, 8, 1))
    assert set(variables) == {"params", "batch_stats"}


def test_names_are_those_of_the_modules_and_of_the_paper():
    model = create_model("ra92", num_classes=10)
    assert attention_modules(model.spec)[:3] == ["stage1_attention1", "stage2_attention1", "stage2_attention2"]
    assert stage_outputs(NETS["ra92"])["stage3"] == "stage3_attention3"
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    variables = variable_shapes(model, (224, 224, 3))
    found = jax.eval_shape(lambda v, x: maps(model, plain_recipe(), v, x), variables, x)
    shapes = {
        "stage1_attention1/mask": (2, 56, 56, 256),
        "stage2_attention2/trunk": (2, 28, 28, 512),
        "stage3_attention3/product": (2, 14, 14, 1024),
        "stage2_unit1": (2, 28, 28, 512),
        "last_map": (2, 7, 7, 2048),
        "embedding": (2, 2048),
        "head": (2, 10),
    }
    assert {name: found[name].shape for name in shapes} == shapes
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


def test_maps_of_shards_are_the_maps_of_the_whole():
    model = create_model("ra_tiny", num_classes=10, unit="resnext", remat=True)
    variables = random_variables(model, (8, 8, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)

    def some(variables, pixels):
        found = maps(model, plain_recipe(), variables, pixels)
        return {name: found[name] for name in ("stage1_attention1/mask", "stage2_attention1/product", "embedding")}

    spread = jax.shard_map(some, mesh=make_mesh(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    whole = jax.jit(some)(variables, pixels)
    for name, part in jax.jit(spread)(variables, pixels).items():
        np.testing.assert_allclose(part, whole[name], rtol=1e-4, atol=1e-5)


def test_a_given_mask_takes_the_place_of_the_modules_own():
    """M = 0 makes (1 + M) * T the trunk; in the other module, and where none is meant, nothing changes."""
    model = create_model("ra_tiny", num_classes=10)
    variables, x = random_variables(model, (8, 8, 1)), images(2, 8, 8, 1)
    masks = {"stage1_attention1": jnp.zeros((8, 8, 64)), "stage2_attention1": jnp.zeros((4, 4, 128))}

    @jax.jit
    def products(which):
        with given_mask(masks, which):
            _, kept = model.apply(variables, x, train=False, mutable=["intermediates"])
        return {name: kept["intermediates"][name] for name in masks}

    for which in (-1, 0, 1):
        for place, (name, found) in enumerate(products(jnp.int32(which)).items()):
            same = np.allclose(found["product"][0], found["trunk"][0], rtol=1e-6)
            assert same == (place == which), (name, which)
    assert products._cache_size() == 1  # one program for all modules
