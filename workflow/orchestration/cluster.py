"""A running Dask cluster: `dask scheduler` on one machine, `dask worker` on others."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow.errors import WorkflowError

if TYPE_CHECKING:
    import distributed

PACKAGE = Path(__file__).resolve().parent.parent
SECONDS = 5  # to reach a scheduler, and for it to know a worker
TASKS_PER_THREAD = 2  # one that is computed, and one that waits


class Workers(NamedTuple):
    """Where tasks run, how many to submit at once, and whether the workers may lack access to local files."""

    executor: Executor
    max_tasks: int
    is_remote: bool


@contextmanager
def workers(address: str | None) -> Iterator[Workers]:
    """Yield the workers of the Dask cluster at the address, or a thread of this process without one."""
    if not address:
        with ThreadPoolExecutor(1) as executor:
            yield Workers(executor, 1, is_remote=False)
        return
    with connect(address) as client:
        max_tasks = TASKS_PER_THREAD * sum(client.nthreads().values())
        yield Workers(client.get_executor(pure=False), max_tasks, is_remote=True)


@contextmanager
def connect(address: str) -> Iterator["distributed.Client"]:
    """A client of the cluster at an address such as tcp://127.0.0.1:8786, whose workers have this package.

    Raises WorkflowError when there is no scheduler, or no worker, or no key for one, or when the workers fail.
    """
    import distributed

    try:
        client = distributed.Client(address, timeout=SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise WorkflowError(f"no Dask scheduler answers at {address}: start `dask scheduler`") from error
    except TypeError as error:  # distributed (2026.8) has no error of its own for that
        raise WorkflowError(
            f"{address} needs TLS: set ca-file, client.key and client.cert below distributed.comm.tls in Dask's "
            "configuration, see https://distributed.dask.org/en/latest/tls.html"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS)
        except OSError as error:  # a TimeoutError
            raise WorkflowError(
                f"the Dask scheduler at {address} has no worker: start `dask worker {address}`"
            ) from error
        try:
            send_code(client)
            yield client
        except (distributed.KilledWorker, distributed.CancelledError, ImportError) as error:
            raise WorkflowError(f"the Dask workers at {address} fail: {error}") from error


def send_code(client: "distributed.Client") -> None:
    """Gives this package to all workers, also to those that join later; they forget an older one."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "workflow"]:
            del sys.modules[name]

    with tempfile.TemporaryDirectory() as folder:
        archive = shutil.make_archive(str(Path(folder, PACKAGE.name)), "zip", PACKAGE.parent, PACKAGE.name)
        client.run(forget)
        client.upload_file(archive)
