"""Compare the candidate with the champion on the same photos.

The photos are those of the folder and the champion's training photos that are no longer there, because it keeps their
features. For a training photo of a model, its out-of-fold prediction of cross-validation counts. It predicts the other
photos, except those that are nearly identical to one of its training photos (MAX_SIMILARITY). Near-duplicates count
once. Where cross-validation trained on a sample, with more than 500 photos, out-of-fold predictions are too weak to
stand for the model, and only the other photos count.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from workflow.data.datasets import ImageDataset
from workflow.evaluation import metrics
from workflow.model import backbone, served_model
from workflow.model.sampling import choose
from workflow.records import Comparison, DataVersion, Evidence, ImageFile, Prediction, Results

import mlflow
import numpy as np
from mlflow.pyfunc import PyFuncModel
from pydantic import ValidationError

MAX_COMPARED = 1000  # photos, drawn by class and seed
MAX_SIMILARITY = 0.96  # of a photo to those that a model has learned from; recompressed copies are more similar
PROBES = 8  # photos that a model's packaged code predicts, before its head alone predicts the others from features
TOLERANCE = 1e-3  # between the probabilities of the two
MAX_SERVED_DIFFERENCE = 0.01  # of probabilities: the features may have been computed on another machine


class Photo(NamedTuple):
    """A photo to compare models on.

    Attributes:
        digest: SHA-256 of the image file
        class_name: the true class
        group: near-duplicates have the same one
        file: its name in the folder; "" when it is no longer there
        features: shape (FEATURES,)
    """

    digest: str
    class_name: str
    group: str
    file: str
    features: np.ndarray


class Contestant(NamedTuple):
    """A model in a comparison.

    Attributes:
        evidence: of its cross-validation
        features: of the photos that it has learned from, shape (photos, FEATURES)
        ask: returns its predictions for photos that it has not learned from
    """

    evidence: Evidence
    features: np.ndarray
    ask: Callable[[list[Photo]], list[Prediction]]


def collect_predictions(results: Results, evidence: Evidence | None) -> list[Prediction]:
    """Return the predictions of a model for all photos of its folder, as if each were new.

    These are those for the test images, without near-duplicates of photos that it has learned from, and its
    out-of-fold ones. Where cross-validation trained on a sample only, these are too weak to stand for the model.
    """
    if evidence is None:
        return results.predictions
    groups = {group for _, group in evidence.training_images.values()}
    test = [one for one in results.predictions if one.group not in groups]
    return test + ([] if evidence.sampled else evidence.predictions)


def compare(
    model: PyFuncModel,
    results: Results,
    own: Evidence | None,
    test: ImageDataset,
    champion: PyFuncModel,
    version: str,
    run_id: str,
) -> Comparison:
    """Return the comparison of a candidate with the champion.

    Args:
        model: the candidate
        results: its results on the test images
        own: its evidence; None without a backbone
        test: the test dataset, whose data version has all photos
        champion: the loaded model
        version: its registered version
        run_id: of the MLflow run that trained it

    Raises:
        WorkflowError: a photo cannot be read, or has changed
    """
    stored, classifier = read_evidence(run_id), champion.unwrap_python_model()
    if own is None or stored is None:
        return compare_on_test(results, stored, test, champion, version)
    served = {one.digest: one for one in results.predictions}
    training_features = np.stack([np.asarray(test.inputs[digest]) for digest in own.training_images])
    references = backbone.LENGTH * served_model.get_reference_embeddings(classifier)
    candidate = Contestant(own, training_features, lambda photos: ask(model, photos, test.data, served))
    other = Contestant(stored, references, lambda photos: ask(champion, photos, test.data, {}))
    photos = list_photos(test, stored, dict(zip(classifier.files, references, strict=True)))
    return pair(photos, candidate, other, version, test.seed)


def compare_on_test(
    results: Results, stored: Evidence | None, test: ImageDataset, champion: PyFuncModel, version: str
) -> Comparison:
    """Return the comparison on the test images alone, with a model of an earlier release or without a backbone."""
    out_of_fold = {one.digest: one for one in stored.predictions} if stored and not stored.sampled else {}
    training_images = stored.training_images if stored else {}
    tested = [one for one in results.predictions if one.digest in out_of_fold or one.digest not in training_images]
    asked = metrics.predict_files(champion, test.data, [one.file for one in tested if one.digest not in out_of_fold])
    others = out_of_fold | {one.digest: one for one in asked}
    predictions = [replace(others[one.digest], class_name=one.class_name) for one in tested]
    return Comparison(
        version, tested, predictions, champion_training_images=count_groups(training_images) if stored else None
    )


def read_evidence(run_id: str) -> Evidence | None:
    """Return the evidence that a run has stored; None for a run without it, or of an earlier version."""
    name = "cross_validation.json"
    if name not in {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=folder)
        try:
            evidence = Evidence.read(Path(path))
        except ValidationError:  # an earlier version of this project wrote it
            return None
    return evidence if evidence.training_images else None


def list_photos(test: ImageDataset, stored: Evidence, references: dict[str, np.ndarray]) -> list[Photo]:
    """Return the photos of the folder and those that only the champion has learned from, one per group.

    Args:
        test: the test dataset, whose data version has all photos
        stored: the champion's evidence
        references: the features that the champion keeps, by the name of the file
    """
    photos = []
    for image in test.data.files:
        if image.split:
            features, group = np.asarray(test.inputs[image.digest]), test.data.group_of(image.digest)
            photos.append(Photo(image.digest, image.class_name, group, image.file, features))
    photos.sort(
        key=lambda photo: photo.digest not in stored.training_images
    )  # of a group, one with an out-of-fold prediction
    digests = {image.digest for image in test.data.files}
    photos += [
        Photo(one.digest, one.class_name, one.group, "", references[one.file])
        for one in stored.predictions
        if one.digest not in digests and one.file in references
    ]
    return list({photo.group: photo for photo in reversed(photos)}.values())[::-1]


def pair(photos: list[Photo], candidate: Contestant, champion: Contestant, version: str, seed: int) -> Comparison:
    """Return the comparison on the photos that both models predict without having learned from them."""
    photos = draw(photos, seed)
    own, others = (predict_unlearned(model, photos) for model in (candidate, champion))
    digests = [photo.digest for photo in photos if photo.digest in own and photo.digest in others]
    training_images = {digest: name for digest, (name, _) in champion.evidence.training_images.items()}
    known = {
        group
        for digest, (name, group) in candidate.evidence.training_images.items()
        if training_images.get(digest) == name
    }
    return Comparison(
        version,
        [own[digest] for digest in digests],
        [others[digest] for digest in digests],
        count_groups(candidate.evidence.training_images),
        count_groups(champion.evidence.training_images),
        len({group for _, group in candidate.evidence.training_images.values()} - known),
    )


def count_groups(training_images: dict[str, tuple[str, str]]) -> int:
    """Return how many groups of near-duplicates a model has learned from."""
    return len({group for _, group in training_images.values()})


def draw(photos: list[Photo], seed: int) -> list[Photo]:
    """Return at most MAX_COMPARED of the photos, of each class the same fraction."""
    if not photos:
        return []
    labels = np.unique([photo.class_name for photo in photos], return_inverse=True)[1]
    drawn = choose(labels, MAX_COMPARED, np.random.default_rng(seed))
    return [photo for photo, is_drawn in zip(photos, drawn, strict=True) if is_drawn]


def predict_unlearned(model: Contestant, photos: list[Photo]) -> dict[str, Prediction]:
    """Return a model's predictions by digest, as if each photo were new to it; without those that cannot be."""
    evidence = model.evidence
    out_of_fold = {} if evidence.sampled else {one.digest: one for one in evidence.predictions}
    others = [photo for photo in photos if photo.digest not in evidence.training_images]
    if others:
        units = normalize([photo.features for photo in others])
        similarity = np.max(units @ normalize(model.features).T, axis=1)
        others = [one for one, value in zip(others, similarity, strict=True) if value < MAX_SIMILARITY]
    predictions = {one.digest: one for one in model.ask(others)} if others else {}
    predictions |= {photo.digest: out_of_fold[photo.digest] for photo in photos if photo.digest in out_of_fold}
    classes = {photo.digest: photo.class_name for photo in photos}
    return {digest: replace(one, class_name=classes[digest]) for digest, one in predictions.items()}


