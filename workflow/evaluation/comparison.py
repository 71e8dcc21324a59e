"""Compare the candidate with the champion on the same photos, without evaluating a model on its training photos.

The photos are those in the folder, and training photos of the champion that have been deleted since; the champion
stores their features. On its training photos, a model is scored by its out-of-fold predictions. It predicts all other
photos, except those nearly identical to a training photo (MAX_SIMILARITY). Near-duplicates count once. With more than
500 photos, cross-validation trains on a sample, and its models are too weak for a comparison, so training photos are
excluded.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from workflow.data.datasets import ImageDataset
from workflow.evaluation import metrics
from workflow.model.feature_set import normalize
from workflow.model.sampling import stratified_sample
from workflow.records import Comparison, DataVersion, Evidence, ImageFile, Prediction, Results

import numpy as np

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel  # which imports pandas

MAX_COMPARED = 1000  # photos, sampled by class
MAX_SIMILARITY = 0.96  # cosine similarity to a training photo; recompressed copies are more similar
PROBE_IMAGES = 8  # photos for which the predictions of a model's head are checked against its serving code
MAX_PROBE_DIFFERENCE = 1e-3  # in probability, for the head to predict the other photos from their features
MAX_SERVED_DIFFERENCE = 0.01  # in probability; larger, because another machine may have computed the features


class ComparedPhoto(NamedTuple):
    """A photo to compare models on."""

    image: ImageFile  # with the file name "" if it is no longer in the folder
    group: str  # shared by near-duplicates
    features: np.ndarray  # shape (FEATURES,)


class ComparedModel(NamedTuple):
    """A model to compare."""

    evidence: Evidence  # results of its cross-validation
    features: np.ndarray  # features of its training photos, shape (photos, FEATURES)
    predict: Callable[[list[ComparedPhoto]], list[Prediction]]  # called with photos that it was not trained on


class Champion(NamedTuple):
    """The champion, and what its run stored."""

    version: str
    load: "Callable[[], PyFuncModel]"  # takes seconds, so it is called only if a photo has no stored prediction
    evidence: Evidence | None  # results of its cross-validation; None if none were stored
    served: list[Prediction]  # predictions of its serving code for its test photos
    references: dict[str, np.ndarray]  # features of its training photos, shape (FEATURES,), by file name


def collect_predictions(results: Results, evidence: Evidence | None) -> list[Prediction]:
    """Return the predictions that estimate a model's accuracy on new photos.

    These are its out-of-fold predictions, and those for test photos without near-duplicates in its training photos.
    """
    if evidence is None:
        return results.predictions
    groups = evidence.training_groups
    test = [prediction for prediction in results.predictions if prediction.group not in groups]
    return test + list(evidence.out_of_fold.values())


def compare(
    model: "PyFuncModel", results: Results, evidence: Evidence | None, test: ImageDataset, champion: Champion
) -> Comparison:
    """Compare a candidate with the champion.

    Args:
        model: the candidate
        results: its results on the test images
        evidence: its cross-validation results; None without a backbone
        test: the test dataset, whose data version lists all photos
        champion: the champion

    Raises:
        WorkflowError: a photo cannot be read or has changed
    """
    if evidence is None or champion.evidence is None:
        return compare_on_test_images(results, test, champion)
    champion_digests = champion.evidence.training_images.keys() | by_digest(champion.served)
    served, champion_served = by_digest(results.predictions), by_digest(champion.served)
    training_features = np.stack([np.asarray(test.inputs[digest]) for digest in evidence.training_images])
    compared = compare_models(
        list_photos(test, champion.evidence, champion.references),
        ComparedModel(evidence, training_features, lambda photos: predict(lambda: model, photos, test.data, served)),
        ComparedModel(
            champion.evidence,
            np.stack(list(champion.references.values())),
            lambda photos: predict(champion.load, photos, test.data, champion_served),
        ),
        champion.version,
        test.seed,
    )
    return replace(compared, shared_images=sum(image.digest in champion_digests for image in test.data.files))


def compare_on_test_images(results: Results, test: ImageDataset, champion: Champion) -> Comparison:
    """Compare on the test images only: for a champion of an earlier release, or without a backbone."""
    evidence = champion.evidence or Evidence()
    predictions = evidence.out_of_fold
    unseen = [prediction for prediction in results.predictions if prediction.digest not in evidence.training_images]
    files = [prediction.file for prediction in unseen]
    predictions |= by_digest(metrics.predict_files(champion.load(), test.data, files))
    compared = [prediction for prediction in results.predictions if prediction.digest in predictions]
    return Comparison(
        champion.version,
        compared,
        [replace(predictions[prediction.digest], class_name=prediction.class_name) for prediction in compared],
        champion_training_images=len(evidence.training_groups) if champion.evidence else None,
    )


def list_photos(
    test: ImageDataset, champion_evidence: Evidence, references: dict[str, np.ndarray]
) -> list[ComparedPhoto]:
    """Return the photos in the folder and the champion's deleted training photos, one per group of near-duplicates.

    Args:
        test: the test dataset, whose data version lists all photos in the folder
        champion_evidence: results of the champion's cross-validation
        references: features that the champion stores, by file name
    """
    photos = [
        ComparedPhoto(image, test.data.group_of(image.digest), np.asarray(test.inputs[image.digest]))
        for image in test.data.files
        if image.split
    ]
    # In each group, prefer a training photo of the champion, which has an out-of-fold prediction.
    photos.sort(key=lambda photo: photo.image.digest not in champion_evidence.training_images)
    digests = {image.digest for image in test.data.files}
    photos += [
        ComparedPhoto(
            ImageFile("", prediction.class_name, prediction.digest), prediction.group, references[prediction.file]
        )
        for prediction in champion_evidence.predictions
        if prediction.digest not in digests and prediction.file in references
    ]
    return list({photo.group: photo for photo in reversed(photos)}.values())[::-1]


def compare_models(
    photos: list[ComparedPhoto], candidate: ComparedModel, champion: ComparedModel, version: str, seed: int
) -> Comparison:
    """Compare on the photos for which both models have a prediction that was made without training on them.

    There is at most one photo per near-duplicate group. The seed is for sampling MAX_COMPARED photos.
    """
    labels = np.unique([photo.image.class_name for photo in photos], return_inverse=True)[1]
    photos = list(compress(photos, stratified_sample(labels, MAX_COMPARED, np.random.default_rng(seed))))
    predictions, champion_predictions = (predict_unseen(model, photos) for model in (candidate, champion))
    digests = [digest for digest in predictions if digest in champion_predictions]
    champion_labels = {digest: name for digest, (name, _) in champion.evidence.training_images.items()}
    shared_groups = {
        group
        for digest, (name, group) in candidate.evidence.training_images.items()
        if champion_labels.get(digest) == name
    }
    return Comparison(
        version,
        [predictions[digest] for digest in digests],
        [champion_predictions[digest] for digest in digests],
        len(candidate.evidence.training_groups),
        len(champion.evidence.training_groups),
        len(candidate.evidence.training_groups - shared_groups),
    )


def predict_unseen(model: ComparedModel, photos: list[ComparedPhoto]) -> dict[str, Prediction]:
    """Return a model's predictions by digest, in the order of the photos, without copies of its training photos."""
    predictions = model.evidence.out_of_fold
    unseen = [photo for photo in photos if photo.image.digest not in model.evidence.training_images]
    if unseen:
        features = normalize(np.stack([photo.features for photo in unseen]))
        similarity = (features @ normalize(model.features).T).max(axis=1)
        unseen = list(compress(unseen, similarity < MAX_SIMILARITY))
    if unseen:
        predictions |= by_digest(model.predict(unseen))
    return {
        image.digest: replace(predictions[image.digest], class_name=image.class_name)
        for image, *_ in photos
        if image.digest in predictions
    }


