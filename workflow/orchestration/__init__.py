"""Prefect (settings, connection, server, flow runs, progress and logs) and Dask."""

from workflow.orchestration import prefect_settings as prefect_settings  # before anything else imports Prefect
