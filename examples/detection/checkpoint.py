"""The file that a run goes on from: written whole or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

KEYS = {"options", "classes", "model", "optimizer", "schedule", "step"}
"""What is in the file."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the file beside the old one, and put it in its place when it is whole."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # on a full disk torch's writer raises the latter
        part.unlink(missing_ok=True)
        raise SystemExit(
            f"detection: expected to write {path}, got: {error}. Make room; the file from before is whole."
        ) from None


def load(path: Path) -> dict[str, Any]:
    """Read the file; nothing in it is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if KEYS - content.keys():
            raise ValueError("another kind of file")
    except OSError as error:
        raise SystemExit(
            f"detection: expected last.pth of a run, got {path} ({error.strerror}). Check the path."
        ) from None
    except (RuntimeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError):
        raise SystemExit(
            f"detection: expected last.pth of a run, got {path}, which is damaged or another kind of file. "
            "Give the file that train wrote."
        ) from None
    return content
