"""The devices of test_shares.py, of which the second does something bad."""

import os
import time


class Device:
    def __init__(self, rank):
        self.rank = rank

    def name(self):
        return f"device {self.rank}"

    def hangs(self):
        print(f"device {self.rank} was here", flush=True)
        time.sleep(600 * self.rank)

    def raises(self):
        if self.rank:
            raise ValueError("out of order")
        time.sleep(600)  # as a device that waits for the other

    def dies(self):
        if self.rank:
            os._exit(3)
        time.sleep(600)


def device(world, folder):
    rank = int(os.environ["RANK"])
    return rank, Device(rank)


def device_that_cannot_start(world, folder):
    if int(os.environ["RANK"]):
        raise ValueError("out of order")
    return device(world, folder)


def device_that_hangs_at_its_start(world, folder):
    print("hangs as process", os.getpid(), flush=True)
    time.sleep(600)
