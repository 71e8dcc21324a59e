"""Evidence from few images: how good a model is, whether more images would help, and how sure it may be.

All of it comes from cross-validation over the training and validation images; the test images are never touched.
Near-duplicates are held out together, and every number counts them once.
"""

from dataclasses import replace
from typing import Any

from workflow.evaluation import folds, metrics
from workflow.evaluation.calibration import (
    apply_temperature,
    cross_entropy,
    find_unsure_below,
    fit_temperature,
    reliability,
)
from workflow.evaluation.cross_validation import train_heads
from workflow.evaluation.folds import Round
from workflow.model.feature_set import FeatureSet
from workflow.records import CurvePoint, Evidence, ImageFile, Prediction

import numpy as np

MAX_TRAINED = 500  # images that heads are trained on, drawn by seed; all other images are predicted as well
BLOCK = 1000  # images that are predicted at once


def cross_validate(images: FeatureSet, **parameters: Any) -> Evidence:
    """Return what cross-validation says of a head: evidence that needs no test image.

    Cross-validation is repeated with different folds; an image's prediction is the mean of its out-of-fold predictions.
    At the same time heads are trained on fewer images per class, for the learning curve, and with whole sessions held
    out. `parameters` are those of train_heads().
    """
    classes = [images.class_names[label] for label in images.labels]
    training_images = dict(zip(images.digests, zip(classes, images.groups, strict=True), strict=True))
    plan = folds.make_plan(images, MAX_TRAINED, parameters["seed"])
    unevaluated = [images.class_names[label] for label in plan.unevaluated]
    if not plan.repeats:
        return Evidence(unevaluated=unevaluated, training_images=training_images)
    trained_on = np.concatenate([one.trained_on for one in plan.all_rounds])[:, plan.chosen]
    model = train_heads(images.features[plan.chosen], images.labels[plan.chosen], trained_on, **parameters)
    probabilities = predict_held_out(model, images.features, plan.all_rounds)
    evidence = build_evidence(images, plan, probabilities)
    return replace(evidence, unevaluated=unevaluated, sampled=not plan.chosen.all(), training_images=training_images)


def build_evidence(images: FeatureSet, plan: folds.Plan, probabilities: np.ndarray) -> Evidence:
    """Return the evidence from the held-out probabilities, of shape (rounds, images, classes)."""
    labels, repeats = images.labels, len(plan.repeats)
    judged, first_of_group = plan.repeats[0].held_out_in >= 0, images.mark_first()
    counted = judged & first_of_group
    raw, correct = probabilities[:repeats], probabilities.argmax(axis=-1) == labels
    temperature = 1.0 if plan.unevaluated else fit_temperature(raw[:, counted], labels[counted])
    calibrated = apply_temperature(raw, temperature)
    mean = calibrated.mean(axis=0)
    predictions = to_predictions(images, mean, np.flatnonzero(judged))
    evidence = Evidence(
        recall=metrics.recall(metrics.one_per_group(predictions)),
        temperature=temperature,
        predictions=predictions,
        new_session=(int(correct[-1][counted].sum()), int(counted.sum())) if plan.by_session else None,
    )
    if plan.unevaluated:
        return evidence
    accuracy = float((mean.argmax(axis=1) == labels)[counted].mean())
    curve = [*correct[repeats : repeats + len(plan.parts)][:, counted].mean(axis=1).tolist(), accuracy]
    sizes = [one.trained_on[:, first_of_group].sum(axis=1).mean() for one in plan.repeats]
    per_class = [*plan.per_class, float(np.mean(sizes)) / len(images.class_names)]
    return replace(
        evidence,
        accuracy=accuracy,
        loss=cross_entropy(calibrated[:, counted], labels[counted]),
        before=reliability(raw[:, counted], labels[counted]),
        after=reliability(calibrated[:, counted], labels[counted]),
        curve=[
            CurvePoint(count, fraction, int(counted.sum())) for count, fraction in zip(per_class, curve, strict=True)
        ],
        unsure_below=find_unsure_below(mean[counted], labels[counted]),
    )


def predict_held_out(model: Any, features: np.ndarray, all_rounds: list[Round]) -> np.ndarray:
    """Return the probabilities of shape (rounds, images, classes): each image is predicted by the head of its fold.

    The model's heads are those of the first round, then those of the second, and so on.
    """
    starts = np.cumsum([0, *(len(one.trained_on) for one in all_rounds[:-1])])
    heads = np.stack([np.maximum(one.held_out_in, 0) for one in all_rounds]) + starts[:, None]
    blocks = []
    for start in range(0, len(features), BLOCK):
        probabilities = model(features[start : start + BLOCK], training=False).numpy()
        blocks.append(probabilities[np.arange(len(probabilities)), heads[:, start : start + BLOCK]])
    return np.concatenate(blocks, axis=1)


def to_predictions(images: FeatureSet, probabilities: np.ndarray, rows: np.ndarray) -> list[Prediction]:
    """Return the predictions of the images with these numbers, from probabilities of shape (images, classes)."""
    names, predictions = images.class_names, []
    for row in rows.tolist():
        image = ImageFile(images.files[row], names[images.labels[row]], images.digests[row])
        predictions.append(Prediction.from_probabilities(image, names, probabilities[row].tolist(), images.groups[row]))
    return predictions


def to_metrics(evidence: Evidence) -> dict[str, float]:
    """Return the evidence as metrics for MLflow; what could not be measured is not among them."""
    values: dict[str, float | None] = {"temperature": evidence.temperature, "unsure_below": evidence.unsure_below}
    if evidence.accuracy is not None and evidence.before and evidence.after:
        low, high = metrics.confidence_interval(*metrics.count_correct(evidence.predictions))
        values |= {"cv_accuracy": evidence.accuracy, "cv_loss": evidence.loss}
        values |= {"cv_accuracy_low": low, "cv_accuracy_high": high}
        values |= {"cv_calibration_error_before": evidence.before.error}
        values |= {"cv_calibration_error_after": evidence.after.error}
    if evidence.new_session:
        values["cv_accuracy_new_session"] = evidence.new_session[0] / evidence.new_session[1]
    values |= {f"cv_recall_{metrics.metric_name(name)}": fraction for name, fraction in evidence.recall.items()}
    return {name: value for name, value in values.items() if value is not None}
