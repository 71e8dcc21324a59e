"""MLflow: connection, runs, logging and the registry."""
