"""Every program exits with a status and at most one error line, even while a thread hangs."""

import subprocess
import sys

from support.project import PROJECT, SECONDS

import pytest


@pytest.mark.parametrize(
    ("statement", "status", "error"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise WorkflowError('no such folder')", 1, "program: no such folder\n"),
        ("raise KeyboardInterrupt", 1, "program: stopped\n"),
    ],
)
def test_program_exits_although_a_thread_hangs(statement, status, error):
    program = (
        "import threading, time\n"
        "from workflow.errors import WorkflowError\n"
        "from workflow import cli\n"
        "cli.EXIT_SECONDS = cli.STOP_SECONDS = 1\n"
        f"threading.Thread(target=time.sleep, args=[{2 * SECONDS}]).start()\n"
        "with cli.command_line('program'):\n"
        "    print('output')\n"
        f"    {statement}\n"
    )
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)
    assert (end.returncode, end.stdout, end.stderr) == (status, "output\n", error)
