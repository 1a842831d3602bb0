"""torchvision, which the libraries import, with its own operators; and one thread, as all models are tiny."""

import runpy
import sys
import tempfile
import warnings
from pathlib import Path

import torch

DETECTION = Path(__file__).parents[2] / "torch" / "detection.py"


def load_torchvision():
    """Import it, where its operators are compiled for another PyTorch with what stands for the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]  # which remember that there were no operators
            with tempfile.TemporaryDirectory() as folder:
                runpy.run_path(str(DETECTION))["load_operators"](Path(folder))


load_torchvision()
torch.set_num_threads(1)
