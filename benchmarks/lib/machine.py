"""The line that says on which machine, and with which packages, figures were measured."""

import os
import platform
from importlib.metadata import version

PACKAGES = ("tensorflow", "keras", "mlflow", "prefect", "pillow")


def describe_machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {system}, {packages}"
