"""Read Prefect's settings from the environment, profile and project, but not from files in the current folder.

Prefect (3.8) reads .env, prefect.toml and pyproject.toml in the current folder, which may be any folder of
photos, when it is imported and when its settings are refreshed. Both therefore happen in the project's folder.
"""

import io
import os
import sys
from contextlib import chdir, redirect_stderr
from pathlib import Path

from workflow.cli import shell_command
from workflow.errors import WorkflowError, first_line
from workflow.settings import PROJECT

from pydantic import ValidationError


def refresh() -> None:
    """Make Prefect use the current environment variables.

    refresh_global_settings_context() is not public (Prefect 3.8), but the public temporary_settings() does not affect
    the threads that send logs.
    """
    from prefect.context import refresh_global_settings_context

    with chdir(PROJECT):
        refresh_global_settings_context()


def describe_api_url() -> tuple[str, str]:
    """Return where the address of Prefect's server is set, and the remedy."""
    from prefect.context import get_settings_context

    if os.environ.get("PREFECT_API_URL"):
        return "set by PREFECT_API_URL", "unset PREFECT_API_URL"
    profile = get_settings_context().profile
    if "PREFECT_API_URL" in profile.to_environment_variables():
        command = ("-m", "prefect", "--profile", profile.name, "config", "unset", "PREFECT_API_URL", "--yes")
        return f"set by Prefect's profile {profile.name}", f"remove it: {shell_command(*command, folder=PROJECT)}"
    return f"set by .env, prefect.toml or pyproject.toml in {PROJECT}", "remove it there"


def explain(error: ValueError | OSError) -> str:
    """Return one line for an error in Prefect's settings: the variable or the file, and what is wrong."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        field, value = "_".join(map(str, problem["loc"])), str(problem["input"])
        names = (name for name in os.environ if name.startswith("PREFECT_") and name.endswith(field.upper()))
        name = next((name for name in names if os.environ[name].upper() == value.upper()), f"setting {field}")
        return f"Prefect's {name} is {value}, which is not valid ({problem['msg']}); correct it, or unset it"
    home = os.environ.get("PREFECT_HOME") or Path("~/.prefect").expanduser()
    profiles = os.environ.get("PREFECT_PROFILES_PATH") or Path(home, "profiles.toml")
    return f"Prefect cannot read a settings file, such as {profiles} ({first_line(error)}); repair or remove the file"


messages = io.StringIO()
try:
    with chdir(PROJECT), redirect_stderr(messages):
        import prefect.context  # noqa: F401
except (ValueError, OSError) as error:  # the messages repeat it over several lines
    sys.exit(str(WorkflowError(explain(error))))
print(messages.getvalue(), end="", file=sys.stderr)
