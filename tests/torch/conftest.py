"""Packages that some of the tests are about."""

import warnings

import pytest


@pytest.fixture(scope="session")
def torchvision():
    """The package, also where its own operators are compiled for another PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pytest.importorskip("torchvision")
        except RuntimeError:
            import torch  # not above: this file is read where other frameworks are tested, too

            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
            return pytest.importorskip("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):
    """The package."""
    pytest.importorskip("timm.optim")
    return pytest.importorskip("timm")
