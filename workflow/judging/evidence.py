"""Evidence from few images: how good a model is, whether more images would help, and how sure it may be.

All of it comes from cross-validation over the training and validation images; the test images are never touched.
"""

from typing import Any, NamedTuple

from workflow.images.datasets import ImageDataset
from workflow.judging import cross_validation, evaluation
from workflow.judging.registry import metric_name
from workflow.model.sampling import choose, take
from workflow.records import Bin, Calibration, CurvePoint, Evidence, Prediction

import numpy as np

MOST_TRAINED = 500  # images that heads are trained on, drawn by seed; all other images are answered as well
FEW = 100  # up to so many images there are more folds and repeats, because each answer counts more
BLOCK = 1000  # images that are answered at once
TEMPERATURES = np.geomspace(0.1, 10, 101)  # among which the best is chosen


def cross_validate(train: ImageDataset, validation: ImageDataset, parameters: dict[str, Any]) -> Evidence:
    """What cross-validation over both datasets says of a head with these parameters; see assess()."""
    assert train.features is not None  # the small network, which has no features, is not cross-validated
    features = np.concatenate([train.features, validation.features])
    labels = np.concatenate([train.labels, validation.labels])
    groups, files = train.groups + validation.groups, train.file_names + validation.file_names
    return assess(features, labels, groups, train.class_names, files, **parameters)


def assess(
    features: np.ndarray,
    labels: np.ndarray,
    groups: list[str],
    class_names: list[str],
    files: list[str],
    **parameters: Any,
) -> Evidence:
    """What cross-validation says of a head with these parameters: evidence that needs no test image.

    Images of one of the `groups`, near-duplicates, are always held out together.

    The folds are drawn several times, and an image's answer is the mean of the answers of all heads that have not been
    trained on it. At the same time heads are trained on fewer images per class, for the learning curve. `parameters`
    are those of cross_validation.train_heads().
    """
    plan = plan_heads(labels, groups, parameters["seed"])
    chosen, trained_on = plan.chosen, np.stack([*plan.whole, *plan.parts])[:, plan.chosen]
    model = cross_validation.train_heads(features[chosen], labels[chosen], trained_on, **parameters)
    answers, right = answer_held_out(model, features, labels, plan.held_out_in, plan.folds, len(plan.per_class))
    temperature = fit_temperature(answers, labels)
    softened = soften(answers, temperature)
    predictions = []
    for file, label, row in zip(files, labels, softened.mean(axis=0), strict=True):
        probabilities = dict(zip(class_names, row.tolist(), strict=True))
        predictions.append(
            Prediction(file, class_names[label], class_names[row.argmax()], float(row.max()), probabilities)
        )
    accuracy = evaluation.count_right(predictions) / len(predictions)
    points: list[tuple[float, float]] = [*zip(plan.per_class, right.mean(axis=1).tolist(), strict=True)]
    points.append((float(np.mean([mask.sum() for mask in plan.whole]) / len(class_names)), accuracy))
    return Evidence(
        accuracy=accuracy,
        loss=cross_entropy(softened, labels),
        recall=evaluation.recall(predictions),
        temperature=temperature,
        before=reliability(answers, labels),
        after=reliability(softened, labels),
        curve=[CurvePoint(images_per_class, share, len(labels)) for images_per_class, share in points],
        predictions=predictions,
    )


class Plan(NamedTuple):
    """Which heads are trained, and on what.

    Attributes:
        chosen: true for the images that heads are trained on, shape (images,)
        folds: how many there are in each repeat
        held_out_in: the fold of each image in each repeat, shape (repeats, images)
        whole: for each fold in each repeat, true for the images that its head is trained on
        per_class: images per class, for the learning curve
        parts: the same as whole, for each of these numbers and each fold of the first repeat
    """

    chosen: np.ndarray
    folds: int
    held_out_in: np.ndarray
    whole: list[np.ndarray]
    per_class: list[int]
    parts: list[np.ndarray]


