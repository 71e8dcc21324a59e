"""Candidate and champion on the same photos: those that neither has learned from, or that it predicts out of fold."""

import string
from collections.abc import Iterable
from dataclasses import asdict, replace
from types import SimpleNamespace

from support.features import LENGTH, make_unknown
from workflow.evaluation import comparison, metrics
from workflow.evaluation.comparison import Contestant, Photo
from workflow.records import Comparison, DataVersion, Evidence, ImageFile, Prediction, Results

import mlflow
import numpy as np
import pytest

LETTERS = string.ascii_letters  # the digests of photos; capitals are of class A, others of class b
FEATURES = dict(zip(LETTERS, make_unknown(len(LETTERS)), strict=True))  # no two are alike


def name_class(digest: str) -> str:
    return "A" if digest.isupper() else "b"


def predict(digests: Iterable[str], guess: str = "A") -> list[Prediction]:
    """Return a prediction for each photo."""
    return [
        Prediction(f"new/{digest}", name_class(digest), guess, 0.9, {}, digest=digest, group=digest)
        for digest in digests
    ]


def make_evidence(digests: str, held_out: str | None = None, sampled: bool = False, guess: str = "A") -> Evidence:
    """Return the evidence of a model that has learned from these photos; by default all were held out."""
    predictions = [replace(one, file=f"old/{one.digest}") for one in predict(held_out or digests, guess)]
    groups = {digest: (name_class(digest), digest) for digest in digests}
    return Evidence(predictions=predictions, sampled=sampled, training_images=groups)


class Model:
    """A model in a comparison: out of fold it guesses A, and b when it is asked; `asked` has the digests."""

    def __init__(self, evidence: Evidence):
        self.evidence, self.asked = evidence, ""

    def answer(self, photos: list[Photo]) -> list[Prediction]:
        self.asked += "".join(photo.digest for photo in photos)
        return predict((photo.digest for photo in photos), "b")

    def enter(self) -> Contestant:
        return Contestant(
            self.evidence, np.stack([FEATURES[digest] for digest in self.evidence.training_images]), self.answer
        )


def make_photos(digests: str) -> list[Photo]:
    return [Photo(digest, name_class(digest), digest, f"new/{digest}", FEATURES[digest]) for digest in digests]


def pair(photos: list[Photo], candidate: Model, champion: Model, seed: int = 1) -> Comparison:
    return comparison.pair(photos, candidate.enter(), champion.enter(), "7", seed)


def digests_of(predictions: list[Prediction]) -> str:
    return "".join(one.digest for one in predictions)


def guesses(predictions: list[Prediction]) -> str:
    return "".join(one.predicted for one in predictions)


def test_learned_photos_have_stored_predictions_and_others_are_asked():
    candidate, champion = Model(make_evidence("ABx")), Model(make_evidence("Bxy"))
    found = pair(make_photos("ABxyC"), candidate, champion)
    assert digests_of(found.candidate) == digests_of(found.champion) == "ABxyC"
    assert guesses(found.candidate) == "AAAbb"
    assert guesses(found.champion) == "bAAAb"
    assert (candidate.asked, champion.asked, found.version) == ("yC", "AC", "7")


@pytest.mark.parametrize("learns_the_original", ["candidate", "champion"])
def test_near_duplicate_of_a_learned_photo_is_left_out(learns_the_original):
    models = {"candidate": Model(make_evidence("Bx")), "champion": Model(make_evidence("Bx"))}
    models[learns_the_original].evidence.training_images["A"] = ("A", "A")
    recompressed = FEATURES["A"] + 0.02 * FEATURES["C"]
    photos = [*make_photos("BxD"), Photo("A2", "A", "A2", "new/A2", recompressed)]
    found = pair(photos, **models)
    assert digests_of(found.candidate) == digests_of(found.champion) == "BxD"
    assert "A2" not in models[learns_the_original].asked


def test_learned_photo_that_was_never_held_out_is_left_out():
    found = pair(make_photos("ABx"), Model(make_evidence("ABx")), Model(make_evidence("ABx", held_out="Ax")))
    assert digests_of(found.candidate) == digests_of(found.champion) == "Ax"


def test_predictions_of_a_sample_are_not_compared():
    found = pair(make_photos("ABCx"), Model(make_evidence("Cx")), Model(make_evidence("ABx", sampled=True)))
    assert digests_of(found.candidate) == digests_of(found.champion) == "C"


