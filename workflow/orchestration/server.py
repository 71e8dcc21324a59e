"""A Prefect server that exits when its standard input is closed, which happens when the run's process ends.

    python workflow/orchestration/server.py PORT

`prefect server start` (Prefect 3.8), which also calls create_app(), would keep running after a run is killed. Remove
this file once Prefect has an option to exit with the parent process.
"""

import os
import signal
import sys
import threading

import uvicorn


def exit_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    app = "prefect.server.api.server:create_app"
    uvicorn.run(app, factory=True, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
