"""Training and evaluation of the papers' networks, the same run in every framework: `rbn train`, `rbn eval`.

Importing this package imports no framework.
"""