def test_same_data_and_model_differ_nowhere():
    found = pair(make_photos("ABxy"), Model(make_evidence("ABxy")), Model(make_evidence("ABxy")))
    assert found.candidate == found.champion
    assert (found.training_images, found.champion_training_images, found.new_images) == (4, 4, 0)


def test_new_photos_and_new_labels_are_counted():
    candidate = Model(make_evidence("ABCz"))
    training_images = candidate.evidence.training_images
    training_images["B"] = ("b", "B")  # another label
    training_images["D"] = ("A", "C")  # a near-duplicate of C, which is new
    training_images["E"] = ("A", "A")  # a near-duplicate of A, which is not
    found = pair(make_photos("AB"), candidate, Model(make_evidence("ABxy")))
    assert (found.training_images, found.champion_training_images, found.new_images) == (4, 4, 3)  # B, C and z


def test_label_of_today_holds_for_both_models():
    (photo,) = make_photos("B")
    found = pair([photo._replace(class_name="b")], Model(make_evidence("AB")), Model(make_evidence("AB")))
    assert [one.class_name for one in found.candidate + found.champion] == ["b", "b"]
    assert not found.champion[0].correct


def test_many_photos_are_drawn_by_class_and_seed(monkeypatch):
    monkeypatch.setattr(comparison, "MAX_COMPARED", 10)
    first, again, other = (
        pair(make_photos(LETTERS), Model(make_evidence("Ab")), Model(make_evidence("Ab")), seed) for seed in (1, 1, 2)
    )
    assert sorted(map(name_class, digests_of(first.candidate))) == ["A"] * 5 + ["b"] * 5
    assert first == again
    assert digests_of(first.candidate) == digests_of(first.champion) != digests_of(other.candidate)


def make_test(digests: str, duplicate_of: dict[str, str] | None = None, has_features: bool = True) -> SimpleNamespace:
    """Return a test dataset whose data version has these photos."""
    images = [ImageFile(f"new/{digest}", name_class(digest), digest, split="test") for digest in digests]
    images.append(ImageFile("new/broken", "A", "broken", "not an image"))
    data, features = DataVersion("", "", images, duplicate_of or {}), {one: FEATURES[one] for one in digests}
    return SimpleNamespace(data=data, inputs=features, features=has_features or None, seed=1)


def test_photos_that_only_the_champion_has_are_compared_too():
    references = {f"old/{digest}": FEATURES[digest] for digest in "AB"}
    photos = comparison.list_photos(make_test("ACx"), make_evidence("ABy", held_out="ABy"), references)
    assert [(photo.digest, photo.file) for photo in photos] == [
        ("A", "new/A"),
        ("C", "new/C"),
        ("x", "new/x"),
        ("B", ""),  # it is gone; y is, too, and has no features
    ]
    assert np.array_equal(photos[-1].features, FEATURES["B"])


def test_group_is_compared_on_the_photo_that_the_champion_knows():
    duplicate_of = {"A": "A", "C": "A", "x": "y", "y": "y"}
    photos = comparison.list_photos(make_test("CAyx", duplicate_of), make_evidence("ABx"), {})
    assert sorted(photo.digest for photo in photos) == ["A", "x"]


def test_all_photos_that_were_not_learned_judge_the_candidate():
    results = Results(
        0.1, 1.0, {}, [replace(one, group={"D": "A"}.get(one.digest, one.group)) for one in predict("CDE")]
    )
    assert digests_of(comparison.collect_predictions(results, make_evidence("AB"))) == "CEAB"
    assert digests_of(comparison.collect_predictions(results, make_evidence("AB", sampled=True))) == "CE"
    assert comparison.collect_predictions(results, None) == results.predictions


EARLIER = {  # what version 1 has stored
    "accuracy": 1.0,
    "loss": 0.1,
    "recall": {"A": 1.0},
    "temperature": 0.5,
    "before": {"error": 0.1, "bins": [{"probability": 0.9, "right": 1.0, "share": 1.0}]},
    "after": {"error": 0.1, "bins": []},
    "curve": [{"images_per_class": 2.0, "accuracy": 1.0, "images": 2}],
    "predictions": [
        {"file": "A", "class_name": "A", "predicted": "A", "probability": 0.9, "probabilities": {"A": 0.9, "b": 0.1}}
    ],
}


@pytest.fixture
def run_id(tmp_path, tracking_uri) -> str:
    """The id of a run without artifacts, which has trained the champion."""
    experiment = mlflow.create_experiment("champion", (tmp_path / "artifacts").as_uri())
    return mlflow.MlflowClient().create_run(experiment).info.run_id


