"""Candidate and champion on the same photos, none of which either of them has learned from.

The candidate's predictions are those for the test images and, for all others, those that cross-validation made out of
fold. The champion's are its own stored out-of-fold predictions for the photos that it has learned from, and its answers
for the others. Near-duplicates count once.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from workflow.images.datasets import ImageDataset
from workflow.judging import evaluation
from workflow.model.sampling import choose
from workflow.records import Comparison, DataVersion, Evidence, Prediction, Results

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from pydantic import ValidationError

MAX_COMPARED = 1000  # photos, drawn by class and seed
PROBES = 8  # photos that the champion's packaged code answers, before its head alone answers from cached features
TOLERANCE = 1e-3  # between the probabilities of the two


def collect_predictions(results: Results, evidence: Evidence | None) -> list[Prediction]:
    """Return the predictions of a model for all photos that it has not learned from, as if each were new.

    These are those for the test images, without near-duplicates of photos that it has learned from, and its
    out-of-fold ones. Where cross-validation trained on a sample only, these are too weak to stand for the model.
    """
    if evidence is None:
        return results.predictions
    groups = {group for _, group in evidence.learned.values()}
    test = [one for one in results.predictions if one.group not in groups]
    return test + ([] if evidence.sampled else evidence.predictions)


def read_evidence(run_id: str) -> Evidence | None:
    """Return the evidence that a run has stored; None for one without it, or without digests."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="cross_validation.json", dst_path=folder
            )
            evidence = Evidence.read(Path(path))
        except (MlflowException, OSError, ValidationError):
            return None
    return evidence if evidence.learned else None


def compare(
    predictions: list[Prediction],
    own: Evidence | None,
    test: ImageDataset,
    champion: PyFuncModel,
    version: str,
    run_id: str,
) -> Comparison:
    """Return the comparison of a candidate with the champion.

    Args:
        predictions: the candidate's, of collect_predictions()
        own: the candidate's evidence
        test: the test dataset, whose data version has all photos
        champion: the loaded model
        version: its registered version
        run_id: of the MLflow run that trained it

    Raises:
        WorkflowError: a photo cannot be read, or has changed
    """
    stored = read_evidence(run_id)
    if stored is None:  # a version of an earlier release, or one without a backbone
        predictions = [one for one in predictions if one.file in set(test.file_names)]
        answers = evaluation.predict_files(champion, test.data, [one.file for one in predictions])
        return Comparison(version, predictions, answers)
    return pair(predictions, own, stored, test.data, test.seed, version, lambda files: answer(champion, test, files))


def pair(
    predictions: list[Prediction],
    own: Evidence | None,
    stored: Evidence,
    data: DataVersion,
    seed: int,
    version: str,
    ask: Callable[[list[str]], list[Prediction]],
) -> Comparison:
    """Return the comparison on the photos of which neither model has learned from a near-duplicate.

    Args:
        predictions: the candidate's
        own: the candidate's evidence; None without a backbone
        stored: the champion's evidence
        data: the data version that the candidate was trained on
        seed: draws MAX_COMPARED of more photos
        version: the champion's registered version
        ask: returns the champion's predictions for image files that it has not learned from
    """
    learned = {image.digest for image in data.files if image.digest in stored.learned}
    groups = {data.leaders.get(digest, digest) for digest in learned}
    out_of_fold = {} if stored.sampled else {one.digest: one for one in stored.predictions}
    independent = [
        one
        for one in evaluation.one_per_group(sorted(predictions, key=lambda one: one.digest not in out_of_fold))
        if one.digest in out_of_fold or (one.digest not in learned and one.group not in groups)
    ]
    pairs = draw(independent, seed)
    answers = {one.digest: one for one in ask([one.file for one in pairs if one.digest not in out_of_fold])}
    others = [
        replace(out_of_fold.get(one.digest) or answers[one.digest], file=one.file, class_name=one.class_name)
        for one in pairs
    ]
    candidate = own.learned if own else {}
    known = {group for digest, (name, group) in candidate.items() if stored.learned.get(digest, ("",))[0] == name}
    return Comparison(
        version,
        pairs,
        others,
        len({group for _, group in candidate.values()}),
        len({group for _, group in stored.learned.values()}),
        len({group for _, group in candidate.values()} - known),
    )


def draw(predictions: list[Prediction], seed: int) -> list[Prediction]:
    """Return at most MAX_COMPARED of the predictions, of each class the same fraction."""
    if not predictions:
        return []
    labels = np.unique([one.class_name for one in predictions], return_inverse=True)[1]
    drawn = choose(labels, MAX_COMPARED, np.random.default_rng(seed))
    return [one for one, is_drawn in zip(predictions, drawn, strict=True) if is_drawn]


def answer(champion: PyFuncModel, test: ImageDataset, files: list[str]) -> list[Prediction]:
    """Return the champion's predictions for image files, as served.

    The first PROBES are answered by its packaged code. If its head gives the same probabilities from the cached
    features of these, it answers the others from their features, which saves the backbone.
    """
    probes = evaluation.predict_files(champion, test.data, files[:PROBES])
    rest = files[PROBES:]
    if not rest:
        return probes
    images = {image.file: image for image in test.data.files}
    classifier, names = champion.unwrap_python_model(), getattr(champion, "model_config", {})["class_names"]
    backbone, *head = classifier.model.layers
    if test.features is None or backbone.name != "backbone":
        return probes + evaluation.predict_files(champion, test.data, rest)
    probabilities = np.stack([np.asarray(test.inputs[images[file].digest]) for file in files])
    for layer in head:
        probabilities = layer(probabilities, training=False)
    rows = [dict(zip(names, row, strict=True)) for row in np.asarray(probabilities).tolist()]
    pairs = zip(probes, rows, strict=False)
    differences = [abs(one.probabilities.get(name, 1) - row[name]) for one, row in pairs for name in row]
    if max(differences) > TOLERANCE:
        return probes + evaluation.predict_files(champion, test.data, rest)
    for file, row in zip(rest, rows[PROBES:], strict=True):
        label, image = max(row, key=row.__getitem__), images[file]
        group = test.data.leaders.get(image.digest, image.digest)
        prediction = Prediction(file, image.class_name, label, row[label], row, digest=image.digest, group=group)
        probes.append(prediction)
    return probes
