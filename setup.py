"""Everything about the package is in pyproject.toml; building csrc/ will hook in here."""

from setuptools import setup

setup()
