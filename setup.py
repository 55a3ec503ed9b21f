"""Hands settings.ini to setuptools: it is the one place where names, versions and requirements are written."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(key):
    "The requirements under `key`, one a line."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}

setup(
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=[f"{cfg['lib_name']}*"]),
    # The shipped models: ordinary Hugging Face snapshots beside the code that made them.
    package_data={cfg["lib_name"]: [f"tinyworld/{name}" for name in ("*/*.safetensors", "*/*.json", "*/*.jinja", "*.json")]},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
)
