"""The layers of Equinox and Haiku on docs/libraries.md, held to the reference by the conformance suite."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbn.backends.flax.internals import enable_x64
from rbn.conformance import all_cases, check, select
from rbn.conformance.subject import Outcome, Subject
from rbn.conformance.subjects.flax import needs_x64

PARAMETERS = ("gamma", "beta", "center_weight", "scale_weight", "scale_bias")
STATISTICS = ("running_mean", "running_var")
UNCHECKED = "the function refuses nothing: one value per channel gives Y = beta"


class PureFunction(Subject):
    """What the two have in common: their options, and that a step returns what it changes."""

    layers = ("rbn",)
    counts_batches = False
    fixed = {"running_var": "biased", "track_running_stats": True, "gamma": True, "beta": True}  # noqa: RUF012
    fixed |= {"centering": "channel_mean", "scaling": "channel_mean", "restrict": "sigmoid"}
    expected_failures = {"rbn/train/offset0/1x3*": UNCHECKED}  # noqa: RUF012

    def __init__(self, layer):
        self.name, self.layer = layer.__name__, layer

    def build(self, config, state, dtype, layout="channels_first"):
        if layout in ("strided", "expanded"):
            raise NotImplementedError("JAX's arrays have no strides")
        self.stored = {name: np.array(state[name]) for name in (*PARAMETERS, *STATISTICS)}
        self.options = {"momentum": config.momentum, "eps": config.eps, "axis": 1}

    def run(self, x, training, cotangent):
        with enable_x64(needs_x64(x)):
            stored = {name: jnp.asarray(value) for name, value in self.stored.items()}
            image, options = jnp.asarray(x), tuple(self.options.items())
            y, running, gradients, dx = differentiated(self, options, training, stored, image, cotangent)
        self.stored |= {name: np.array(value) for name, value in running.items()}
        gradients = {name: np.array(value) for name, value in gradients.items()}
        return Outcome(np.array(y), np.array(dx), gradients, self.state(), np.array(image))

    def state(self):
        return dict(self.stored)


@partial(jax.jit, static_argnums=(0, 1, 2))
def differentiated(subject, options, training, stored, image, cotangent):
    """Y, the statistics after the step, and the gradients of sum(y * cotangent)."""

    def loss(parameters, image):
        y, running = subject.step(dict(options), parameters, stored, image, training)
        return (y * cotangent).sum(), (y, running)

    parameters = {name: stored[name] for name in PARAMETERS}
    (_, aside), (gradients, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(parameters, image)
    return *aside, gradients, dx


class InEquinox(PureFunction):
    def step(self, options, parameters, stored, image, training):
        import equinox as eqx

        layer, state = eqx.nn.make_with_state(self.layer)(image.shape[1], **options)

        def places(layer):
            return [getattr(layer, name) for name in PARAMETERS]

        layer = eqx.tree_at(places, layer, places(SimpleNamespace(**parameters)))
        state = state.set(layer.running, tuple(stored[name] for name in STATISTICS))
        y, state = layer(image, state, inference=not training)
        return y, dict(zip(STATISTICS, state.get(layer.running), strict=True))


class InHaiku(PureFunction):
    def step(self, options, parameters, stored, image, training):
        import haiku as hk

        forward = hk.transform_with_state(lambda x: self.layer(**options, name="rbn")(x, training))
        state = {"rbn": {"mean": stored["running_mean"], "var": stored["running_var"]}}
        y, state = forward.apply({"rbn": parameters}, state, None, image)
        return y, {"running_mean": state["rbn"]["mean"], "running_var": state["rbn"]["var"]}


@pytest.mark.meeting(
    "Equinox",
    "a layer around `functional.rbn` passes the conformance cases of its options",
    "layer, state = eqx.nn.make_with_state(EquinoxRBN)(64)",
    packages=("equinox",),
)
def test_the_layer_of_equinox_passes_the_suite(block):
    passes(InEquinox(block("Equinox")["EquinoxRBN"]))


@pytest.mark.meeting(
    "Haiku",
    "a layer around `functional.rbn` passes the conformance cases of its options",
    "hk.transform_with_state(lambda x, is_training: HaikuRBN()(x, is_training))",
    packages=("dm-haiku",),
)
def test_the_layer_of_haiku_passes_the_suite(block):
    subject = InHaiku(block("Haiku")["HaikuRBN"])
    passes(subject)
    haiku = __import__("haiku")
    initial = haiku.transform_with_state(lambda x: subject.layer(name="rbn")(x, True))
    parameters, state = initial.init(None, jnp.ones((4, 5, 5, 3)))
    assert sorted(parameters["rbn"]) == sorted(PARAMETERS)
    assert not state["rbn"]["mean"].any()


def passes(subject):
    """The cases of RBN in float32 and less, and of one shape in float64: JAX compiles for each shape anew."""
    results = check(subject, select(all_cases(), ["rbn/*/float32", "rbn/*float16", "rbn/*/3x4x2x3/float64"]))
    count = Counter(result.status for result in results)
    print(subject.name, dict(count), {result.message for result in results if result.status == "absent"})
    assert count.keys() == {"passed", "expected", "absent"}
    assert count["passed"] > 50
