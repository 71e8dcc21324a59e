"""The photos that a model was trained and tested on, as far as they still exist on this machine."""

from workflow.records import Artifact, DataVersion, RunData
from workflow.tracking.logging import read_artifact

from pydantic import ValidationError


def find_photos(run_id: str) -> DataVersion:
    """Return the data version in a run's evaluation; an empty one if that is missing or unreadable."""
    try:
        return RunData.from_json(read_artifact(run_id, Artifact.EVALUATION) or b"").data
    except ValidationError:
        return DataVersion("", "", [])
