"""How a flow run ends in Prefect: also when its process died, was stopped, or Prefect's server is gone."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from workflow.errors import WorkflowError, find_workflow_error

import httpx
import mlflow
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner


def explain_prefect_error(error: httpx.HTTPError) -> WorkflowError:
    """Why Prefect's server was of no use, and the remedy."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        return WorkflowError("Prefect's server wants a password: set PREFECT_API_AUTH_STRING and repeat the command")
    return WorkflowError("Prefect does not answer: start its server and repeat the command")


def close_flow_run(flow_run_id: str | UUID, name: str, reason: str) -> None:
    """Sets the state of a flow run and of its tasks, if they have not ended or only count as Crashed.

    Does nothing when Prefect does not answer or does not know the run.
    """
    state: State[Any] = State(type=StateType(name.upper()), name=name, message=reason)
    with suppress(httpx.HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(flow_run_id)  # type: ignore[arg-type]  # a text does as well: it goes into a URL
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
        runs: list[tuple[Callable[..., object], FlowRun | TaskRun]] = [
            (client.set_flow_run_state, flow_run),
            *((client.set_task_run_state, task) for task in tasks),
        ]
        for set_state, run in runs:
            if run.state is None or not run.state.is_final() or (run.state.is_crashed() and name != "Crashed"):
                set_state(run.id, state, force=True)


def mark_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A flow's hook: what was stopped by Ctrl-C or a signal is Cancelled, not Crashed."""
    close_flow_run(flow_run.id, "Cancelled", "stopped by Ctrl-C or a signal")


@contextmanager
def tolerate_lost_prefect() -> Iterator[None]:
    """A flow whose MLflow run is FINISHED has succeeded, also when Prefect's server could not be told so.

    What made a flow fail is raised, also when Prefect could not be told that it failed.
    """
    before = mlflow.last_active_run()
    try:
        yield
    except httpx.HTTPError as error:
        run = mlflow.last_active_run()
        is_new = run is not None and (before is None or run.info.run_id != before.info.run_id)
        if run is None or not is_new or run.info.status != "FINISHED":
            raise find_workflow_error(error) or explain_prefect_error(error) from None
        print("Prefect does not answer: its history lacks the end of this run")


def serve_flow(flow: Flow[..., Any], name: str, **options: Any) -> None:
    """What flow.serve() does, until KeyboardInterrupt; SIGTERM raises that too, when the run at hand has been ended.

    Runner.handle_sigterm is replaced because Prefect's own (3.8) never awaits astop(); when it does, flow.serve() does
    all of this.
    """
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    runner = Runner(name, limit=1)

    def stop(*_: object) -> None:
        runner.execute_in_background(runner.astop)

    runner.handle_sigterm = stop  # type: ignore[method-assign]
    try:
        runner.add_flow(flow, name, **options)
        asyncio.run(runner.start())
    except httpx.HTTPError as error:
        raise explain_prefect_error(error) from error
    raise KeyboardInterrupt
