"""Candidate and champion on the same photos: only those that neither has learned from, or that it predicts out of fold."""

import json
from dataclasses import replace
from types import SimpleNamespace

from workflow.judging import comparison, evaluation
from workflow.records import DataVersion, Evidence, ImageFile, Prediction, Results

import numpy as np
import pytest
from mlflow.exceptions import MlflowException


def predict(digests: str, predicted: str | None = None, leaders: dict[str, str] | None = None) -> list[Prediction]:
    """Return a prediction for each photo, which is named by one letter; capitals are of class A, others of class b."""
    predictions = []
    for digest, guess in zip(digests, predicted or "A" * len(digests), strict=True):
        group = (leaders or {}).get(digest, digest)
        one = Prediction(f"new/{digest}", name_class(digest), guess, 0.9, {}, digest=digest, group=group)
        predictions.append(one)
    return predictions


def name_class(digest: str) -> str:
    return "A" if digest.isupper() else "b"


def make_evidence(digests: str, predictions: list[Prediction], sampled: bool = False) -> Evidence:
    """Return the evidence of a model that has learned from these photos, each its own group."""
    learned = {digest: (name_class(digest), digest) for digest in digests}
    return Evidence(None, None, {}, 1.0, None, None, [], predictions, sampled=sampled, learned=learned)


def make_data(digests: str, leaders: dict[str, str] | None = None) -> DataVersion:
    images = [ImageFile(f"new/{digest}", name_class(digest), digest) for digest in digests]
    return DataVersion("", "", images, leaders or {})


class Champion:
    """The evidence of a champion that has learned from A, B, x and y, and its answers to other photos."""

    def __init__(self, sampled: bool = False):
        old = [replace(one, file=f"old/{one.digest}") for one in predict("ABxy", "AbbA")]
        self.stored, self.asked = make_evidence("ABxy", old, sampled), []

    def answer(self, files: list[str]) -> list[Prediction]:
        self.asked += files
        return predict("".join(file[-1] for file in files), "b" * len(files))


def pair(champion: Champion, predictions: list[Prediction], data: DataVersion, own: Evidence | None = None):
    return comparison.pair(predictions, own, champion.stored, data, 1, "7", champion.answer)


def digests_of(predictions: list[Prediction]) -> str:
    return "".join(one.digest for one in predictions)


def test_stored_predictions_are_used_and_new_photos_are_asked():
    champion = Champion()
    found = pair(champion, predict("ABxCz"), make_data("ABCxyz"))
    assert found.candidate == predict("ABxCz")
    assert champion.asked == ["new/C", "new/z"]
    assert found.champion == predict("ABxCz", "Abbbb")  # out of fold: A is right, B wrong, x right
    assert found.version == "7"


def test_near_duplicate_of_a_learned_photo_is_left_out():
    leaders = {"A": "A", "C": "A", "z": "A"}
    champion = Champion()
    found = pair(champion, predict("CDz", leaders=leaders), make_data("ACDz", leaders))
    assert digests_of(found.candidate) == "D"
    assert champion.asked == ["new/D"]


def test_group_is_compared_on_its_photo_with_a_stored_prediction():
    leaders = {"A": "A", "C": "A"}
    champion = Champion()
    found = pair(champion, predict("CAD", leaders=leaders), make_data("ACD", leaders))
    assert digests_of(found.candidate) == "AD"
    assert champion.asked == ["new/D"]


def test_each_group_of_near_duplicates_counts_once():
    found = pair(Champion(), predict("CDE", leaders={"D": "C", "E": "C"}), make_data("CDE", {"D": "C", "E": "C"}))
    assert digests_of(found.candidate) == digests_of(found.champion) == "C"


def test_predictions_of_a_sample_are_not_compared():
    champion = Champion(sampled=True)
    found = pair(champion, predict("ABCz"), make_data("ABCxyz"))
    assert digests_of(found.candidate) == digests_of(found.champion) == "Cz"


def test_new_photos_and_new_labels_are_counted():
    own = make_evidence("ABCz", [])
    own.learned["B"] = ("b", "B")
    own.learned["D"] = ("A", "C")  # a near-duplicate of C, which is new
    own.learned["E"] = ("A", "A")  # a near-duplicate of A, which is not
    found = pair(Champion(), predict("AB"), make_data("ABCDEz"), own)
    assert (found.learned, found.champion_learned, found.new) == (4, 4, 3)  # B, C and z


def test_changed_label_holds_for_both_models():
    relabelled = [replace(one, class_name="b") for one in predict("B", "b")]
    found = pair(Champion(), relabelled, make_data("AB"))
    assert (found.candidate[0].class_name, found.champion[0].class_name) == ("b", "b")
    assert found.champion[0].correct


def test_candidate_without_evidence_has_learned_nothing_new():
    found = pair(Champion(), predict("CAD"), make_data("ABCD"))
    assert (found.learned, found.new) == (0, 0)


def test_many_photos_are_drawn_by_class_and_seed(monkeypatch):
    monkeypatch.setattr(comparison, "MAX_COMPARED", 10)
    digests = "ABCDEFGHIJKLMNOPQRSTabcdefghijklmnopqrst"
    predictions = predict(digests)
    first, again, other = (
        comparison.pair(predictions, None, Champion().stored, make_data(digests), seed, "7", Champion().answer)
        for seed in (1, 1, 2)
    )
    assert sorted(map(name_class, digests_of(first.candidate))) == ["A"] * 5 + ["b"] * 5
    assert first == again
    assert digests_of(first.candidate) == digests_of(first.champion) != digests_of(other.candidate)