def plan_heads(labels: np.ndarray, groups: list[str], seed: int) -> Plan:
    """The plan for images with these labels and groups of near-duplicates."""
    draw = np.random.default_rng(seed)
    chosen = choose(labels, MOST_TRAINED, draw)
    fewest = np.bincount(labels[chosen]).min()
    folds, repeats = (min(10, fewest), 5) if len(labels) <= FEW else (min(5, fewest), 2)
    held_out_in = np.stack(
        [assign_all_folds(labels, groups, chosen, folds, seed + repeat) for repeat in range(repeats)]
    )
    whole = [chosen & (held_out_in[repeat] != fold) for repeat in range(repeats) for fold in range(folds)]
    per_class = [2**power for power in range(1, 20) if 2**power <= fewest - -(-fewest // folds)]
    parts = [take(mask, labels, count, draw) for count in per_class for mask in whole[:folds]]
    return Plan(chosen, folds, held_out_in, whole, per_class, parts)


def assign_all_folds(labels: np.ndarray, groups: list[str], chosen: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold that holds out each image; heads are trained on the chosen ones alone.

    An image that is not chosen has the fold of the chosen images of its group, so that no head that has seen one of
    these answers for it. Without such images any fold will do.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    fold_of_group = np.full(numbers.max() + 1, -1)
    fold_of_group[numbers[chosen]] = cross_validation.assign_folds(labels[chosen], folds, seed, numbers[chosen])
    held_out_in = fold_of_group[numbers]
    return np.where(held_out_in < 0, np.arange(len(labels)) % folds, held_out_in)


def answer_held_out(
    model: Any, features: np.ndarray, labels: np.ndarray, held_out_in: np.ndarray, folds: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The answers of heads to the images that they have not seen, and for each of the `parts` which are right.

    The model's heads are one for each fold in each repeat, then one for each fold of each part. `held_out_in`
    (repeats, images) has the fold of each image. The answers have shape (repeats, images, classes), what is right has
    shape (parts, images).
    """
    answers, repeats, right = [], len(held_out_in), np.zeros((parts, len(labels)), bool)
    for start in range(0, len(labels), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(labels)))
        found = model(features[rows], training=False).numpy()
        heads = held_out_in[:, rows] + folds * np.arange(repeats)[:, None]
        answers.append(found[np.arange(len(rows)), heads])
        for part in range(parts):
            of_part = found[np.arange(len(rows)), folds * (repeats + part) + held_out_in[0, rows]]
            right[part, rows] = of_part.argmax(axis=1) == labels[rows]
    return np.concatenate(answers, axis=1), right


def metrics(found: Evidence) -> dict[str, float]:
    """The evidence as metrics for MLflow."""
    low, high = evaluation.interval(evaluation.count_right(found.predictions), len(found.predictions))
    told = {"cv_accuracy": found.accuracy, "cv_loss": found.loss, "temperature": found.temperature}
    told |= {"cv_accuracy_low": low, "cv_accuracy_high": high}
    told |= {"cv_calibration_error_before": found.before.error, "cv_calibration_error_after": found.after.error}
    return told | {f"cv_recall_{metric_name(name)}": share for name, share in found.recall.items()}


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities (..., classes) that the same logits give when they are divided by a temperature."""
    powers = np.maximum(probabilities, 1e-12) ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean of -log of each image's probability of its class; `probabilities` is (repeats, images, classes)."""
    own = probabilities[:, np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, evaluation.LEAST)).mean())


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the lowest cross-entropy (Guo et al., On Calibration of Modern Neural Networks, 2017).

    It is expected to be near 1: its logarithm has a normal prior of variance 1/2. Else a few answers that are all right
    would make the model sure of everything.
    """

    def loss(temperature: float) -> float:
        softened = soften(probabilities, temperature)
        return len(labels) * cross_entropy(softened, labels) + np.log(temperature) ** 2

    return float(min(TEMPERATURES, key=loss))


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> Calibration:
    """The expected calibration error in ten bins, and the bins that are not empty.

    `probabilities` is (repeats, images, classes). The source is that of fit_temperature().
    """
    sure, right = probabilities.max(axis=-1).ravel(), (probabilities.argmax(axis=-1) == labels).ravel()
    numbers = np.minimum((10 * sure).astype(int), 9)
    bins = [
        Bin(float(sure[mask].mean()), float(right[mask].mean()), float(mask.mean()))
        for mask in (numbers == number for number in range(10))
        if mask.any()
    ]
    return Calibration(sum(one.share * abs(one.probability - one.right) for one in bins), bins)
