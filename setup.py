"""The compiled loops; all else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "rbn.kernels.rbn_kernels",  # a plain library that is loaded by its path
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
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,  # without a compiler the layers run in their framework's operations
        )
    ]
)
