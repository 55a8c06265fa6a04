"""The one thing pyproject.toml cannot say: the folder kernels/ is imported as gemmascope.kernels."""

from setuptools import setup

setup(package_dir={"gemmascope": "gemmascope", "gemmascope.kernels": "kernels"})
