"""Comparison of candidate and champion on photos that neither was trained on, or that it predicts out-of-fold."""

import string
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

from support import colors
from support.features import LENGTH, make_unknown
from workflow.evaluation import comparison, metrics
from workflow.evaluation.comparison import ComparedModel, ComparedPhoto
from workflow.records import Comparison, DataVersion, Evidence, ImageFile, Prediction, Results

import numpy as np
import pytest

LETTERS = string.ascii_letters  # digests of photos; capitals are of class A, others of class b
FEATURES = dict(zip(LETTERS, make_unknown(len(LETTERS)), strict=True))  # all dissimilar


def name_class(digest: str) -> str:
    return "A" if digest.isupper() else "b"


def predict(digests: Iterable[str], guess: str = "A") -> list[Prediction]:
    """Return a prediction for each photo."""
    return [
        Prediction(f"new/{digest}", name_class(digest), guess, 0.9, {}, digest=digest, group=digest)
        for digest in digests
    ]


def make_evidence(digests: str, held_out: str | None = None, sampled: bool = False, guess: str = "A") -> Evidence:
    """Return the evidence of a model trained on these photos; by default all were held out."""
    predictions = [replace(one, file=f"old/{one.digest}") for one in predict(held_out or digests, guess)]
    groups = {digest: (name_class(digest), digest) for digest in digests}
    return Evidence(predictions=predictions, sampled=sampled, training_images=groups)


class Model:
    """A model whose out-of-fold predictions are A and whose others are b; `predicted` has the digests of the others."""

    def __init__(self, evidence: Evidence):
        self.evidence, self.predicted = evidence, ""

    def predict(self, photos: list[ComparedPhoto]) -> list[Prediction]:
        self.predicted += "".join(photo.image.digest for photo in photos)
        return predict((photo.image.digest for photo in photos), "b")

    def to_compared_model(self) -> ComparedModel:
        features = np.stack([FEATURES[digest] for digest in self.evidence.training_images])
        return ComparedModel(self.evidence, features, self.predict)


def make_photos(digests: str) -> list[ComparedPhoto]:
    images = [ImageFile(f"new/{digest}", name_class(digest), digest) for digest in digests]
    return [ComparedPhoto(image, image.digest, FEATURES[image.digest]) for image in images]


def compare(photos: list[ComparedPhoto], candidate: Model, champion: Model, seed: int = 1) -> Comparison:
    models = candidate.to_compared_model(), champion.to_compared_model()
    return comparison.compare_models(photos, *models, "7", seed)


def digests_of(predictions: list[Prediction]) -> str:
    return "".join(one.digest for one in predictions)


def guesses(predictions: list[Prediction]) -> str:
    return "".join(one.predicted for one in predictions)


def test_training_photos_are_represented_by_stored_predictions():
    candidate, champion = Model(make_evidence("ABx")), Model(make_evidence("Bxy"))
    compared = compare(make_photos("ABxyC"), candidate, champion)
    assert digests_of(compared.candidate) == digests_of(compared.champion) == "ABxyC"
    assert guesses(compared.candidate) == "AAAbb"
    assert guesses(compared.champion) == "bAAAb"
    assert (candidate.predicted, champion.predicted, compared.version) == ("yC", "AC", "7")


@pytest.mark.parametrize("trained_on_the_original", ["candidate", "champion"])
def test_near_duplicate_of_a_training_photo_is_skipped(trained_on_the_original):
    models = {"candidate": Model(make_evidence("Bx")), "champion": Model(make_evidence("Bx"))}
    models[trained_on_the_original].evidence.training_images["A"] = ("A", "A")
    recompressed = FEATURES["A"] + 0.02 * FEATURES["C"]
    photos = [*make_photos("BxD"), ComparedPhoto(ImageFile("new/A2", "A", "A2"), "A2", recompressed)]
    compared = compare(photos, **models)
    assert digests_of(compared.candidate) == digests_of(compared.champion) == "BxD"
    assert "A2" not in models[trained_on_the_original].predicted


def test_training_photo_that_was_never_held_out_is_skipped():
    compared = compare(make_photos("ABx"), Model(make_evidence("ABx")), Model(make_evidence("ABx", held_out="Ax")))
    assert digests_of(compared.candidate) == digests_of(compared.champion) == "Ax"


def test_predictions_of_sampled_evidence_are_not_compared():
    compared = compare(make_photos("ABCx"), Model(make_evidence("Cx")), Model(make_evidence("ABx", sampled=True)))
    assert digests_of(compared.candidate) == digests_of(compared.champion) == "C"


