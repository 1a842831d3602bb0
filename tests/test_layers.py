"""What the layers of all frameworks have in common beside the mathematics: options, errors, examples."""

import doctest
import importlib
import inspect
import re

import pytest

import rbn_core
from rbn_core import Config, RBNError, RBNTypeError
from rbn_core.config import arguments, config_of
from rbn_core.options import LAYERS, NEW_VALUE, OPTIONS

PACKAGES = {
    "numpy": "rbn_core",
    **{name: f"rbn.backends.{name}" for name in ("torch", "flax", "flax.nnx", "mindspore", "jittor")},
}
"""Where the layers are, by what the table of options calls their framework."""

CONFIGS = [
    Config(3),
    Config(3, 1e-3, 0.7, "channel_std", None, "hard_sigmoid", "biased"),
    Config(3, momentum=None, centering=None, scaling="spatial_mean"),
    Config.iebn(3, momentum=0.25, running_var="biased"),
    Config.bnet(3, 5, 1, eps=1e-2),
    Config(3, gamma=False, beta=False),
]

WRONG = {
    "eps": (0, "RBN: expected eps to be positive"),
    "momentum": (1.5, r"RBN: expected momentum in \[0, 1\], got 1.5"),
    "centering": ("mean", "RBN: expected centering to be one of 'channel_mean'"),
    "scaling": ("input_mean", "RBN: expected scaling to be one of 'channel_mean'"),
    "restrict": ("tanh", "RBN: expected restrict to be one of 'sigmoid', 'hard_sigmoid', got 'tanh'"),
    "running_var": ("n", "RBN: expected running_var to be one of 'unbiased', 'biased', got 'n'"),
}
"""By option what it cannot be, and the error."""


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name == "numpy" else pytest.mark.framework(name.partition(".")[0]))
        for name in PACKAGES
    ],
    scope="session",
)
def table_name(request):
    """What the table of options calls a framework."""
    return request.param


@pytest.fixture(scope="session")
def package(table_name):
    """Its layers."""
    return importlib.import_module(PACKAGES[table_name])


@pytest.fixture(scope="session")
def build(package, table_name):
    """What makes a layer of three channels."""

    def build(name, **options):
        if table_name == "flax.nnx":
            options["rngs"] = importlib.import_module("flax.nnx").Rngs(0)
        if table_name != "flax":
            options.setdefault("num_features", 3)
        return getattr(package, name)(**options)

    return build


def test_the_constructors_take_the_options_of_the_table(package, table_name):
    for name in LAYERS:
        layer = getattr(package, name)
        construct = layer.__init__ if inspect.isclass(layer) else layer  # NNX's classes hide their own
        parameters = inspect.signature(construct).parameters
        for option in OPTIONS.values():
            argument = option.argument(table_name)
            assert argument is None or (argument in parameters) == (name in option.layers), (name, argument)
            if argument is None or name not in option.layers:
                continue
            default = option.default
            if option.name == "momentum" and table_name in NEW_VALUE:
                default = 0.1
            expected = inspect.Parameter.empty if default is ... else default
            assert parameters[argument].default == expected, (name, argument)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_layer_built_from_options_has_them(build, table_name, config):
    if table_name == "mindspore" and not config.gamma and config.layer != "BNET":
        with pytest.raises(RBNError, match=r"RBN: expected gamma=True, as the layers of MindSpore have it"):
            arguments(table_name, config)
        return
    layer = build(config.layer, **arguments(table_name, config))
    if table_name == "numpy":
        assert layer.config == config
        return
    known = {"num_features": 3} if table_name == "flax" else {}
    assert own_config(layer, table_name, **known) == config


def own_config(layer, table_name, **known):
    """The options of a layer, as its package tells them."""
    if table_name == "flax":
        return layer.config(**known)
    if table_name == "flax.nnx":
        return importlib.import_module("rbn.backends.flax.nnx.surgery").config_of(layer)
    return importlib.import_module(f"rbn.backends.{table_name}.weights").config_of(layer)


@pytest.mark.parametrize("option", WRONG)
def test_what_an_option_cannot_be_is_refused_in_the_same_words(build, table_name, option):
    value, message = WRONG[option]
    with pytest.raises(RBNError, match=message):
        build("RBN", **{OPTIONS[option].argument(table_name): value})


def test_an_unknown_option_is_refused_with_the_near_one(build):
    with pytest.raises(RBNTypeError, match="RBN: expected an option of this layer, got 'centring'") as error:
        build("RBN", centring=None)
    assert "Did you mean 'centering'?" in str(error.value)
    with pytest.raises(RBNTypeError, match="IEBN: expected an option of this layer, got 'restrict'"):
        build("IEBN", restrict="sigmoid")
    with pytest.raises(RBNTypeError, match="BNET: expected an option of this layer, got 'scaling'"):
        build("BNET", scaling=None)


def test_an_option_by_its_name_elsewhere_is_told_by_its_name_here(build, table_name):
    gamma, eps = OPTIONS["gamma"].argument(table_name), OPTIONS["eps"].argument(table_name)
    foreign = {"use_scale": gamma, "epsilon": eps, "eps": eps}
    for given, here in foreign.items():
        if here in (None, given):
            continue
        with pytest.raises(RBNTypeError, match=f"got '{given}'. Did you mean '{here}'\\?"):
            build("RBN", **{given: 1})


def test_a_kernel_of_even_size_or_of_too_many_axes_is_refused(build):
    with pytest.raises(RBNError, match=r"BNET: expected an odd kernel_size, got 4\. Take 3 or 5"):
        build("BNET", kernel_size=4)
    with pytest.raises(RBNError, match="BNET: expected spatial_dims to be one of 1, 2, 3, got 4"):
        build("BNET", spatial_dims=4)


@pytest.mark.parametrize("name", LAYERS)
def test_the_example_of_a_layer_runs(package, name):
    layer = getattr(package, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(layer, name, globs={})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 1
    assert result.failed == 0


def test_config_has_the_options_of_the_table():
    parameters = dict(inspect.signature(Config).parameters)
    assert parameters.pop("layer").default == "RBN"
    assert list(parameters) == list(OPTIONS)
    for name, option in OPTIONS.items():
        default = inspect.Parameter.empty if option.default is ... else option.usual("RBN")
        assert parameters[name].default == default, name
        assert option.choices == {} or {*option.choices} >= {*option.layers}


@pytest.mark.framework("torch")
def test_options_are_read_again_when_they_were_assigned():
    layer = importlib.import_module("rbn.backends.torch").RBN(3)
    layer.momentum, layer.scaling = 0.3, None
    assert config_of("torch", layer, gamma=True, beta=True) == Config(3, momentum=0.7, scaling=None)
    layer.centering = []
    with pytest.raises(RBNTypeError, match=re.escape("RBN: expected centering to be one of")):
        config_of("torch", layer, gamma=True, beta=True)


def test_the_reference_is_what_it_is_called():
    assert {name: getattr(rbn_core, name).__name__ for name in LAYERS} == {name: name for name in LAYERS}
