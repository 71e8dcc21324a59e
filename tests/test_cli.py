"""The end of a program: one line and a status, however long a thread waits for a server that hangs."""

import subprocess
import sys

from support.project import PROJECT, SECONDS

import pytest


@pytest.mark.parametrize(
    ("last", "status", "error"),
    [
        ("pass", 0, ""),
        ("raise WorkflowError('no such folder')", 1, "program: no such folder\n"),
        ("raise KeyboardInterrupt", 1, "program: stopped\n"),
    ],
)
def test_thread_that_never_ends_keeps_neither_the_process_nor_its_output(last, status, error):
    program = (
        "import threading, time\n"
        "from workflow.errors import WorkflowError\n"
        "from workflow import cli\n"
        "cli.EXIT_SECONDS = cli.STOP_SECONDS = 3\n"
        f"threading.Thread(target=time.sleep, args=[{2 * SECONDS}]).start()\n"
        "with cli.command_line('program'):\n"
        "    print('all that was found')\n"
        f"    {last}\n"
    )
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)
    assert (end.returncode, end.stdout, end.stderr) == (status, "all that was found\n", error)
