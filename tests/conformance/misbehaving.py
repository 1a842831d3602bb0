"""Subjects that do something bad, for the runner to outlive."""

import atexit
import os
import signal
import time
from typing import ClassVar

from rbn.conformance.subject import NoResultInTimeError
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


class LateOnce(Misbehaves):
    """Whose devices give no result in time, as on a machine that compiles."""

    late = 1

    def misbehave(self):
        if self.late:
            self.late -= 1
            raise NoResultInTimeError("device 1 of 2")


class AlwaysLate(LateOnce):
    late = 100


class DiesWhenSpoilt(NumpyLayer):
    """Ends its process with everything that is spoilt."""

    layers: ClassVar = ("bn",)

    def __init__(self):
        super().__init__("misbehaves", Layer)

    def spoil(self, name, kind):
        os.kill(os.getpid(), signal.SIGSEGV)


class Ruined(DiesWhenSpoilt):
    """Ends its process in the case after the one that is to blame."""

    ruined = False

    def build(self, *arguments):
        if self.ruined:
            os.kill(os.getpid(), signal.SIGABRT)
        super().build(*arguments)

    def spoil(self, name, kind):
        self.ruined = True
        raise ValueError("refused, but too late")


class DiesAtItsEnd(DiesWhenSpoilt):
    def __init__(self):
        super().__init__()
        atexit.register(os.kill, os.getpid(), signal.SIGABRT)

    def spoil(self, name, kind):
        raise ValueError("refused")


class AlwaysDies(Dies):
    def build(self, *arguments):
        self.misbehave()