def predict(
    load: "Callable[[], PyFuncModel]", photos: list[ComparedPhoto], data: DataVersion, served: dict[str, Prediction]
) -> list[Prediction]:
    """Return a model's predictions for photos.

    To save time, the model's head predicts from the stored features, provided that it agrees with the serving code on
    the photos in `served`, or on the first PROBE_IMAGES. If it does not, the serving code predicts, and photos that are
    no longer in the folder are skipped.

    Args:
        load: returns the model; not called if all photos are in `served`
        photos: photos to predict
        data: the data version with the files
        served: earlier predictions of the serving code, by digest
    """
    present = [photo.image for photo in photos if photo.image.file]
    probes = [served[image.digest] for image in present if image.digest in served]
    if len(probes) == len(photos):
        return probes
    model = load()
    probes = probes or metrics.predict_files(model, data, [image.file for image in present[:PROBE_IMAGES]])
    by_serving_code, by_head = by_digest(probes), by_digest(predict_by_head(model, photos))
    digests = by_serving_code.keys() & by_head.keys()
    differences = [compare_probabilities(by_serving_code[digest], by_head[digest]) for digest in digests]
    if differences and max(differences) <= MAX_PROBE_DIFFERENCE:
        return list((by_head | by_serving_code).values())
    files = [image.file for image in present if image.digest not in by_serving_code]
    return probes + metrics.predict_files(model, data, files)


