"""Cross-validation: how accurate and calibrated a model is, and whether more images would help.

Each image is predicted by a head that was trained on the other folds (Stone, Cross-Validatory Choice and Assessment of
Statistical Predictions, 1974). Only training and validation images are used. Near-duplicates are held out together and
count once.
"""

from dataclasses import replace
from typing import Any

from workflow.data.features import features_key
from workflow.evaluation import metrics
from workflow.evaluation.calibration import (
    apply_temperature,
    compute_unsure_threshold,
    fit_temperature,
    reliability,
)
from workflow.evaluation.folds import Folds, Plan, make_plan
from workflow.model.feature_set import FeatureSet
from workflow.model.head import fit_heads, predict_heads
from workflow.records import CurvePoint, Evidence, ImageFile, Prediction

import numpy as np

MAX_TRAINED = 500  # images to train on; a larger dataset is sampled, but all its images are predicted
BLOCK = 1000  # images to predict at once


def cross_validate(images: FeatureSet, seed: int, **parameters: Any) -> Evidence:
    """Cross-validate a head.

    Cross-validation is repeated with different folds; the prediction for an image is the mean of its out-of-fold
    predictions. Further heads, fitted in the same call, are trained on fewer images per class, for the learning curve,
    or with whole sessions held out. `parameters` are passed to fit_heads().
    """
    plan = make_plan(images, MAX_TRAINED, seed)
    if plan.repeats:
        sample, all_folds = plan.sample, plan.all_folds
        trained_on = np.concatenate([folds.trained_on for folds in all_folds])[:, sample]
        weights = fit_heads(images.features[sample], images.labels[sample], trained_on, seed=seed, **parameters)
        evidence = build_evidence(images, plan, predict_held_out(weights, images.features, all_folds))
    else:
        evidence = Evidence()
    names = [images.class_names[label] for label in images.labels]
    return replace(
        evidence,
        features_key=features_key(),
        unevaluated=[images.class_names[label] for label in images.unevaluated],
        training_images=dict(zip(images.digests, zip(names, images.groups, strict=True), strict=True)),
    )


def build_evidence(images: FeatureSet, plan: Plan, probabilities: np.ndarray) -> Evidence:
    """Return the results, given the held-out probabilities of shape (cross-validations, images, classes)."""
    labels, repeats = images.labels, len(plan.repeats)
    is_held_out, first_of_group = plan.repeats[0].held_out_in >= 0, images.mark_first()
    is_counted = is_held_out & first_of_group
    raw, is_correct = probabilities[:repeats, is_counted], probabilities.argmax(axis=-1) == labels
    temperature = 1.0 if images.unevaluated else fit_temperature(raw, labels[is_counted])
    calibrated = apply_temperature(probabilities[:repeats], temperature)
    mean = calibrated.mean(axis=0)
    predictions = to_predictions(images, mean, np.flatnonzero(is_held_out))
    total = int(is_counted.sum())
    evidence = Evidence(
        recall=metrics.recall(metrics.one_per_group(predictions)),
        temperature=temperature,
        predictions=predictions,
        sampled=not plan.sample.all(),
        new_session=(int(is_correct[-1][is_counted].sum()), total) if plan.by_session else None,
    )
    if images.unevaluated:
        return evidence
    calibrated, mean, labels = calibrated[:, is_counted], mean[is_counted], labels[is_counted]
    accuracy = float((mean.argmax(axis=1) == labels).mean())
    smaller = slice(repeats, repeats + len(plan.learning_curve))
    accuracies = [*is_correct[smaller, is_counted].mean(axis=1).tolist(), accuracy]
    sizes = np.array([folds.trained_on[:, first_of_group].sum(axis=1).mean() for folds in plan.all_folds])
    sizes /= len(images.class_names)
    curve = zip([*sizes[smaller].tolist(), float(sizes[:repeats].mean())], accuracies, strict=True)
    return replace(
        evidence,
        accuracy=accuracy,
        loss=metrics.cross_entropy(calibrated[..., np.arange(total), labels]),
        before=reliability(raw, labels),
        after=reliability(calibrated, labels),
        curve=[CurvePoint(size, fraction, total) for size, fraction in curve],
        unsure_below=compute_unsure_threshold(mean, labels),
    )


def predict_held_out(weights: np.ndarray, features: np.ndarray, all_folds: list[Folds]) -> np.ndarray:
    """Predict each image with the head of its fold; return probabilities of shape (cross-validations, images, classes).

    `weights` holds the heads of the first cross-validation, then those of the second, and so on.
    """
    starts = np.cumsum([0, *(len(folds.trained_on) for folds in all_folds[:-1])])
    heads = np.stack([np.maximum(folds.held_out_in, 0) for folds in all_folds]) + starts[:, None]
    blocks = []
    for start in range(0, len(features), BLOCK):
        probabilities = predict_heads(weights, features[start : start + BLOCK])
        blocks.append(probabilities[np.arange(len(probabilities)), heads[:, start : start + BLOCK]])
    return np.concatenate(blocks, axis=1)


def to_predictions(images: FeatureSet, probabilities: np.ndarray, rows: np.ndarray) -> list[Prediction]:
    """Return the predictions for the images with these indices, given probabilities (images, classes)."""
    names, predictions = images.class_names, []
    for row in rows.tolist():
        image = ImageFile(images.files[row], names[images.labels[row]], images.digests[row])
        predictions.append(Prediction.from_probabilities(image, names, probabilities[row].tolist(), images.groups[row]))
    return predictions


def to_metrics(evidence: Evidence) -> dict[str, float]:
    """Return the cross-validation results as MLflow metrics, omitting those that could not be measured."""
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
