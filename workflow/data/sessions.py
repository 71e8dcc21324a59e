"""Group photos by session: a session consists of the photos that one camera took within minutes of each other.

Photos from one session often show the same object, lighting and background. A model trained on some of them classifies
the others more easily than new photos, so cross-validation also measures the accuracy with whole sessions held out.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from workflow.data.exif import NO_TIME, Capture
from workflow.data.near_duplicates import find_representatives
from workflow.files import sha256

SESSION_GAP_SECONDS = 600  # a longer pause between two photos from one camera starts a new session


def assign_sessions(captures: Mapping[str, Capture]) -> dict[str, str]:
    """Return the session of each photo with a known camera and time, by its digest.

    A session may contain several classes. Its name depends only on its camera and its first photo.
    """
    by_camera: dict[str, list[tuple[int, str]]] = {}
    for digest, (camera, time) in captures.items():
        if camera and time != NO_TIME:
            by_camera.setdefault(camera, []).append((time, digest))
    sessions = {}
    for camera, photos in by_camera.items():
        session, earlier = "", float("-inf")
        for time, digest in sorted(photos):
            if time - earlier > SESSION_GAP_SECONDS:
                session = f"session-{sha256([camera, time])[:16]}"
            sessions[digest], earlier = session, time
    return sessions


def group_by_session(
    digests: Iterable[str], duplicate_of: Mapping[str, str], sessions: Mapping[str, str]
) -> dict[str, str]:
    """Return the group of each photo for session-wise cross-validation.

    The photos of a session form a group, and so do near-duplicates; groups that share a photo are merged. Without
    sessions, a group is a photo with its near-duplicates.

    Args:
        digests: digests of all photos
        duplicate_of: maps the digest of each near-duplicate to that of its representative
        sessions: session of each photo that has one, from assign_sessions()

    Returns:
        The group of each photo by its digest; the name of a group is the smallest digest of its representatives.
    """
    representatives = {digest: duplicate_of.get(digest, digest) for digest in digests}
    first: dict[str, str] = {}  # by session
    pairs = [
        (first.setdefault(sessions[digest], representative), representative)
        for digest, representative in representatives.items()
        if digest in sessions
    ]
    groups = find_representatives(pairs, {digest: digest for digest in representatives.values()})
    return {digest: groups[representative] for digest, representative in representatives.items()}


def describe_sessions(captures: Mapping[str, Capture], sessions: Mapping[str, str]) -> dict[str, str]:
    """Return a unique description of the session of each photo: the camera and the start time."""
    starts: dict[str, int] = {}
    for digest, session in sessions.items():
        starts[session] = min(captures[digest].time, starts.get(session, captures[digest].time))
    return {
        digest: f"{captures[digest].camera} at {datetime.fromtimestamp(starts[session], UTC):%Y-%m-%d %H:%M}"
        for digest, session in sessions.items()
    }
