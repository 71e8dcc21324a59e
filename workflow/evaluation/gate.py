"""The gate: whether a candidate becomes the champion, which is the registered version to use."""

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from workflow.evaluation import metrics
from workflow.records import Comparison, Decision, Evidence, Prediction
from workflow.text import printable

ALPHA = 0.05  # significance level; from it on, the models are tied
MIN_GROWTH = 1.1  # a tied candidate with at least so many times the training photos of the champion replaces it


def decide(
    candidate: list[Prediction], comparison: Comparison | None = None, unevaluated: Sequence[str] = ()
) -> Decision:
    """Decide whether the candidate becomes the champion, and why.

    The first candidate has to beat the majority-class baseline. A later one has to be correct on more photos than the
    champion, by more than chance explains (exact test of McNemar, 1947). On a tie, the champion stays, unless the
    candidate has learned from a tenth more photos, or has learned from new photos and has the lower loss. A model of
    synthetic images never replaces one of photos. `python benchmarks/gate.py` compares this with other rules.

    Args:
        candidate: its predictions for photos that it has not learned from
        comparison: of the candidate with the champion; None when there is no champion
        unevaluated: classes with too few independent photos to judge any model
    """
    if comparison is None:
        return decide_first(candidate, unevaluated)
    champion = f"version {comparison.version}, the champion"
    if comparison.synthetic:
        return Decision(False, f"it was trained on the synthetic sample images, and {champion}, on photos")
    if not comparison.candidate:
        return Decision(False, f"there are no photos left to compare it with {champion} on")
    if comparison.champion_training_images is None:
        return decide_on_test_images(comparison)
    if unevaluated:
        names = ", ".join(map(printable, unevaluated))
        return Decision(False, f"too few independent photos of {names} to compare it with {champion}")
    better, worse = count_differences(comparison)
    p, total = mcnemar(better, worse), len(comparison.candidate)
    result = (
        f"{metrics.count_correct(comparison.candidate)[0]} of {total} photos correct; {champion}: "
        f"{metrics.count_correct(comparison.champion)[0]}"
    )
    if p < ALPHA:
        return Decision(better > worse, f"{result} (McNemar's test: p = {p:.2g})")
    tie = f"{result}; the difference may be chance (McNemar's test: p = {p:.2g})"
    if comparison.training_images >= MIN_GROWTH * comparison.champion_training_images:
        photos = f"{comparison.training_images} photos instead of {comparison.champion_training_images}"
        return Decision(True, f"{tie}, but it has learned from {photos}")
    if comparison.new_images:
        own, others = (metrics.summarize(one).loss for one in (comparison.candidate, comparison.champion))
        losses = f"loss {own:.3g}, the champion's {others:.3g}"
        return Decision(own < others, f"{tie}; with {comparison.new_images} new photos, {losses}")
    return Decision(False, f"{tie}, so the champion stays")


def decide_first(candidate: list[Prediction], unevaluated: Sequence[str]) -> Decision:
    """Decide on the first candidate.

    It has to beat the majority-class baseline, unless a class has too few photos to evaluate any model.
    """
    if unevaluated:
        names = ", ".join(map(printable, unevaluated))
        return Decision(True, f"there is no champion yet; too few independent photos of {names} to say how good it is")
    counted = metrics.one_per_group(candidate)
    labels = Counter(one.class_name for one in counted)
    correct, baseline, total = sum(one.correct for one in counted), max(labels.values(), default=0), len(counted)
    return Decision(
        correct > baseline,
        f"{correct} of {total} photos correct; majority-class baseline: {baseline} of {total}",
    )


def decide_on_test_images(comparison: Comparison) -> Decision:
    """Decide by accuracy, then by loss: for a champion of an earlier release, which was judged by test images alone."""
    candidate, champion = map(metrics.summarize, (comparison.candidate, comparison.champion))
    reason = (
        f"accuracy {candidate.accuracy:.2f} on {len(comparison.candidate)} test images, loss {candidate.loss:.3g}; "
        f"version {comparison.version}, the champion: {champion.accuracy:.2f}, {champion.loss:.3g}"
    )
    return Decision((candidate.accuracy, -candidate.loss) > (champion.accuracy, -champion.loss), reason)


def count_differences(comparison: Comparison) -> tuple[int, int]:
    """Return how many photos only the candidate classifies correctly, and how many only the champion."""
    pairs = list(zip(comparison.candidate, comparison.champion, strict=True))
    return sum(a.correct > b.correct for a, b in pairs), sum(a.correct < b.correct for a, b in pairs)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947) for these discordant pairs."""
    total, extreme = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(extreme + 1)) / 2**total)


def decide_now(decision: Decision, version: str, compared_with: str | None, current: str | None) -> Decision:
    """Return the decision, unless the champion has changed since the comparison.

    `version` is the candidate's registered version, `compared_with` the champion of then, and `current` that of now.
    """
    if current == version:
        return Decision(True, "it was promoted before its run was interrupted")
    if decision.promoted and current != compared_with:
        return Decision(False, "another run has changed the champion; run again to compare with that one")
    return decision


def format_run_name(version: str, decision: Decision, accuracy: float, evidence: Evidence | None) -> str:
    """Return the result of a run in so few words that MLflow's list of runs shows them: v3 promoted: 0.95, cv 0.93."""
    title = f"v{version}{' promoted' if decision.promoted else ''}: {accuracy:.2f}"
    return title + (f", cv {evidence.accuracy:.2f}" if evidence and evidence.accuracy is not None else "")


def describe(name: str, version: str, decision: Decision) -> str:
    """Return the decision on a registered version in a sentence that stays true when another version is promoted."""
    result = f"was promoted to champion on {datetime.now(UTC):%Y-%m-%d}" if decision.promoted else "was not promoted"
    return f"{name} version {version} {result}: {decision.reason}"
