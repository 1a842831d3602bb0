"""`rbn port --convert`: BatchNorm's weights become another layer's on their way, and back."""

import numpy as np
import pytest
from typer.testing import CliRunner

from rbn import cli
from rbn.porting import port
from rbn_core import RBNValueError, weights
from rbn_core.architectures import network
from rbn_core.execution import initial_state, run


def lively(described):
    rng = np.random.default_rng(0)
    state = initial_state(described)
    for name, value in state.items():
        if value.ndim == 1:
            state[name] = (value + rng.uniform(0, 0.2, value.shape)).astype(np.float32)
    return state


@pytest.fixture
def plain(tmp_path):
    described = network("resnet18", "bn", 5)
    path = tmp_path / "plain.safetensors"
    weights.save(path, lively(described), network=described)
    return path


IMAGES = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)


def result(path):
    found = weights.read(path)
    return run(found.network, found.state, IMAGES)[0]


@pytest.mark.parametrize("norm", ["rbn", "iebn", "bnet", {"layer": "rbn", "stages": (1, 4)}], ids=str)
def test_a_preserved_network_gives_what_it_gave(plain, tmp_path, norm):
    table = port(plain, tmp_path / "x.safetensors", convert=norm, preserve=True)
    found = weights.read(tmp_path / "x.safetensors")
    assert found.network == network("resnet18", norm, 5)
    assert found.layers == network("resnet18", norm, 5).layers()
    assert {row.name for row in table.rows if row.status != "left out"} == found.state.keys()
    np.testing.assert_allclose(result(tmp_path / "x.safetensors"), result(plain), rtol=1e-4, atol=1e-4)
    port(tmp_path / "x.safetensors", tmp_path / "back.safetensors", convert="bn")
    np.testing.assert_allclose(result(tmp_path / "back.safetensors"), result(plain), rtol=1e-4, atol=1e-4)


def test_without_it_gamma_stays_and_bnet_starts_at_zero(plain, tmp_path):
    port(plain, tmp_path / "x.safetensors", convert="rbn")
    before, after = weights.load(plain), weights.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(after["bn1.gamma"], before["bn1.gamma"])
    port(plain, tmp_path / "x.safetensors", convert="bnet")
    after = weights.load(tmp_path / "x.safetensors")
    assert not after["layer1.0.bn2.conv_weight"].any()
    assert "layer1.0.bn2.gamma" not in after


def test_a_model_of_ones_own_is_converted_by_its_names(tmp_path):
    state = {
        "body.0.weight": np.ones((4, 3, 3, 3), np.float32),
        "body.1.gamma": np.full(4, 2, np.float32),
        "body.1.beta": np.ones(4, np.float32),
        "body.1.running_mean": np.ones(4, np.float32),
        "body.1.running_var": np.ones(4, np.float32),
    }
    weights.save(tmp_path / "own.safetensors", state)
    port(tmp_path / "own.safetensors", tmp_path / "x.pkl", convert="rbn", preserve=True)
    port(tmp_path / "x.pkl", tmp_path / "x.safetensors")
    found = weights.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["body.1.center_weight"], 0)
    np.testing.assert_allclose(found["body.1.gamma"], 2 * (1 + np.exp(-1)), rtol=1e-6)
    with pytest.raises(RBNValueError, match="expected stages and places of a network that is known"):
        port(tmp_path / "own.safetensors", tmp_path / "y.pkl", convert={"layer": "rbn", "stages": (1,)})


def test_what_cannot_be_converted_is_refused(tmp_path, plain):
    described = network("resnet18", "rbn", 5)
    weights.save(tmp_path / "rbn.safetensors", lively(described), network=described)
    with pytest.raises(RBNValueError, match="got 20 that cannot: bn1 center_weight is not 0 everywhere"):
        port(tmp_path / "rbn.safetensors", tmp_path / "x.pkl", convert="bn")
    with pytest.raises(RBNValueError, match="bn1 is rbn, which becomes iebn by way of bn alone"):
        port(tmp_path / "rbn.safetensors", tmp_path / "x.pkl", convert="iebn")
    with pytest.raises(RBNValueError, match="expected normalizations that 'bn' changes, got none"):
        port(plain, tmp_path / "x.pkl", convert="bn")
    with pytest.raises(RBNValueError, match="expected --convert where --preserve is given"):
        port(plain, tmp_path / "x.pkl", preserve=True)
    assert not (tmp_path / "x.pkl").exists()


def test_a_batch_norm_file_taken_for_rbn_names_the_way(plain, tmp_path):
    with pytest.raises(
        RBNValueError, match="are BatchNorm: leave --norm out, or convert them with --convert rbn"
    ):
        port(plain, tmp_path / "x.pkl", network="resnet18", norm="rbn")


def test_a_mismatch_says_the_lines_to_paste_and_they_work(plain, tmp_path):
    state = {f"model.{name}": value for name, value in weights.load(plain).items()}
    state["neck.weight"] = np.ones((2, 2), np.float32)
    weights.save(tmp_path / "prefixed.safetensors", state)
    command = [
        "port",
        str(tmp_path / "prefixed.safetensors"),
        str(tmp_path / "x.pkl"),
        "--network",
        "resnet18",
    ]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    start = lines.index("[rename]")
    assert lines[start + 1 : start + 3] == [r"'model\.(.*)' = '\1'", r"'(neck)(\..*)?' = ''"]
    assert len(done.stderr) < 3500
    (tmp_path / "map.toml").write_text("\n".join(lines[start : start + 3]))
    done = CliRunner().invoke(cli.app, [*command, "--map", str(tmp_path / "map.toml")])
    assert done.exit_code == 0
    assert "left out" in done.stdout


def test_the_command_converts(plain, tmp_path):
    command = ["port", str(plain), str(tmp_path / "x.safetensors"), "--convert", "rbn", "--preserve"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    np.testing.assert_allclose(result(tmp_path / "x.safetensors"), result(plain), rtol=1e-4, atol=1e-4)
    done = CliRunner().invoke(cli.app, [*command, "--verify"])
    assert done.exit_code == 2
    assert "expected --verify of one network" in done.stderr
