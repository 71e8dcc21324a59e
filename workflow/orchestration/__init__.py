"""Prefect (connection, server, flow runs, progress and logs) and Dask."""
