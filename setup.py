"""The compiled loops; all else about the package is in pyproject.toml."""

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


setup(
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
