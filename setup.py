"""Package metadata, all of it read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"],
    url=settings["repository"],
    packages=find_packages(include=["paperbook", "paperbook.*"]),
    package_data={"paperbook": ["*/*.css", "*/*.json", "*/*.safetensors", "*/*.toml", "*/adapter/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        key.removesuffix("_requirements"): settings[key].split() for key in settings if key.endswith("_requirements")
    },
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
    zip_safe=False,
)
