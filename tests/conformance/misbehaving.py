"""Subjects that do something bad, for the runner to outlive."""

import os
import signal
import time
from typing import ClassVar

from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core.reference import Layer


class Misbehaves(NumpyLayer):
    """Does something bad on the inputs of shape (8, 3), and has only plain BatchNorm."""

    layers: ClassVar = ("bn",)

    def __init__(self):
        super().__init__("misbehaves", Layer)

    def run(self, x, training, cotangent):
        print("a line of its own")
        if x.shape == (8, 3):
            self.misbehave()
        return super().run(x, training, cotangent)

    def misbehave(self):
        raise NotImplementedError


class Dies(Misbehaves):
    def misbehave(self):
        os.kill(os.getpid(), signal.SIGSEGV)


class Exits(Misbehaves):
    def misbehave(self):
        os._exit(3)


class Hangs(Misbehaves):
    def misbehave(self):
        if not os.fork():  # what it started must end with it
            time.sleep(600)
        time.sleep(600)


class AlwaysDies(Dies):
    def build(self, *arguments):
        self.misbehave()
