"""Files of one format, damaged at random, read one after another: python mutate.py FORMAT COUNT SEED FOLDER.

Every file must be read, or refused with an RBNError: not by another exception, not after a second, not with
more memory than ten times the file. The parent sees a crash as the exit status; the file that was being read
is then still in FOLDER. A file can be made again: its damage depends on FORMAT, SEED and its number alone.
"""

import argparse
import datetime
import io
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import tracemalloc
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np

from rbn import porting
from rbn_core import RBNError, weights
from rbn_core.names import to_own
from rbn_core.training import Group, Training

FORMATS = {
    "canonical": ("canonical", "a.safetensors"),
    "torch_safetensors": ("torch", "a.safetensors"),
    "pth": ("torch", "a.pth"),
    "msgpack": ("flax", "a.msgpack"),
    "orbax": ("flax", "a"),
    "ckpt": ("mindspore", "a.ckpt"),
    "pkl": ("jittor", "a.pkl"),
}
"""Whose format it is, and what a file is called."""

TRAINED = ("pth", "pkl")
"""Whose files hold an optimizer, too, in some of their forms."""

SECONDS = 1.0
"""How long reading a file may compute: other processes on the machine do not count."""

MOST = 10
"""How many times the file's size reading it may take in memory."""

ANYWAY = 1 << 21
"""The memory that reading the smallest file takes, with what Python keeps of the code it runs."""

ORBAX = 1 << 23
"""The same of a folder of Orbax: tensorstore decodes up to 4 MiB whatever the folder's size."""

HEADROOM = 1 << 28
"""How much address space there is left to take."""

NUMBERS = [
    0,
    1,
    2,
    9,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
]


class HangError(BaseException):
    """Reading takes too long."""


def memory(which):
    """The bytes of this process in memory, VmRSS now, VmHWM at most; `resource` counts its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{which}:\s+(\d+) kB$", status, flags=re.MULTILINE)[1]) * 1024


def example(seed):
    """A small state with the dtypes and ranks that occur."""
    rng = np.random.default_rng(seed)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bn1.gamma": rng.normal(size=4).astype(np.float32),
        "bn1.scale_weight": rng.normal(size=4),
        "bn1.running_mean": rng.normal(size=4).astype(np.float16),
        "bn1.num_batches_tracked": np.array(seed + 3, np.int32),
        "head.fc.weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
        "head.fc.bias": np.zeros(5, np.float32),
    }


KINDS = {"conv1": "convolution", "bn1": "norm", "head.fc": "linear"}


BESIDE = {
    "epoch": 3,
    "args": argparse.Namespace(lr=0.1, where=PurePosixPath("runs"), stages=(1, 4)),
    "best": np.float64(0.9),
    "when": datetime.datetime(2020, 1, 1),
    "seen": {1, 2},
    "by": defaultdict(list, {("a", 1): [1.0]}),
}
"""What stands beside the weights."""


def optimizer(name, arrays):
    """What stands beside them, too: an Adam of two groups as PyTorch stores one, an SGD as Jittor does."""
    trained = [key for key in arrays if not key.startswith("bn1.running") and not key.endswith("tracked")]
    groups = [[key for key in trained if (arrays[key].ndim > 1) == kernels] for kernels in (True, False)]
    if name == "pkl":
        parts = [
            {"params": [arrays[key] for key in own], "values": [arrays[key] * 2 for key in own], "lr": 0.1}
            for own in groups
        ]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "dampening": 0, "nesterov": False}
        return {"defaults": options | {"n_step": 3, "param_groups": parts}}
    order = [key for own in groups for key in own]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    return {
        "state": {
            number: {
                "step": arrays[key].sum() * 0 + 3,
                "exp_avg": arrays[key] * 2,
                "exp_avg_sq": arrays[key] ** 2,
            }
            for number, key in enumerate(order)
        },
        "param_groups": [
            options | {"decoupled_weight_decay": True, "params": [order.index(key) for key in own]}
            for own in groups
        ],
    }


def whole(name, path, seed):
    """Write an undamaged file, in one of the forms that the format has."""
    framework = FORMATS[name][0]
    state = example(seed)
    if name == "canonical":
        trained = next(iter(state))
        momentum = {trained: np.ones_like(state[trained])}
        training = Training("sgd", 3, (Group(0.1, 1e-4, (trained,)),), {"momentum": momentum})
        weights.save(
            path, state, layers={path: {"kind": kind} for path, kind in KINDS.items()}, training=training
        )
        return
    own = to_own(framework, state, KINDS)
    if name == "pth" and seed % 3 == 1:  # the form before the zip, among other things
        import torch

        entries = {"state_dict": {key: torch.tensor(value.astype(np.float32)) for key, value in own.items()}}
        entries["optimizer"] = optimizer(name, entries["state_dict"])
        torch.save(entries | BESIDE, path, _use_new_zipfile_serialization=False)
        return
    if name == "pth" and seed % 3 == 2:  # what a training script writes
        import torch

        entries = {key: torch.tensor(value.astype(np.float32)) for key, value in own.items()}
        beside = {"state_dict_ema": entries, "optimizer": optimizer(name, entries)}
        torch.save({"state_dict": entries} | beside | BESIDE, path)
        return
    if name == "pkl" and seed % 3 == 1:  # as a Python without Jittor would
        path.write_bytes(pickle.dumps({"model": own, "optimizer": optimizer(name, own)} | BESIDE, protocol=2))
        return
    if name == "pkl" and seed % 3 == 2:
        beside = {"ema": own, "optimizer": optimizer(name, own)}
        path.write_bytes(pickle.dumps({"model": own} | beside | BESIDE, protocol=4))
        return
    options = {"layout": "nnx"} if framework == "flax" and seed % 3 == 1 else {}
    porting.format_of(framework).write(path, own, **options)


def damaged(data, other, random_):
    """The bytes with one to three kinds of damage."""
    data = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 3))):
        size = len(data)
        at = random_.randrange(size + 1)
        length = random_.choice((1, 2, 4, 8, random_.randrange(1, 200)))
        match random_.randrange(10):
            case 0:
                for _ in range(random_.choice((1, 1, 2, 8))):
                    if size:
                        data[random_.randrange(size)] ^= 1 << random_.randrange(8)
            case 1:
                data[at : at + length] = random_.randbytes(length)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * random_.choice((1, 2, 50))
            case 5:
                start = random_.randrange(len(other))
                data[at : at + length] = other[start : start + length]
            case 6:
                data[at:] = other[min(at, len(other)) :]
            case 7:
                width = random_.choice((1, 2, 4, 8))
                number = random_.choice((*NUMBERS, size, size - 1, size + 1)) % 256**width
                data[at : at + width] = number.to_bytes(width, random_.choice(("little", "big")))
            case 8:  # a number or a name in a text
                digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
                if digits:
                    i = random_.choice(digits)
                    data[i : i + 1] = random_.choice(
                        (b"0", b"-1", b"9" * 19, b"1e9", b"[" * 300, b'"', b"null")
                    )
            case 9:
                data[at:at] = random_.randbytes(length)
    return bytes(data)


def variant(name, data, other, random_):
    """A damaged file, now and then with sums and lengths as they should be, so that damage gets further."""
    deeper = random_.random() < 0.5
    if deeper and "safetensors" in FORMATS[name][1] and len(data) > 8:
        end = 8 + int.from_bytes(data[:8], "little")
        header = damaged(data[8:end], other[8:end], random_)
        return len(header).to_bytes(8, "little") + header + data[end:]
    if deeper and name == "pth" and data.startswith(b"PK"):
        return rezipped(data, other, random_)
    if deeper and name == "pkl" and data.endswith(b"HCAJSLHD"):
        return damaged(data[:-28], other[:-28], random_)
    return damaged(data, other, random_)


def rezipped(data, other, random_):
    """The zip with one damaged entry, and sums as they should be."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as opened, zipfile.ZipFile(made, "w") as again:
        names = opened.namelist()
        chosen = random_.choice((names[0], random_.choice(names)))  # the pickle comes first
        for name in names:
            content = opened.read(name)
            again.writestr(name, damaged(content, other, random_) if name == chosen else content)
    return made.getvalue()


