"""The package is described in pyproject.toml; csrc/build_kernels.py compiles the CUDA kernels.

Without nvcc, or torch in the Python that lowbit is installed for, the package is pure Python.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_kernels  # noqa: E402

TOOLCHAIN = build_kernels.find_toolchain()


class BuildKernels(build_ext):
    """Into the wheel, or into lowbit/ for an editable installation."""

    def finalize_options(self):
        super().finalize_options()
        self.built = []

    def run(self):
        folder = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            built = build_kernels.build(TOOLCHAIN, build_kernels.architectures())
        except build_kernels.BuildError as error:
            raise SystemExit(f"lowbit: {error}") from error
        build_kernels.install(built, folder / "lowbit")
        self.built = [str(folder / "lowbit" / path.name) for path in built]

    def get_outputs(self):
        return self.built

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    """With a line about what is left out."""

    def run(self):
        if isinstance(TOOLCHAIN, str):
            print(
                f"lowbit: installed without its CUDA backend: {TOOLCHAIN}; to add it, install "
                "lowbit again where nvcc and torch are, or run `make build` in a checkout",
                file=sys.stderr,
            )
        super().run()


def extensions() -> list[Extension]:
    """They make the wheel one of this platform and Python; BuildKernels does not read them."""
    return [] if isinstance(TOOLCHAIN, str) else [Extension("lowbit._cuda", sources=[])]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
