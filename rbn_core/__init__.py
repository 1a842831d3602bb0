"""What the layers are: options, equations and names, in NumPy alone."""

from rbn_core.config import Config
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError, RBNWarning
from rbn_core.reference import BNET, IEBN, RBN

__all__ = ["BNET", "IEBN", "RBN", "Config", "RBNError", "RBNTypeError", "RBNValueError", "RBNWarning"]
