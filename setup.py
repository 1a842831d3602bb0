"""The compiled loops, and the page of an index; all else about the package is in pyproject.toml."""

import os
import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Compiles a plain library, which is opened by its path and is the same for every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies, without the name of a Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class OneWheel(bdist_wheel):
    """Builds one wheel for all versions of Python, and for one kind of machine."""

    def finalize_options(self) -> None:
        """Take what Python's own wheel would be, but for the version."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no interface to it, this machine."""
        return ("py3", "none", super().get_tag()[2])


def page() -> str:
    """README.md for an index, where links to files beside it would lead nowhere.

    They lead to the repository when a GitHub workflow builds, and otherwise only the text of a link is left.
    """
    where = [os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "SHA")]

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if not Path(target.partition("#")[0]).exists():
            return found[0]
        return f"[{text}]({where[0]}/{where[1]}/blob/{where[2]}/{target})" if all(where) else text

    return re.sub(r"\[([^][]+)\]\(([^()]+)\)", link, Path("README.md").read_text("utf-8"))


setup(
    long_description=page(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": OneWheel},
    ext_modules=[
        Extension(
            "rbn.kernels.rbn_kernels",
            sources=["kernels/rbn_kernels.cpp", "kernels/mindspore.cpp", "kernels/xla.cpp"],
            depends=glob("kernels/*.h"),
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fopenmp",
                "-fno-math-errno",  # both let the compiler take square roots of vectors
                "-fno-trapping-math",
                "-Wno-psabi",  # vectors are passed between inlined functions alone
            ],
            extra_link_args=["-fopenmp", "-s"],  # -s: without the 4 MB that a debugger reads
            language="c++",
            optional=True,  # without a compiler the layers run in their framework's operations
        )
    ],
)