def test_all_photos_that_were_not_learned_judge_the_candidate():
    results = Results(0.1, 1.0, {}, predict("CDE", leaders={"D": "A"}))
    evidence = make_evidence("AB", predict("AB"))
    assert digests_of(comparison.collect_predictions(results, evidence)) == "CEAB"
    sampled = make_evidence("AB", predict("AB"), sampled=True)
    assert digests_of(comparison.collect_predictions(results, sampled)) == "CE"
    assert comparison.collect_predictions(results, None) == results.predictions


EARLIER = {  # what the first release wrote
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


@pytest.mark.parametrize("content", [json.dumps(EARLIER), "{}", None], ids=["earlier release", "damaged", "none"])
def test_champion_without_evidence_answers_test_images_alone(tmp_path, monkeypatch, content):
    def download(run_id, artifact_path, dst_path):
        if content is None:
            raise MlflowException("no such artifact")
        (tmp_path / artifact_path).write_text(content)
        return str(tmp_path / artifact_path)

    def predict_files(model, data, files):
        return predict("".join(file[-1] for file in files), "b" * len(files))

    monkeypatch.setattr(comparison.mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr(evaluation, "predict_files", predict_files)
    test = SimpleNamespace(file_names=["new/C", "new/z"], data=make_data("ABCxyz"), seed=1)
    found = comparison.compare(predict("CzAB"), make_evidence("AB", []), test, None, "7", "run")
    assert (found.candidate, found.champion) == (predict("Cz"), predict("Cz", "bb"))
    assert found.champion_learned is None


def test_stored_evidence_is_read(tmp_path, monkeypatch):
    evidence = make_evidence("AB", predict("AB"))
    evidence.write(tmp_path / "cross_validation.json")
    monkeypatch.setattr(
        comparison.mlflow.artifacts, "download_artifacts", lambda **_: str(tmp_path / "cross_validation.json")
    )
    assert comparison.read_evidence("run") == evidence


class ServedChampion:
    """A served model whose head answers photo number n with n / 100, and its packaged code as it is told.

    `asked` has the files that its packaged code has answered.
    """

    model_config = {"class_names": ["A", "b"]}

    def __init__(self, monkeypatch, shift: float = 0, first_layer: str = "backbone"):
        self.shift, self.first_layer, self.asked = shift, first_layer, []
        monkeypatch.setattr(evaluation, "predict_files", self.predict_files)

    def predict_files(self, model, data, files: list[str]) -> list[Prediction]:
        self.asked += files
        found = {image.file: image for image in data.files}
        rows = [min(int(file[4:]) / 100 + self.shift, 1) for file in files]
        return [
            Prediction(file, "A", "b", 1 - row, {"A": row, "b": 1 - row}, digest=found[file].digest, group="g")
            for file, row in zip(files, rows, strict=True)
        ]

    def unwrap_python_model(self):
        def head(features, training):
            return np.stack([features[:, 0], 1 - features[:, 0]], axis=1)

        return SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(name=self.first_layer), head]))


def make_test(count: int, has_features: bool = True) -> SimpleNamespace:
    """Return a test dataset of so many photos, of which each second one is a near-duplicate."""
    images = [ImageFile(f"new/{number}", "A", f"digest {number}") for number in range(count)]
    leaders = {f"digest {number}": f"digest {number - 1}" for number in range(1, count, 2)}
    inputs = {image.digest: np.array([number / 100]) for number, image in enumerate(images)}
    return SimpleNamespace(data=DataVersion("", "", images, leaders), features=has_features or None, inputs=inputs)


def answer(champion: ServedChampion, test: SimpleNamespace) -> list[Prediction]:
    return comparison.answer(champion, test, [image.file for image in test.data.files])


def test_cached_features_answer_for_all_but_the_probes(monkeypatch):
    champion, test = ServedChampion(monkeypatch), make_test(20)
    found = answer(champion, test)
    assert champion.asked == [image.file for image in test.data.files[: comparison.PROBES]]
    assert [one.file for one in found] == [image.file for image in test.data.files]
    assert [one.digest for one in found] == [image.digest for image in test.data.files]
    assert [one.probabilities["A"] for one in found] == pytest.approx([number / 100 for number in range(20)])
    assert found[-1] == Prediction(
        "new/19", "A", "b", pytest.approx(0.81), found[-1].probabilities, digest="digest 19", group="digest 18"
    )


@pytest.mark.parametrize(
    ("options", "has_features"),
    [({"shift": 0.01}, True), ({}, False), ({"first_layer": "resizing"}, True)],
    ids=["other probabilities", "no features", "no backbone"],
)
def test_packaged_code_answers_where_features_do_not_agree(monkeypatch, options, has_features):
    champion, test = ServedChampion(monkeypatch, **options), make_test(20, has_features)
    found = answer(champion, test)
    assert champion.asked == [image.file for image in test.data.files]
    shift = options.get("shift", 0)
    assert [one.probabilities["A"] for one in found] == pytest.approx([shift + number / 100 for number in range(20)])


def test_few_photos_are_answered_by_the_packaged_code(monkeypatch):
    champion = ServedChampion(monkeypatch)
    assert len(answer(champion, make_test(comparison.PROBES))) == len(champion.asked) == comparison.PROBES
