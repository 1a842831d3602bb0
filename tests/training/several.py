"""One process of test_several.py, which makes runs with the others: python several.py FRAMEWORK FOLDER."""

import contextlib
import io
import itertools
import json
import os
import signal
import sys
from pathlib import Path

from test_loops import small
from test_several import SHORT, TOGETHER

from rbn.cli import app
from rbn.training import loop, run
from rbn_core import RBNValueError


def command(*arguments):
    """What a command has printed, and its exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = app([str(each) for each in arguments], standalone_mode=False)
    return status or 0, output.getvalue()


BATCHES = run.training_batches


def interrupted(*arguments, **options):
    """Batches before the third of which Ctrl-C comes."""
    for number, batch in enumerate(BATCHES(*arguments, **options)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


def broken(*arguments, **options):
    """Batches of which the third cannot be read."""
    yield from itertools.islice(BATCHES(*arguments, **options), 2)
    raise RBNValueError("train: expected a disk, got none.")


def main(framework, folder):
    """Leave the runs `whole`, `cut` and `apart`, with what was printed, and fail in the run `broken`."""
    run.architectures.network = lambda name, norm, classes: small(norm)
    share = loop.join(framework, "")
    is_last = share.index == share.count - 1
    results = []
    begun = ("train", "--framework", framework, "--out")
    results.append(command(*begun, folder / "whole", *TOGETHER))
    run.training_batches = interrupted if is_last else BATCHES
    results.append(command(*begun, folder / "cut", *TOGETHER))
    run.training_batches = BATCHES
    results.append(command("train", "--resume", folder / "cut" / run.LAST, "--log-every", 1))
    results.append(command("eval", folder / "whole" / run.LAST))
    results.append(command(*begun, folder / "apart", *SHORT))
    (folder / f"process-{share.index}.json").write_text(json.dumps(results))
    if is_last:
        run.training_batches = broken
    app([str(each) for each in (*begun, folder / "broken", *TOGETHER)])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