def normalize(features: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the features with length 1."""
    vectors = np.asarray(features)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ask(model: PyFuncModel, photos: list[Photo], data: DataVersion, served: dict[str, Prediction]) -> list[Prediction]:
    """Return a model's predictions for photos.

    Its packaged code predicts the first PROBES that are in the folder, unless they are in `served`, by digest. If its
    head gives the same probabilities from the features of these, it predicts the others. Otherwise the packaged code
    does, and photos that are no longer in the folder are left out.
    """
    present = [photo for photo in photos if photo.file]
    known = [served[photo.digest] for photo in present if photo.digest in served]
    rest = [photo for photo in present if photo.digest not in served]
    known = known or metrics.predict_files(model, data, [photo.file for photo in rest[:PROBES]])
    digests = {one.digest for one in known}
    by_head = {one.digest: one for one in predict_by_head(model, photos)}
    differences = [compare_probabilities(one, by_head[one.digest]) for one in known if one.digest in by_head]
    if differences and max(differences) <= TOLERANCE:
        return known + [one for digest, one in by_head.items() if digest not in digests]
    return known + metrics.predict_files(model, data, [one.file for one in rest if one.digest not in digests])


def find_served_differently(model: PyFuncModel, served: list[Prediction], test: ImageDataset) -> list[str]:
    """Return the test images for which a model's packaged code prefers another label than its head."""
    if test.features is None:
        return []
    rows = zip(served, test.features, strict=True)
    photos = [Photo(one.digest, one.class_name, one.group, one.file, features) for one, features in rows]
    pairs = zip(served, predict_by_head(model, photos), strict=True)
    return [a.file for a, b in pairs if b.probabilities.get(a.predicted, 0) < b.probability - MAX_SERVED_DIFFERENCE]


def compare_probabilities(one: Prediction, other: Prediction) -> float:
    """Return the largest difference between the probabilities of two predictions; 1 where a model refused an image."""
    return max(abs(one.probabilities.get(name, 1.0) - value) for name, value in other.probabilities.items())


def predict_by_head(model: PyFuncModel, photos: list[Photo]) -> list[Prediction]:
    """Return the predictions of a model's head for the features of photos; [] for a model without a backbone."""
    classifier: Any = model.unwrap_python_model()
    first, *head = classifier.model.layers
    if first.name != "backbone" or not photos:
        return []
    probabilities = np.stack([photo.features for photo in photos])
    for layer in head:
        probabilities = layer(probabilities, training=False)
    return to_predictions(photos, np.asarray(probabilities), classifier.class_names)


def to_predictions(photos: list[Photo], probabilities: np.ndarray, class_names: list[str]) -> list[Prediction]:
    """Return the predictions with these probabilities, of shape (photos, classes)."""
    return [
        Prediction.from_probabilities(
            ImageFile(photo.file, photo.class_name, photo.digest), class_names, row, photo.group
        )
        for photo, row in zip(photos, probabilities.tolist(), strict=True)
    ]