def main(name, count, seed, folder):
    framework, file_name = FORMATS[name]
    path = folder / file_name
    originals = []
    for number in range(4):
        whole(name, path, number)
        originals.append(contents(path))
        content, _ = read(path, framework)  # must be readable as it is
        assert (content.training is not None) == (
            name == "canonical" or (name in TRAINED and number in (1, 2))
        )
        remove(path)
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(HangError()))
    tracemalloc.start()
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + HEADROOM, resource.RLIM_INFINITY))
    most_resident = memory("VmHWM")
    start, accepted, refused, most, slowest = time.monotonic(), 0, 0, 0, 0.0
    for number in range(count):
        random_ = random.Random(f"{name} {seed} {number}")
        original, other = random_.sample(originals, 2)
        files = dict(original)
        chosen = random_.choice(sorted(files))
        alike = other.get(chosen) or random_.choice(list(other.values()))
        files[chosen] = variant(name, files[chosen], alike or b"x", random_)
        put(path, files)
        size = sum(map(len, files.values()))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        began = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            read(path, framework)
            accepted += 1
        except RBNError:
            refused += 1
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}, number {number}: {path}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - began)
        taken = tracemalloc.get_traced_memory()[1] - before
        most = max(most, taken)
        allowed = MOST * size + (ORBAX if name == "orbax" else ANYWAY)
        assert taken <= allowed, f"number {number}: {taken} bytes for a file of {size}"
        remove(path)
    seconds = time.monotonic() - start
    grown = memory("VmHWM") - most_resident
    print(
        f"{name}: {count} files in {seconds:.0f} s, {accepted} readable, {refused} refused, at most "
        f"{slowest:.2f} s and {most / 1024:.0f} KiB each, {grown / 2**20:.0f} MiB more in the end"
    )
    assert grown < HEADROOM / 4, f"{grown} bytes more than at the start"


def read(path, framework):
    """What `port` to a canonical file does before it writes."""
    return porting.fitted(porting.read(path, framework, trained=True), None, None, None, None)


def contents(path):
    """The files of a folder, or the file alone, by their names."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {"": path.read_bytes()}


def put(path, files):
    for name, content in files.items():
        target = path / name if name else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
