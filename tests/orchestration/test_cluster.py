"""Dask: the package works in the ZIP file that schedulers and workers receive."""

import os
import shutil
import subprocess
import sys

from support.project import PROJECT


def test_package_in_a_zip_file_can_be_imported(tmp_path):
    scratch, foreign = tmp_path / "scratch", tmp_path / "foreign"
    scratch.mkdir()
    foreign.mkdir()
    (foreign / "prefect.toml").write_text("[broken")  # is not read, although it is in the current folder
    archive = shutil.make_archive(str(scratch / "workflow"), "zip", PROJECT, "workflow")
    modules = "workflow.orchestration.connection, workflow.data.features, workflow.model.head"
    end = subprocess.run(
        [sys.executable, "-P", "-c", f"import {modules}; print(workflow.__file__)"],
        cwd=foreign,
        env=os.environ | {"PYTHONPATH": archive},
        capture_output=True,
        text=True,
    )
    assert (end.returncode, end.stdout) == (0, f"{archive}/workflow/__init__.py\n"), end.stderr
