"""MLflow: connection, runs, logging and the model registry."""
