"""Processes for the test of `benchmarks/rival.py`, in a file that is quick to import."""

import time

from benchmarks import rival


class Sleeper:
  def run(self):
    time.sleep(0.02)

  def wait(self):
    pass


def sleeper(connection, seconds):
  def prepare():
    time.sleep(seconds)
    return Sleeper(), {'memory': lambda: 7}, {'ready': True}

  rival.serve(connection, prepare)


def broken(connection):
  rival.serve(connection, lambda: 1 / 0)
