"""The frameworks' files: `rbn.formats.torch` and others read and write them without the framework.

Every module has `read(path)`, which returns NumPy arrays under the framework's names, and
`write(path, arrays)`.
"""
