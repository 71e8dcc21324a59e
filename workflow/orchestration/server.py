"""A Prefect server that ends when its standard input closes: that is, when the run is gone, however it ended.

    python workflow/orchestration/server.py PORT

`prefect server start` would go on after a run that was killed. create_app() is what that command calls too
(Prefect 3.8); with an option of Prefect's to end with its parent, this file would be unnecessary.
"""

import os
import signal
import sys
import threading

import uvicorn


def end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    app = "prefect.server.api.server:create_app"
    uvicorn.run(app, factory=True, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
