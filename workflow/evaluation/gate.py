"""The promotion gate: decide whether a candidate replaces the champion, the registered version to use."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from workflow.evaluation import metrics
from workflow.records import Comparison, Decision, Evidence, Prediction

ALPHA = 0.05  # significance level; with a p-value at or above it, the models are tied
MIN_DIFFERENCE = 0.05  # in accuracy; for equally accurate models, the text says how many photos would reveal it
MIN_GROWTH = 1.1  # a tied candidate trained on this many times as many photos replaces the champion


def decide(
    candidate: list[Prediction], comparison: Comparison | None = None, unevaluated: Sequence[str] = ()
) -> Decision:
    """Decide whether the candidate becomes the champion.

    The rules are applied in order, and the first that returns a decision wins; if none does, the champion stays. To
    change the policy, add or edit a rule. `python benchmarks/gate.py` compares this policy with that of version 1.0.

    Args:
        candidate: predictions of the candidate for photos that it was not trained on
        comparison: comparison with the champion; None if there is no champion
        unevaluated: classes with too few independent photos to evaluate any model
    """
    if comparison is None:
        return decide_without_champion(candidate, unevaluated)
    if comparison.champion_synthetic:
        first = decide_without_champion(candidate, unevaluated)
        origin = f"{describe_champion(comparison)}, was trained on the synthetic sample images"
        return replace(first, reason=f"{first.reason}; {origin}")
    if obstacle := find_obstacle(comparison, unevaluated):
        return Decision(False, obstacle)
    for rule in (decide_by_test_images, decide_by_accuracy, decide_by_training_images, decide_by_loss):
        if decision := rule(comparison):
            return decision
    return Decision(False, f"{describe_tie(comparison)}, so the champion stays")


def decide_without_champion(candidate: list[Prediction], unevaluated: Sequence[str]) -> Decision:
    """Promote a first candidate that beats the majority-class baseline, or that cannot be evaluated."""
    if unevaluated:
        names = metrics.join_names(unevaluated)
        return Decision(True, f"no earlier model to keep; too few independent photos of {names} to measure accuracy")
    labels = Counter(prediction.class_name for prediction in metrics.one_per_group(candidate))
    (correct, total), baseline = metrics.count_correct(candidate), max(labels.values(), default=0)
    photos = f"{correct} of {total} photos{metrics.describe_duplicates(candidate)}"
    reason = f"{photos} correct; majority-class baseline: {baseline} of {total}"
    return Decision(correct > baseline, reason)


def find_obstacle(comparison: Comparison, unevaluated: Sequence[str]) -> str:
    """Return the reason why the candidate cannot be compared with the champion; "" if it can."""
    champion = describe_champion(comparison)
    if comparison.synthetic:
        return f"it was trained on the synthetic sample images, but {champion}, was trained on photos"
    if has_other_task(comparison):
        return (
            f"its photos have nothing in common with those of {champion}: none is shared, and "
            f"{sum(comparison.unknown)} of {len(comparison.unknown)} are unknown to it. Repeat the run with --name: "
            "a new name if this is a new task, or the name of this model if it is the same task"
        )
    if not comparison.candidate:
        return f"there are no photos for a fair comparison with {champion}"
    if unevaluated and comparison.champion_training_images is not None:
        names = metrics.join_names(unevaluated)
        return f"too few independent photos of {names} for a comparison with {champion}"
    return ""


def has_other_task(comparison: Comparison) -> bool:
    """Return whether the champion has a different task: the runs share no photos, and most are unknown to it."""
    if comparison.same_task or comparison.shared_images != 0:
        return False
    return sum(comparison.unknown) > len(comparison.unknown) / 2


def decide_by_test_images(comparison: Comparison) -> Decision | None:
    """Decide by accuracy, then by loss, on the test images only, if the champion is from an earlier release."""
    if comparison.champion_training_images is not None:
        return None
    candidate, champion = map(metrics.summarize, (comparison.candidate, comparison.champion))
    reason = (
        f"accuracy {candidate.accuracy:.2f} on {len(comparison.candidate)} test photos, loss {candidate.loss:.3g}; "
        f"{describe_champion(comparison)}: {champion.accuracy:.2f}, {champion.loss:.3g}"
    )
    return Decision((candidate.accuracy, -candidate.loss) > (champion.accuracy, -champion.loss), reason)


def decide_by_accuracy(comparison: Comparison) -> Decision | None:
    """Choose the more accurate model if the difference is significant."""
    better, worse = count_differences(comparison)
    p = mcnemar(better, worse)
    if p >= ALPHA:
        return None
    return Decision(better > worse, f"{describe_accuracy(comparison)} (McNemar's test: p = {p:.2g})")


def decide_by_training_images(comparison: Comparison) -> Decision | None:
    """Promote a tied candidate that was trained on MIN_GROWTH times as many photos."""
    count, champion_count = comparison.training_images, comparison.champion_training_images
    if champion_count is None or count < MIN_GROWTH * champion_count:
        return None
    tie = describe_tie(comparison)
    return Decision(True, f"{tie}, but it was trained on {count} photos, the champion on {champion_count}")


def decide_by_loss(comparison: Comparison) -> Decision | None:
    """Promote a tied candidate that was trained on new photos if its loss is lower."""
    if not comparison.new_images:
        return None
    candidate, champion = map(metrics.summarize, (comparison.candidate, comparison.champion))
    losses = f"loss {candidate.loss:.3g}, the champion's {champion.loss:.3g}"
    reason = f"{describe_tie(comparison)}; with {comparison.new_images} new photos, {losses}"
    return Decision(candidate.loss < champion.loss, reason)


def describe_champion(comparison: Comparison) -> str:
    return f"version {comparison.version}, the champion"


def describe_accuracy(comparison: Comparison) -> str:
    """Return how many photos each model classifies correctly."""
    (correct, total), (champion_correct, _) = map(metrics.count_correct, (comparison.candidate, comparison.champion))
    return f"{correct} of {total} photos correct; {describe_champion(comparison)}: {champion_correct}"


def describe_tie(comparison: Comparison) -> str:
    """Return the accuracies and the p-value of their difference, as text."""
    p = mcnemar(*count_differences(comparison))
    return f"{describe_accuracy(comparison)}; the difference may be due to chance (McNemar's test: p = {p:.2g})"


def describe_differences(comparison: Comparison, name: str, other: str) -> str:
    """Return whether the difference between two models is significant, and if not, how many photos would be needed.

    Args:
        comparison: has predictions by both models for at least one photo
        name: of the model whose predictions are `comparison.candidate`
        other: name of the other model
    """
    (better, worse), total = count_differences(comparison), len(comparison.candidate)
    if better == worse:
        correct, required = metrics.count_correct(comparison.candidate)[0], metrics.required_images(MIN_DIFFERENCE, 0)
        detect = f"It takes at least {required} photos to detect a difference in accuracy of {MIN_DIFFERENCE:.0%}."
        return f"Both {name} and {other} classify {correct} of {total} photos correctly. {detect}"
    result, p = f"Photos that only {name} classifies correctly: {better}; only {other}: {worse}", mcnemar(better, worse)
    if p < ALPHA:
        return f"{result}. The difference is significant (McNemar's test: p = {p:.2g})."
    required = metrics.required_images(max(better, worse) / total, min(better, worse) / total)
    chance = f"The difference may be due to chance (McNemar's test: p = {p:.2g})"
    return f"{result}. {chance}. At these rates, {required} photos would show which is better."


def count_differences(comparison: Comparison) -> tuple[int, int]:
    """Return how many photos only the candidate classifies correctly, and how many only the champion does."""
    pairs = list(zip(comparison.candidate, comparison.champion, strict=True))
    return sum(a.correct > b.correct for a, b in pairs), sum(a.correct < b.correct for a, b in pairs)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947), given the numbers of discordant pairs."""
    total, extreme = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(extreme + 1)) / 2**total)


def confirm(decision: Decision, compared_version: str | None, champion_version: str | None) -> Decision:
    """Return the decision, unless the champion has changed since the comparison.

    Args:
        decision: returned by decide()
        compared_version: the champion at the time of the comparison; None without a champion
        champion_version: the current champion
    """
    if decision.promoted and champion_version != compared_version:
        return Decision(False, "another run has since changed the champion; repeat the run to compare with the new one")
    return decision


def format_run_name(version: str, decision: Decision, accuracy: float, evidence: Evidence | None) -> str:
    """Return the result of a run for MLflow's list of runs, such as "v3 promoted: 0.95, cv 0.93"."""
    title = f"v{version}{' promoted' if decision.promoted else ''}: {accuracy:.2f}"
    return title + (f", cv {evidence.accuracy:.2f}" if evidence and evidence.accuracy is not None else "")


def describe(name: str, version: str, decision: Decision) -> str:
    """Return a sentence with the decision on a registered version; it stays true when a later version is promoted."""
    result = f"was promoted to champion on {datetime.now(UTC):%Y-%m-%d}" if decision.promoted else "was not promoted"
    return f"{name} version {version} {result}: {decision.reason}"
