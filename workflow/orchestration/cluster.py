"""Dask workers: those of a running cluster (`dask scheduler` and `dask worker`), or local ones."""

import asyncio
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.data.features import Workers
from workflow.errors import WorkflowError, first_line

if TYPE_CHECKING:
    import distributed

PACKAGE = Path(__file__).resolve().parent.parent
CONNECT_SECONDS = 5  # timeout for reaching the scheduler, and for waiting for its first worker
TASKS_PER_THREAD = 2  # one running, one queued
WORKER_BYTES = 10**9  # memory of a local worker


@contextmanager
def workers(address: str | None) -> Iterator[Workers]:
    """Yield the workers of the Dask cluster at the address; without an address, a single thread of this process.

    Raises:
        WorkflowError: as for connect()
    """
    if not address:
        with ThreadPoolExecutor(1) as executor:
            yield Workers(executor, 1, is_remote=False)
        return
    with connect(address) as client:
        max_tasks = TASKS_PER_THREAD * sum(client.nthreads().values())
        yield Workers(client.get_executor(pure=False), max_tasks, is_remote=True)


@contextmanager
def connect(address: str) -> Iterator["distributed.Client"]:
    """Connect to the Dask cluster at an address such as tcp://127.0.0.1:8786, and upload this package to its workers.

    Raises:
        WorkflowError: the scheduler does not respond, has no workers or needs TLS keys, or the workers fail
    """
    import distributed
    from distributed.comm import CommClosedError

    warnings.filterwarnings("ignore", "Sending large graph", UserWarning)  # photos, or a model
    try:
        with ThreadPoolExecutor(1) as executor:  # a notebook's main thread already has an event loop
            executor.submit(asyncio.run, check_scheduler(address)).result()
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise WorkflowError(f"no Dask scheduler responds at {address}; start `dask scheduler`") from error
    except TypeError as error:  # distributed (2026.8) raises no specific error without TLS keys
        raise WorkflowError(
            f"{address} needs TLS; set ca-file, client.key and client.cert under distributed.comm.tls in Dask's "
            "configuration; see https://distributed.dask.org/en/latest/tls.html"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except OSError as error:  # a TimeoutError
            raise WorkflowError(
                f"the Dask scheduler at {address} has no workers; start `dask worker {address}`"
            ) from error
        try:
            upload_package(client)
            yield client
        except ImportError as error:
            raise WorkflowError(
                f"a worker of the Dask cluster at {address} failed: {first_line(error)}; "
                "install requirements.txt on all workers"
            ) from error
        except (distributed.KilledWorker, distributed.CancelledError, CommClosedError) as error:
            raise WorkflowError(f"the Dask cluster at {address} failed: {first_line(error)}") from error


async def check_scheduler(address: str) -> None:
    """Raise OSError or ValueError unless a Dask scheduler responds within CONNECT_SECONDS.

    Client(timeout=...) (2026.8) waits forever for a server of a different kind.
    """
    import distributed

    connection_args = distributed.Security().get_connection_args("client")
    async with distributed.rpc(address, connection_args=connection_args) as server:
        identity = await asyncio.wait_for(server.identity(), CONNECT_SECONDS)
    if identity["type"] != "Scheduler":
        raise ValueError(f"a {identity['type'].lower()} responds")


def upload_package(client: "distributed.Client") -> None:
    """Upload this package to all workers, including those that join later, and unload older versions."""

    def unload() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "workflow"]:
            del sys.modules[name]

    with tempfile.TemporaryDirectory() as folder:
        archive = shutil.make_archive(str(Path(folder, PACKAGE.name)), "zip", PACKAGE.parent, PACKAGE.name)
        client.run(unload)
        client.upload_file(archive)


@contextmanager
def start_local(max_workers: int) -> Iterator["distributed.Client"]:
    """Yield a client of local worker processes: one per core, if memory allows, and at most `max_workers`."""
    import distributed
    import psutil
    from distributed.security import Security

    os.environ["PYTHONSAFEPATH"] = "1"  # the workers import nothing from the current folder
    memory = psutil.virtual_memory().available // WORKER_BYTES
    count = max(1, min(os.cpu_count(), memory, max_workers))
    security = Security.temporary()  # without TLS, any user of this machine could run code on the workers
    options = {"n_workers": count, "threads_per_worker": 1, "memory_limit": None, "dashboard_address": None}
    with chdir(PACKAGE.parent):  # the workers read Prefect's settings in this folder
        local = distributed.LocalCluster(security=security, **options)
    with local, distributed.Client(local, set_as_default=False) as client:
        yield client