def compare_on_test(monkeypatch, own: Evidence | None, test: str, run_id: str) -> Comparison:
    """Return the comparison of a candidate with a champion that guesses b for all that it is asked."""
    monkeypatch.setattr(metrics, "predict_files", lambda model, data, files: predict((f[-1] for f in files), "b"))
    results = metrics.summarize(predict(test))
    champion = SimpleNamespace(unwrap_python_model=lambda: None)
    return comparison.compare(None, results, own, make_test("ABCxz"), champion, "7", run_id)


@pytest.mark.parametrize("content", [EARLIER, None], ids=["version 1", "none"])
def test_champion_without_evidence_answers_test_images_alone(monkeypatch, run_id, content):
    if content:
        mlflow.MlflowClient().log_dict(run_id, content, "cross_validation.json")
    found = compare_on_test(monkeypatch, make_evidence("AB"), "Cz", run_id)
    assert (found.candidate, found.champion) == (predict("Cz"), predict("Cz", "b"))
    assert found.champion_training_images is None


def test_candidate_without_evidence_is_compared_on_test_images(monkeypatch, run_id):
    stored = make_evidence("ACx", held_out="Cx")
    mlflow.MlflowClient().log_dict(run_id, asdict(stored), "cross_validation.json")
    found = compare_on_test(monkeypatch, None, "ACz", run_id)
    assert (digests_of(found.champion), guesses(found.champion)) == ("Cz", "Ab")  # A has no prediction out of fold
    assert (found.training_images, found.champion_training_images, found.new_images) == (0, 3, 0)
    assert comparison.read_evidence(run_id) == stored


class Served:
    """A served model: its head gives each photo of class A a probability of 0.8, its code `shift` more.

    `asked` has the digests that its packaged code has answered.
    """

    def __init__(self, monkeypatch, shift: float = 0, first_layer: str = "backbone"):
        self.shift, self.first_layer, self.asked = shift, first_layer, ""
        monkeypatch.setattr(metrics, "predict_files", self.predict_files)

    def predict_files(self, model, data: DataVersion, files: list[str]) -> list[Prediction]:
        self.asked += "".join(file[-1] for file in files)
        rows = {"A": 0.8 + self.shift, "b": 0.2 - self.shift}
        return [replace(one, probability=rows["A"], probabilities=rows) for one in predict(file[-1] for file in files)]

    def unwrap_python_model(self):
        def head(features, training: bool) -> np.ndarray:
            assert np.linalg.norm(features, axis=1) == pytest.approx(LENGTH)
            return np.tile([0.8, 0.2], (len(features), 1))

        layers = [SimpleNamespace(name=self.first_layer), head]
        return SimpleNamespace(model=SimpleNamespace(layers=layers), class_names=["A", "b"])


GONE = Photo("T", "A", "T", "", FEATURES["T"])  # no longer in the folder


def test_head_predicts_all_but_the_probes(monkeypatch):
    champion = Served(monkeypatch)
    found = comparison.ask(champion, [*make_photos(LETTERS[:12]), GONE], make_test(LETTERS[:12]).data, {})
    assert champion.asked == LETTERS[: comparison.PROBES]
    assert sorted(digests_of(found)) == sorted(LETTERS[:12] + "T")
    assert {one.probabilities["A"] for one in found} == {0.8}
    assert [one.class_name for one in found if one.digest == "T"] == ["A"]


def test_served_predictions_are_the_probes(monkeypatch):
    candidate = Served(monkeypatch)
    served = {one.digest: one for one in candidate.predict_files(None, None, ["new/A", "new/B"])}
    found = comparison.ask(candidate, [*make_photos("ABC"), GONE], make_test("ABC").data, served)
    assert candidate.asked == "AB"
    assert sorted(digests_of(found)) == ["A", "B", "C", "T"]


@pytest.mark.parametrize(
    "options",
    [{"shift": 0.01}, {"first_layer": "resizing"}],
    ids=["other probabilities", "no backbone"],
)
def test_packaged_code_answers_where_features_do_not_agree(monkeypatch, options):
    champion = Served(monkeypatch, **options)
    found = comparison.ask(champion, [*make_photos(LETTERS[:12]), GONE], make_test(LETTERS[:12]).data, {})
    assert champion.asked == digests_of(found) == LETTERS[:12]  # what is gone cannot be asked about
    assert {one.probabilities["A"] for one in found} == {0.8 + options.get("shift", 0)}
