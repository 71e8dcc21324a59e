"""The machine and packages with which a benchmark ran."""

import os
import platform
from importlib.metadata import version

PACKAGES = ("tensorflow", "keras", "mlflow", "prefect", "pillow")


def describe_machine() -> str:
    """Return the number of cores, the system and the versions of the main packages."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {system}, {packages}"
