"""The packages of a wheel. pyproject.toml has everything else.

tools/ and configs/ are outside of every package in the repository. A wheel has them in `crossmae_toolkit`, because
packages with the names `tools` and `configs` would collide with those of other projects.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["crossmae", "crossmae.*", "det", "det.*"]),
        *(f"crossmae_toolkit.{name}" for name in ("configs", "tools", "tools.benchmarks", "tools.demo")),
    ],
    package_dir={"crossmae_toolkit.configs": "configs", "crossmae_toolkit.tools": "tools"},
    package_data={
        "crossmae": ["py.typed"],
        "det": ["py.typed"],
        "crossmae.reports": ["templates/*"],
        "crossmae_toolkit.configs": ["**/*.yaml"],
    },
)