def test_same_data_and_model_give_equal_predictions():
    compared = compare(make_photos("ABxy"), Model(make_evidence("ABxy")), Model(make_evidence("ABxy")))
    assert compared.candidate == compared.champion
    assert (compared.training_images, compared.champion_training_images, compared.new_images) == (4, 4, 0)


def test_new_photos_and_new_labels_are_counted():
    candidate = Model(make_evidence("ABCz"))
    training_images = candidate.evidence.training_images
    training_images["B"] = ("b", "B")  # another label
    training_images["D"] = ("A", "C")  # a near-duplicate of C, which is new
    training_images["E"] = ("A", "A")  # a near-duplicate of A, which is not
    compared = compare(make_photos("AB"), candidate, Model(make_evidence("ABxy")))
    assert (compared.training_images, compared.champion_training_images, compared.new_images) == (4, 4, 3)  # B, C and z


def test_current_label_applies_to_both_models():
    (photo,) = make_photos("B")
    compared = compare(
        [photo._replace(image=replace(photo.image, class_name="b"))],
        Model(make_evidence("AB")),
        Model(make_evidence("AB")),
    )
    assert [one.class_name for one in compared.candidate + compared.champion] == ["b", "b"]
    assert not compared.champion[0].correct


def test_many_photos_are_sampled_by_class_and_seed(monkeypatch):
    monkeypatch.setattr(comparison, "MAX_COMPARED", 10)
    first, repeated, reseeded = (
        compare(make_photos(LETTERS), Model(make_evidence("Ab")), Model(make_evidence("Ab")), seed)
        for seed in (1, 1, 2)
    )
    assert sorted(map(name_class, digests_of(first.candidate))) == ["A"] * 5 + ["b"] * 5
    assert first == repeated
    assert digests_of(first.candidate) == digests_of(first.champion) != digests_of(reseeded.candidate)


def make_test(digests: str, duplicate_of: dict[str, str] | None = None, has_features: bool = True) -> SimpleNamespace:
    """Return a test dataset whose data version has these photos."""
    images = [ImageFile(f"new/{digest}", name_class(digest), digest, split="test") for digest in digests]
    images.append(ImageFile("new/broken", "A", "broken", "not an image"))
    data, features = DataVersion("", "", images, duplicate_of or {}), {one: FEATURES[one] for one in digests}
    return SimpleNamespace(data=data, inputs=features, features=has_features or None, seed=1)


def test_photos_that_only_the_champion_has_are_compared():
    references = {f"old/{digest}": FEATURES[digest] for digest in "AB"}
    photos = comparison.list_photos(make_test("ACx"), make_evidence("ABy", held_out="ABy"), references)
    assert [(photo.image.digest, photo.image.file) for photo in photos] == [
        ("A", "new/A"),
        ("C", "new/C"),
        ("x", "new/x"),
        ("B", ""),  # both B and y are gone, but y has no features
    ]
    assert np.array_equal(photos[-1].features, FEATURES["B"])


def test_group_is_compared_on_a_training_photo_of_the_champion():
    duplicate_of = {"A": "A", "C": "A", "x": "y", "y": "y"}
    photos = comparison.list_photos(make_test("CAyx", duplicate_of), make_evidence("ABx"), {})
    assert sorted(photo.image.digest for photo in photos) == ["A", "x"]


def test_near_duplicates_of_training_photos_are_not_collected():
    results = Results(
        0.1, 1.0, {}, [replace(one, group={"D": "A"}.get(one.digest, one.group)) for one in predict("CDE")]
    )
    assert digests_of(comparison.collect_predictions(results, make_evidence("AB"))) == "CEAB"
    assert digests_of(comparison.collect_predictions(results, make_evidence("AB", sampled=True))) == "CE"
    assert comparison.collect_predictions(results, None) == results.predictions


def compare_on_test(monkeypatch, evidence: Evidence | None, stored: Evidence | None, test: str) -> Comparison:
    """Return the comparison of a candidate with a champion whose packaged code always predicts b."""
    monkeypatch.setattr(metrics, "predict_files", lambda model, data, files: predict((f[-1] for f in files), "b"))
    champion = comparison.Champion("7", lambda: None, stored, [], {})
    return comparison.compare(None, metrics.summarize(predict(test)), evidence, make_test("ABCxz"), champion)


def test_champion_without_evidence_predicts_test_images_alone(monkeypatch):
    compared = compare_on_test(monkeypatch, make_evidence("AB"), None, "Cz")
    assert (compared.candidate, compared.champion) == (predict("Cz"), predict("Cz", "b"))
    assert compared.champion_training_images is None


def test_candidate_without_evidence_is_compared_on_test_images(monkeypatch):
    compared = compare_on_test(monkeypatch, None, make_evidence("ACx", held_out="Cx"), "ACz")
    assert (digests_of(compared.champion), guesses(compared.champion)) == ("Cz", "Ab")  # A was never held out
    assert (compared.training_images, compared.champion_training_images, compared.new_images) == (0, 3, 0)


