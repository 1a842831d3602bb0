"""BatchNorm's weights as those of RBN, IEBN and BNET, and back, with the reference for every layer."""

import numpy as np
import pytest

from rbn_core import Config, RBNTypeError, RBNValueError
from rbn_core.conversion import chooser, from_batch_norm, restriction, to_batch_norm
from rbn_core.reference import Layer

C = 3
PLAIN = {"centering": None, "scaling": None}
CONFIGS = {
    "rbn": Config(C),
    "rbn_std_hard": Config(C, centering="channel_std", scaling="spatial_mean", restrict="hard_sigmoid"),
    "rbn_centering": Config(C, scaling=None),
    "iebn": Config.iebn(C),
    "bnet1": Config.bnet(C, kernel_size=1),
    "bnet5": Config.bnet(C, kernel_size=5),
}
SCALING = [name for name, config in CONFIGS.items() if config.scaling is not None]


def trained(config, seed=0):
    """A layer whose arrays all differ from where they start; calibrations are left alone."""
    rng = np.random.default_rng(seed)
    layer = Layer(config)
    arrays = layer.state()
    for name in ("gamma", "beta", "running_mean", "conv_bias"):
        if name in arrays:
            arrays[name] = rng.normal(1, 0.5, C)
    if "running_var" in arrays:
        arrays |= {"running_var": rng.uniform(0.5, 2, C), "num_batches_tracked": np.array(7)}
    if "scale_bias" in arrays:
        arrays["scale_bias"] = rng.normal(0.3, 0.2, C)
    if "conv_weight" in arrays:
        arrays["conv_weight"] *= rng.normal(1, 0.5, (C, 1, 1, 1))
    layer.load(arrays)
    return layer


def same(one, other):
    """Whether two layers give the same, in evaluation and in training, and accumulate the same."""
    x = np.random.default_rng(1).normal(1, 2, (4, C, 6, 5))
    for training in (False, True):
        np.testing.assert_allclose(
            one.forward(x, training), other.forward(x, training), rtol=1e-12, atol=1e-12
        )
    for name, value in one.statistics.items():
        np.testing.assert_allclose(other.statistics[name], value, rtol=1e-12)


def loaded(config, state):
    layer = Layer(config)
    layer.load(state)
    return layer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_preserved_gives_the_same(config):
    norm = trained(Config(C, **PLAIN))
    same(norm, loaded(config, from_batch_norm(config, norm.state(), preserve=True)))


@pytest.mark.parametrize("name", ["rbn", "bnet5"])
@pytest.mark.parametrize(
    "affine", [{"gamma": False, "beta": False}, {"beta": False}, {"track_running_stats": False}]
)
def test_what_a_batch_norm_lacks_is_as_if_it_had_it(name, affine):
    if name == "rbn" and "gamma" in affine:
        return  # refused, below
    norm = trained(Config(C, **PLAIN, **affine))
    options = affine if name == "rbn" else {k: v for k, v in affine.items() if k == "track_running_stats"}
    config = Config(C, **options) if name == "rbn" else Config.bnet(C, kernel_size=5, **options)
    state = from_batch_norm(config, norm.state(), preserve=True)
    assert state.keys() == config.state_shapes().keys()
    same(norm, loaded(config, state))


def test_without_a_gamma_nothing_can_be_preserved():
    options = {"gamma": False, "beta": False}
    norm = trained(Config(C, **PLAIN, **options))
    assert "no gamma" in from_batch_norm(Config(C, **options), norm.state(), preserve=True)
    assert "no gamma" in from_batch_norm(Config.iebn(C, **options), norm.state(), preserve=True)
    centering = Config(C, scaling=None, **options)  # has no R(w_b) to make up for
    same(norm, loaded(centering, from_batch_norm(centering, norm.state(), preserve=True)))


def test_by_default_the_weights_are_the_batch_norms_own():
    norm = trained(Config(C, **PLAIN)).state()
    state = from_batch_norm(Config(C), norm, preserve=False)
    assert state.keys() == Config(C).state_shapes().keys()
    for name in norm:
        np.testing.assert_array_equal(state[name], norm[name])
    assert {name: set(state[name]) for name in ("center_weight", "scale_weight", "scale_bias")} == {
        "center_weight": {0.0},
        "scale_weight": {0.0},
        "scale_bias": {1.0},
    }
    # BNET's convolution starts as its framework starts one.
    assert from_batch_norm(Config.bnet(C), norm, preserve=False).keys() == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_the_given_arrays_are_not_changed():
    norm = trained(Config(C, **PLAIN)).state()
    before = {name: value.copy() for name, value in norm.items()}
    for config in CONFIGS.values():
        for preserve in (False, True):
            from_batch_norm(config, norm, preserve)
            to_batch_norm(config, trained(config).state())
    for name, value in before.items():
        np.testing.assert_array_equal(norm[name], value)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_inert_layer_is_a_batch_norm(config):
    layer = trained(config)
    same(layer, loaded(Config(C, **PLAIN), to_batch_norm(config, layer.state())))


def test_an_inert_layer_without_gamma_gets_one():
    layer = trained(Config(C, gamma=False, beta=False))
    same(layer, loaded(Config(C, **PLAIN), to_batch_norm(layer.config, layer.state())))


def test_there_and_back():
    norm = trained(Config(C, **PLAIN)).state()
    for config in CONFIGS.values():
        back = to_batch_norm(config, from_batch_norm(config, norm, preserve=True))
        assert back.keys() == norm.keys()
        for name in norm:
            np.testing.assert_allclose(back[name], norm[name], rtol=1e-15)


@pytest.mark.parametrize("value", [0.25, np.nan])
@pytest.mark.parametrize(
    ("name", "array"),
    [("rbn", "center_weight"), ("rbn", "scale_weight"), ("iebn", "scale_weight"), ("bnet5", "conv_weight")],
)
def test_a_calibration_that_does_something_stays(name, array, value):
    state = trained(CONFIGS[name]).state()
    state[array].flat[1] = value
    reason = to_batch_norm(CONFIGS[name], state)
    assert reason.startswith(f"{array} is not 0 ")
    assert f"(largest {value:.3g})" in reason


@pytest.mark.parametrize("name", SCALING)
def test_the_restriction_is_the_layers_own(name):
    config = CONFIGS[name]
    bias = np.array([-9.0, 0.0, 1.0])
    layer = Layer(config)
    layer.load(layer.state() | {"scale_bias": bias})
    x = np.random.default_rng(0).normal(size=(4, C, 5, 5))
    plain = Layer(Config(C, **PLAIN))
    ratio = layer.forward(x, True)[0, :, 0, 0] / plain.forward(x, True)[0, :, 0, 0]
    np.testing.assert_allclose(restriction(config, bias), ratio, rtol=1e-12)


def test_where_matches_whole_paths():
    chosen = chooser("rbn", r"layer[14]\..*")
    assert chosen.fullmatch("layer1.0.bn1")
    assert not chosen.fullmatch("xlayer1.0.bn1")
    assert chooser("bn", None).fullmatch("")
    assert chooser("bn", None).fullmatch("any.path")


def test_what_is_no_choice_is_refused():
    with pytest.raises(
        RBNValueError, match=r"expected to to be one of 'bn', 'rbn', 'iebn', 'bnet', got 'gn'"
    ):
        chooser("gn", None)
    with pytest.raises(
        RBNTypeError, match=r"expected where to be a regular expression, got 3\. .*r'layer\[14\]\\\.\.\*'"
    ):
        chooser("rbn", 3)
    with pytest.raises(RBNValueError, match=r"expected where to be a regular expression, got '\('"):
        chooser("rbn", "(")
