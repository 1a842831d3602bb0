"""One package per framework: ``torch``, ``flax``, ``mindspore``, ``jittor``. Importing this imports none.

Every backend provides the same files with the same names in them:

* ``layers.py``: the layer classes (``RBN``, ...), each a native module of the framework, with the
  constructor, parameter names, momentum convention and train/eval switch of that framework's own BatchNorm.
* ``functional.py``: what the layers compute, as functions on the framework's arrays, in the three steps
  ``moments``, ``calibrate`` and ``affine``.
* ``weights.py``: ``to_numpy(layer)`` returns a layer's state as NumPy arrays under the canonical names of
  ``rbn_core``; ``from_numpy(layer, state)`` loads such a state. Both are strict: missing, unexpected and
  wrongly shaped keys are one error that lists them all and changes nothing.

A backend imports ``rbn_core`` and its own framework, and never another backend. ``frameworks.py`` holds what
is known about the frameworks without importing them.
"""