def by_digest(predictions: list[Prediction]) -> dict[str, Prediction]:
    return {prediction.digest: prediction for prediction in predictions}


def compare_probabilities(prediction: Prediction, reference: Prediction) -> float:
    """Return the largest difference in probability; for a rejected image, all probabilities count as 1."""
    probabilities = prediction.probabilities
    return max(abs(probabilities.get(name, 1.0) - value) for name, value in reference.probabilities.items())


def find_head_mismatches(model: "PyFuncModel", served: list[Prediction], test: ImageDataset) -> list[str]:
    """Return the test images for which the serving code of a model and its head predict different classes."""
    if test.features is None:
        return []
    rows = zip(served, test.features, strict=True)
    photos = [ComparedPhoto(test.data.by_file[item.file], item.group, features) for item, features in rows]
    pairs = zip(served, predict_by_head(model, photos), strict=True)
    return [a.file for a, b in pairs if b.probabilities.get(a.predicted, 0) < b.probability - MAX_SERVED_DIFFERENCE]


def predict_by_head(model: "PyFuncModel", photos: list[ComparedPhoto]) -> list[Prediction]:
    """Return the predictions that a model's head makes from the features; [] for a model without a backbone."""
    classifier: Any = model.unwrap_python_model()
    first, *head = classifier.model.layers
    if first.name != "backbone" or not photos:
        return []
    probabilities = np.stack([photo.features for photo in photos])
    for layer in head:
        probabilities = layer(probabilities, training=False)
    rows = zip(photos, np.asarray(probabilities).tolist(), strict=True)
    predictions = [
        Prediction.from_probabilities(photo.image, classifier.class_names, row, photo.group) for photo, row in rows
    ]
    return mark_unknown(classifier, predictions, photos)


def mark_unknown(classifier: Any, predictions: list[Prediction], photos: list[ComparedPhoto]) -> list[Prediction]:
    """Return the predictions of a model's head with `unknown` as the model would serve it, if its release computes it.

    Args:
        classifier: the ImageClassifier, of any release
        predictions: predictions of its head
        photos: the predicted photos
    """
    if getattr(classifier, "whitening", None) is None or np.isnan(classifier.max_novelty):
        return predictions
    embeddings = normalize(np.stack([photo.features for photo in photos]))
    cosines = np.asarray(classifier.whitening.compare(embeddings)).max(axis=1)
    return [
        replace(prediction, unknown=1 - cosine * prediction.probability**0.5 > classifier.max_novelty)
        for prediction, cosine in zip(predictions, cosines.tolist(), strict=True)
    ]
