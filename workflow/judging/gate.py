"""The gate: whether a candidate becomes the champion, which is the registered version to use."""

from collections import Counter

from workflow.names import printable
from workflow.records import Decision, Evidence, Results


def decide(candidate: Results, champion: Results | None) -> Decision:
    """Whether the candidate becomes the champion, and why; both have results on the same test images.

    The first candidate has to beat always guessing one class. A later one has to beat the champion: by accuracy, or by
    loss at the same accuracy. A model of drawn images never replaces one of photos: on the drawn test images it is the
    better one, and of no use for photos.
    """
    labels = Counter(one.class_name for one in candidate.predictions)
    total = labels.total()
    if champion is None:
        guess, count = labels.most_common(1)[0]
        return Decision(
            candidate.accuracy > count / total,
            f"accuracy {candidate.accuracy:.2f} on {total} test images, "
            f"always guessing {printable(guess)} gets {count / total:.2f}",
        )
    if candidate.drawn and not champion.drawn:
        reason = f"it has learned from the drawn sample images, version {champion.version}, the champion, from photos"
        return Decision(False, reason)
    told = f"accuracy {candidate.accuracy:.2f} on {total} test images, "
    if candidate.accuracy == champion.accuracy:
        own, others = f"{candidate.loss:.3g}", f"{champion.loss:.3g}"
        losses = f"loss {own}, where that version has {others}" if own != others else f"the loss of both is {own}"
        told += f"the same as version {champion.version}, the champion so far; {losses}"
    else:
        told += f"where version {champion.version}, the champion so far, has {champion.accuracy:.2f}"
    return Decision((candidate.accuracy, -candidate.loss) > (champion.accuracy, -champion.loss), told)


def decide_now(candidate: Results, champion: Results | None, version: str, current: str | None) -> Decision:
    """What decide() says, unless the champion has changed since it was evaluated.

    `version` is the candidate's registered version; `current` is the version that is the champion now.
    """
    if current == version:
        return Decision(True, "it was promoted before its run was interrupted")
    decision = decide(candidate, champion)
    if decision.promoted and current != (champion and champion.version):
        reason = "another run changed the champion meanwhile; run again to compare with that one"
        return Decision(False, reason)
    return decision


def entitle(version: str, decision: Decision, results: Results, evidence: Evidence | None) -> str:
    """The result of a run in so few words that MLflow's list of runs shows them: v3 champion: 0.95, cv 0.93."""
    told = f"v{version}{' champion' if decision.promoted else ''}: {results.accuracy:.2f}"
    return told + (f", cv {evidence.accuracy:.2f}" if evidence else "")


def describe(name: str, version: str, decision: Decision) -> str:
    """The decision on a registered version, in a sentence."""
    return f"{name} version {version} {'is' if decision.promoted else 'is not'} the champion: {decision.reason}"
