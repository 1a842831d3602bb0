"""The processes of several devices: one that raises, dies or hangs ends them all and is heard."""

import re
import sys
import time
from pathlib import Path

import pytest

from rbn.conformance import shares
from rbn.conformance.subject import NoResultInTimeError

pytestmark = pytest.mark.timeout(120)  # what sleeps in troubled.py sleeps longer


class Devices:
    """Two devices of troubled.py, and their processes."""

    def __init__(self):
        self.launched = []

    def launch(self, script, world, folder):
        here = str(Path(__file__).parent)
        self.launched += [
            shares.start([sys.executable, *script], folder / f"{rank}.log", RANK=str(rank), PYTHONPATH=here)
            for rank in range(world)
        ]
        return self.launched

    def start(self, factory="device"):
        return shares.processes(f"troubled:{factory}", 2, self.launch)

    def ended(self):
        return [process.returncode for process in self.launched]


@pytest.fixture
def devices():
    return Devices()


def test_idle_devices_end_on_their_own(devices):
    processes = devices.start()
    assert processes.call([("name", ())] * 2) == ["device 0", "device 1"]
    assert devices.start() is processes
    processes.stop()
    assert devices.ended() == [0, 0]
    assert not Path(processes.folder.name).exists()


def test_a_launcher_that_is_absent_leaves_nothing_behind():
    def launch(script, world, folder):
        folders.append(folder)
        raise NotImplementedError("no launcher")

    folders = []
    with pytest.raises(NotImplementedError, match="no launcher"):
        shares.processes("troubled:device", 2, launch)
    assert not folders[0].exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_devices_end_when_their_launcher_is_killed(tmp_path, runs):
    body = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    script = [shares.__file__, "troubled:device_that_hangs_at_its_start", "1", str(tmp_path)]
    here = str(Path(__file__).parent)
    log = tmp_path / "launcher.log"
    launcher = shares.start([sys.executable, "-c", body, *script], log, RANK="0", PYTHONPATH=here)
    while not (found := re.search(r"hangs as process (\d+)\n", log.read_text())):
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    while runs(found[1]):  # until the time limit of this file
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("raises", "device 1 of 2: (.|\n)*ValueError: out of order"),
        ("dies", "device 1 of 2: its process ended"),
        ("hangs", r"devices \[1\] of 2 gave no answer in 2 s:(.|\n)*device 1 was here"),
    ],
)
def test_a_device_in_trouble_ends_them_all(devices, monkeypatch, task, message):
    processes = devices.start()
    if task == "hangs":
        monkeypatch.setattr(shares, "TIME_LIMIT", 2)
    with pytest.raises(NoResultInTimeError if task == "hangs" else RuntimeError, match=message):
        processes.call([(task, ())] * 2)
    assert None not in devices.ended()
    assert shares.processes.cache_info().currsize == 0  # the next case gets new ones


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("device_that_cannot_start", "ended before its first step:(.|\n)*ValueError: out of order"),
        ("device_that_hangs_at_its_start", "0 of 2 devices started in 2 s"),
    ],
)
def test_a_device_that_does_not_start_ends_them_all(devices, monkeypatch, factory, message):
    late = factory == "device_that_hangs_at_its_start"
    if late:
        monkeypatch.setattr(shares, "TIME_LIMIT", 2)
    with pytest.raises(NoResultInTimeError if late else RuntimeError, match=message):
        devices.start(factory)
    assert len(devices.ended()) == 2
    assert None not in devices.ended()