class Served:
    """A served model whose head predicts A with 0.8, and its packaged code with `shift` more.

    `predicted` has the digests of the photos that its packaged code has predicted.
    """

    def __init__(self, monkeypatch, shift: float = 0, first_layer: str = "backbone"):
        self.shift, self.first_layer, self.predicted = shift, first_layer, ""
        monkeypatch.setattr(metrics, "predict_files", self.predict_files)

    def predict_files(self, model, data: DataVersion, files: list[str]) -> list[Prediction]:
        self.predicted += "".join(file[-1] for file in files)
        rows = {"A": 0.8 + self.shift, "b": 0.2 - self.shift}
        return [replace(one, probability=rows["A"], probabilities=rows) for one in predict(file[-1] for file in files)]

    def unwrap_python_model(self):
        def head(features, training: bool) -> np.ndarray:
            assert np.linalg.norm(features, axis=1) == pytest.approx(LENGTH)
            return np.tile([0.8, 0.2], (len(features), 1))

        layers = [SimpleNamespace(name=self.first_layer), head]
        return SimpleNamespace(model=SimpleNamespace(layers=layers), class_names=["A", "b"])


GONE = ComparedPhoto(ImageFile("", "A", "T"), "T", FEATURES["T"])  # no longer in the folder


def test_head_predicts_all_photos_but_the_probes(monkeypatch):
    champion = Served(monkeypatch)
    predictions = comparison.predict(
        lambda: champion, [*make_photos(LETTERS[:12]), GONE], make_test(LETTERS[:12]).data, {}
    )
    assert champion.predicted == LETTERS[: comparison.PROBE_IMAGES]
    assert sorted(digests_of(predictions)) == sorted(LETTERS[:12] + "T")
    assert {one.probabilities["A"] for one in predictions} == {0.8}
    assert [one.class_name for one in predictions if one.digest == "T"] == ["A"]


def test_served_predictions_replace_the_probes(monkeypatch):
    candidate = Served(monkeypatch)
    served = {one.digest: one for one in candidate.predict_files(None, None, ["new/A", "new/B"])}
    predictions = comparison.predict(lambda: candidate, [*make_photos("ABC"), GONE], make_test("ABC").data, served)
    assert candidate.predicted == "AB"
    assert sorted(digests_of(predictions)) == ["A", "B", "C", "T"]


def test_model_is_not_loaded_if_all_predictions_are_stored():
    served = {prediction.digest: prediction for prediction in predict("ABC", "b")}
    predictions = comparison.predict(lambda: pytest.fail("loaded"), make_photos("AC"), make_test("ABC").data, served)
    assert predictions == predict("AC", "b")


@pytest.mark.parametrize(
    "options",
    [{"shift": 0.01}, {"first_layer": "resizing"}],
    ids=["different probabilities", "no backbone"],
)
def test_packaged_code_predicts_if_the_head_disagrees(monkeypatch, options):
    champion = Served(monkeypatch, **options)
    predictions = comparison.predict(
        lambda: champion, [*make_photos(LETTERS[:12]), GONE], make_test(LETTERS[:12]).data, {}
    )
    assert champion.predicted == digests_of(predictions) == LETTERS[:12]
    assert {one.probabilities["A"] for one in predictions} == {0.8 + options.get("shift", 0)}


def test_head_and_model_agree_on_unknown_images(tmp_path):
    classifier = colors.load_classifier(colors.save_model(tmp_path), max_novelty=0.2)
    values = list(colors.COLORS.values())
    photos = [
        ComparedPhoto(ImageFile(str(value), "red", str(value)), "", np.array(value, "float32")) for value in values
    ]
    model = SimpleNamespace(unwrap_python_model=lambda: classifier)
    pixels = [np.full((colors.SIZE, colors.SIZE, 3), value, "uint8") for value in values]
    served = [prediction.unknown for prediction in classifier.classify(pixels)]
    assert [prediction.unknown for prediction in comparison.predict_by_head(model, photos)] == served
    assert set(served) == {True, False}


def test_photos_that_both_runs_have_are_counted(monkeypatch):
    model, evidence = Served(monkeypatch), make_evidence("ABx")
    champion = comparison.Champion("7", lambda: model, evidence, predict("C"), {"A": FEATURES["A"]})
    results = metrics.summarize(predict("z"))
    for photos, shared in {"ABCxz": 4, "Cz": 1, "Dz": 0}.items():
        compared = comparison.compare(model, results, make_evidence(photos[-1]), make_test(photos), champion)
        assert compared.shared_images == shared
