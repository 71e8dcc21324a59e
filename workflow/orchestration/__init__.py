"""Prefect: connection, server, flow runs, progress and logs; and the Dask cluster."""
