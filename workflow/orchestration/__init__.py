"""What is around a run: servers, MLflow's run, signals, the command line."""
