"""Classify images with the registered champion, or score it on labeled images.

    python predict.py IMAGE|URL|FOLDER|ZIP ... [--json] [--model models:/apples-oranges@champion]
    python predict.py FOLDER --score           # FOLDER has one folder of images per class
    python predict.py FOLDER --score --against models:/apples-oranges/1   # which of two models is better?
    python predict.py FOLDER --explain MAPS    # write heat maps of what the model looked at
    python predict.py FOLDER --output predictions.parquet  # or .csv, .jsonl: for many images; run it again to resume
    python predict.py --export FOLDER          # export the model for phones and small devices

Without --model, the champion of the newest run is used. Unreadable images are reported, and the exit status is then 1;
all other images are still classified.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves this folder out

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool  # its threads do not delay the exit
from typing import Annotated, Any
from urllib.parse import urlsplit

from workflow.cli import Parser, command_line, parse_as
from workflow.data.archive import archive_folder, unpack
from workflow.data.features import read_store, read_thumbnail, store_folder
from workflow.data.folder import is_listed_elsewhere, walk
from workflow.data.near_duplicates import MIN_COSINE, group_copies
from workflow.data.source import is_url
from workflow.errors import WorkflowError, explain_os_errors, first_line
from workflow.evaluation import metrics, scoring
from workflow.files import file_size, group, read_verified, sha256, write_whole
from workflow.image_classifier import Classifier
from workflow.model import activation_maps
from workflow.model.novelty import FALSE_UNKNOWN_RATE
from workflow.model.served_model import ServedPrediction
from workflow.records import DataVersion, ImageFile
from workflow.serving import output
from workflow.serving.batch import classify_contents, read_source
from workflow.serving.registered_model import (
    MAX_LISTED_MODELS,
    RegisteredModel,
    find_champions,
    find_common_classes,
    load,
    read_data,
)
from workflow.settings import settings
from workflow.text import printable
from workflow.tracking.connection import command_for, connect_mlflow

from mlflow.exceptions import MlflowException
from pydantic import Field

DATASET = settings.state / "dataset"  # contains cached thumbnails
PROGRESS_SECONDS = 10  # between progress lines, with --output
MIN_DRIFT_IMAGES = 10  # with fewer images, no drift warning is printed
MAX_STEM_LENGTH = 40  # characters of the image's name that are kept in the file name of its explanation
TOO_INACCURATE = 3  # exit status
Accuracy = Annotated[float, Field(ge=0, le=1)]
EXIT_STATUS = (
    "exit status: 0 if all images were classified, 1 if an image is unreadable or the command failed, 2 if it was "
    f"misused, {TOO_INACCURATE} if all images were classified but the accuracy is below --min-accuracy"
)


def list_sources(arguments: list[str]) -> Iterator[str]:
    """Yield files and URLs, expanding the folders and patterns in the arguments."""
    for argument in arguments:
        paths: Iterator[str] = iter(())
        if os.path.isdir(argument):
            paths = list_folder(Path(argument))
        elif not is_url(argument) and not os.path.lexists(argument):
            paths = iter(expand_pattern(argument))
        yield next(paths, argument)
        yield from paths


def unpack_archive(argument: str) -> str:
    """Unpack a ZIP file and return its folder; return other arguments unchanged."""
    path = Path(argument)
    if path.suffix.lower() != ".zip" or not path.is_file():
        return argument
    folder = archive_folder(path, DATASET)
    unpack(path, folder)
    return str(folder)


def expand_pattern(pattern: str) -> list[str]:
    """Return the files that match a pattern, without duplicates. Unlike in glob.glob(), `**` does not follow links."""
    if not any(letter in pattern for letter in "*?["):
        return []
    path = Path(pattern)
    parts = ["*" if "**" in part and part != "**" else part for part in path.relative_to(path.anchor).parts]
    if parts[-1] == "**":
        parts.append("*")
    files: dict[str, str] = {}  # by path without links
    for file in sorted(Path(path.anchor).glob(str(Path(*parts)))):
        is_hidden = any(part.startswith(".") and part not in ("..", *path.parts) for part in file.parts)
        if not is_hidden and file.is_file():
            files.setdefault(os.path.join(os.path.realpath(file.parent), file.name), str(file))
    return list(files.values())


def list_folder(folder: Path) -> Iterator[str]:
    """Yield the files in a folder and its subfolders, and any unreadable subfolders, which are reported like files.

    As in training, a class folder may be a symbolic link. Links to this folder, its parents or subfolders are skipped.
    """
    unreadable: list[Path] = []
    links = []
    for path in walk(folder, unreadable):
        if not os.path.isdir(path):
            yield str(path)
        elif path.parent == folder and not is_listed_elsewhere(path, folder):
            links.append(path)
    for link in links:
        yield from (str(path) for path in walk(link, unreadable) if not os.path.isdir(path))
    yield from map(str, unreadable)


def classify(classifier: Classifier, sources: Iterator[str], folder: Path | None = None) -> Iterator[ServedPrediction]:
    """Yield a dictionary for each source, with `image` and either the fields of the prediction or `error`.

    Given a folder, also write an explanation of each prediction to it, and add its path as `explanation`.
    """
    with ThreadPool() as pool:
        for batch in group(sources, file_size, metrics.MAX_BATCH_IMAGES, metrics.MAX_BATCH_BYTES):
            contents = pool.map(read_source, batch)
            classified = zip(batch, classify_contents(classifier, contents), strict=True)
            predictions: list[ServedPrediction] = [{"image": source} | fields for source, fields in classified]
            if folder:
                write_explanations(classifier, predictions, contents, folder)
            yield from predictions


def write_explanations(
    classifier: Any, predictions: list[ServedPrediction], contents: list[bytes | str], folder: Path
) -> None:
    """Write an activation map for each prediction, and add its path as `explanation`."""
    files = [content if isinstance(content, bytes) else b"" for content in contents]  # b"" is not an image
    overlays = activation_maps.explain_images(classifier, files)
    for prediction, content, overlay in zip(predictions, files, overlays, strict=True):
        if "label" in prediction and isinstance(overlay, bytes):
            path = folder / name_explanation(prediction["image"], content)
            write_whole(path, overlay)
            prediction["explanation"] = str(path)


def name_explanation(source: str, content: bytes) -> str:
    """Return a file name for the explanation of a file or URL, with a digest of the image's content."""
    stem = Path(urlsplit(source).path if is_url(source) else source).stem
    stem = re.sub(r"[^\w-]", "_", stem)[:MAX_STEM_LENGTH] or "image"
    return f"{stem}-{sha256(content)[:12]}.explained.jpg"


def describe_nearest(prediction: ServedPrediction) -> str:
    """Describe whether an image is unknown or its prediction unsure, and name the nearest training image."""
    if prediction.get("similarity") is None:  # no backbone, or an earlier version of the model
        return ""
    doubt = "unknown: probably none of the classes; " if prediction["unknown"] else ""
    doubt += "unsure; " if prediction.get("unsure") else ""
    return f"{doubt}nearest is {printable(prediction['nearest'])} ({prediction['similarity']:.2f})"


def describe_drift(unknown: int, images: int) -> str:
    """Return a warning if significantly more images are unknown than expected, otherwise ""."""
    if images < MIN_DRIFT_IMAGES or metrics.confidence_interval(unknown, images)[0] <= FALSE_UNKNOWN_RATE:
        return ""
    return (
        f"{unknown} of {images} images are unknown (expected: about {FALSE_UNKNOWN_RATE:.0%}). They "
        "differ from the training images; if they do show the model's classes, add similar images and retrain."
    )


def print_table(
    predictions: Iterator[ServedPrediction], sources: list[str], class_names: list[str]
) -> list[ServedPrediction]:
    """Print each prediction as soon as it is made, and return them all."""
    image_width, label_width = (max(len(printable(text)) for text in texts) for texts in (sources, class_names))
    print(f"{'image':{image_width}}  {'label':{label_width}}  probability  training photos")
    printed = []
    for prediction in predictions:
        printed.append(prediction)
        if "error" in prediction:
            line = f"error: {printable(prediction['error'])}"
        else:
            label, nearest = printable(prediction["label"]), describe_nearest(prediction)
            line = f"{label:{label_width}}  {prediction['probability']:.4f}       {nearest}".rstrip()
        print(f"{printable(prediction['image']):{image_width}}  {line}", flush=True)
    return printed


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__, epilog=EXIT_STATUS)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE|URL|FOLDER|ZIP", help="or a pattern, such as 'photos/*.jpeg'"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array; with --score, a JSON object")
    parser.add_argument("--score", action="store_true", help="measure the accuracy on class folders")
    parser.add_argument("--against", metavar="URI", help="with --score: another model to score and compare with")
    parser.add_argument(
        "--min-accuracy",
        metavar="X",
        type=parse_as(Accuracy),
        help="with --score: exit with status 3 if the measured accuracy is below X, such as 0.9. The lower end of its "
        "confidence interval is not compared, because with few images it is far lower even if all are correct",
    )
    parser.add_argument("--model", metavar="URI", help="MLflow model URI (default: the champion of the newest run)")
    parser.add_argument("--output", metavar="FILE", help="write the predictions to a .csv, .jsonl or .parquet file")
    parser.add_argument("--dask", metavar="ADDRESS", help="with --output: Dask scheduler, such as tcp://127.0.0.1:8786")
    parser.add_argument("--explain", metavar="FOLDER", help="write heat maps of what the model looked at to FOLDER")
    parser.add_argument("--export", metavar="FOLDER", help="export the model for phones and small devices to FOLDER")
    if "--page" in sys.argv[1:]:
        parser.error("--page was replaced by `python serve.py`")
    arguments = parser.parse_args()
    if bool(arguments.images) == bool(arguments.export):
        parser.error("pass either images to classify or --export FOLDER")
    if arguments.explain and not arguments.images:
        parser.error("--explain needs images to classify")
    if not arguments.score and (arguments.against or arguments.min_accuracy is not None):
        parser.error("--against and --min-accuracy need --score")
    if arguments.dask and not arguments.output:
        parser.error("--dask needs --output")
    if arguments.output and (arguments.json or arguments.score or arguments.explain or arguments.export):
        parser.error("--output cannot be combined with --json, --score, --explain or --export")
    if arguments.output and not arguments.output.lower().endswith(output.SUFFIXES):
        parser.error(f"--output: choose a file name that ends in {' or '.join(output.SUFFIXES)}")
    return arguments


def load_model(arguments: argparse.Namespace) -> RegisteredModel:
    """Load the selected model and print where it comes from; without --model, also list the other champions."""
    uris = [arguments.model] if arguments.model else find_champions()
    needs_keras = arguments.explain or arguments.export
    registered = load(uris[0], "Keras" if needs_keras else "LiteRT")
    out = sys.stderr if arguments.json else sys.stdout
    print(printable(f"{registered.origin}, {registered.runtime}"), file=out)
    if registered.why_keras:
        command = command_for("predict.py", "--export", "FOLDER", "--model", registered.uri)
        print(printable(f"Keras, because {registered.why_keras}; for a faster start: {command}"), file=out)
    words = arguments.images[:1] or ["--export", arguments.export]
    for uri in uris[1 : 1 + MAX_LISTED_MODELS]:
        print(f"another model: {printable(command_for('predict.py', *words, '--model', uri))}", file=out)
    return registered


def load_against(registered: RegisteredModel, arguments: argparse.Namespace) -> RegisteredModel | None:
    """Load the model given by --against and print where it comes from; return None if there is none."""
    if not arguments.against:
        return None
    against = load(arguments.against)
    find_common_classes(registered, against)  # fail before the images are classified
    print(printable(f"against {against.origin}"), file=sys.stderr if arguments.json else sys.stdout)
    return against


def prepare_folder(explain: str | None, images: list[str], registered: RegisteredModel) -> Path | None:
    """Create and return the folder given by --explain; return None if there is none.

    Raises:
        WorkflowError: the model has no backbone, or the folder is not writable or is inside an image folder
    """
    if not explain:
        return None
    if not activation_maps.is_explainable(registered.classifier):
        raise WorkflowError(
            f"--explain: {registered.uri} has no backbone, so its predictions cannot be explained; use another --model"
        )
    folder = Path(explain)
    check_outside("--explain", folder, images)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_outside(option: str, path: Path, images: list[str]) -> None:
    """Raise WorkflowError if the path given for an option is inside an image folder."""
    for image in images:
        if os.path.isdir(image) and path.resolve().is_relative_to(Path(image).resolve()):
            raise WorkflowError(f"{option}: {path} is inside {image}; choose a path outside your image folders")


def write_output(registered: RegisteredModel, arguments: argparse.Namespace) -> int:
    """Write the predictions to the file given by --output, print the counts, and return the exit status."""
    path, start = Path(arguments.output), time.monotonic()
    printed = start

    def describe(counts: Counter[str]) -> str:
        rate = (counts["classified"] + counts["errors"]) / (time.monotonic() - start)
        numbers = f"{counts['classified']:,} classified, of which {counts['unknown']:,} unknown"
        return f"{numbers}; {counts['errors']:,} errors; {counts['skipped']:,} already in the file; {rate:.1f} images/s"

    def report(counts: Counter[str]) -> None:
        nonlocal printed
        if time.monotonic() - printed > PROGRESS_SECONDS:
            printed = time.monotonic()
            print(describe(counts), flush=True)

    check_outside("--output", path, arguments.images)
    counts = output.write_predictions(registered, list_sources(arguments.images), path, arguments.dask, report)
    print(f"{describe(counts)}; written to {printable(arguments.output)}")
    if drift := describe_drift(counts["unknown"], counts["classified"]):
        print(drift)
    return 1 if counts["errors"] else 0


def predict_images(registered: RegisteredModel, against: RegisteredModel | None, arguments: argparse.Namespace) -> int:
    """Classify the images, print the results, and return the exit status."""
    folder = prepare_folder(arguments.explain, arguments.images, registered)
    sources = list(list_sources(arguments.images))
    served = classify(registered.classifier, iter(sources), folder)
    predictions = list(served) if arguments.json else print_table(served, sources, registered.class_names)
    scores = score_images(predictions, registered, against, sources, arguments) if arguments.score else {}
    if arguments.json:
        print(json.dumps({"predictions": predictions, **scores} if scores else predictions, indent=2))
    else:
        unknown = [item["unknown"] for item in predictions if item.get("unknown") is not None]
        for line in [*scoring.describe(scores), *filter(None, [describe_drift(sum(unknown), len(unknown))])]:
            print(line)
    if folder:
        explanations = {item["explanation"] for item in predictions if "explanation" in item}
        out = sys.stderr if arguments.json else sys.stdout
        print(f"{len(explanations)} explanation(s) written to {printable(str(folder))}", file=out)
    if any("error" in item for item in predictions):
        return 1
    return 0 if not scores or scores["score"].get("passed", True) else TOO_INACCURATE


def score_images(
    predictions: list[ServedPrediction],
    registered: RegisteredModel,
    against: RegisteredModel | None,
    sources: list[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return `score` and, with --against, `against` and `comparison`, on the classes that both models have.

    Args:
        predictions: those of `registered` for the sources
        registered: the model to score
        against: the model to compare it with, or None
        sources: images to classify with `against`
        arguments: parsed arguments
    """
    class_names = find_common_classes(registered, against)
    data = {model.uri: read_data(model.run_id) for model in filter(None, [registered, against])}
    copy_of = find_copies(predictions, list(data.values()))

    def score(model: RegisteredModel, predicted: list[ServedPrediction]) -> scoring.Score:
        digests = {image.digest for image in list_training_images(data[model.uri])}
        return scoring.score(model.uri, predicted, arguments.images, class_names, digests, copy_of)

    scored = score(registered, predictions)
    if (minimum := arguments.min_accuracy) is not None:
        scored.values.update(min_accuracy=minimum, passed=scored.values["accuracy"] >= minimum)
    if not against:
        return {"score": scored.values}
    other = score(against, list(classify(against.classifier, iter(sources))))
    return {"score": scored.values, "against": other.values, "comparison": scoring.compare(scored, other)}


def list_training_images(data: DataVersion) -> list[ImageFile]:
    return [image for image in data.files if image.split in ("train", "validation")]


def find_copies(predictions: list[ServedPrediction], versions: list[DataVersion]) -> dict[str, str]:
    """Map the digest of each copy of another image, such as a smaller copy, to the original's digest.

    Training images of the data versions are included if their thumbnails are cached or their files still exist. Crops
    are detected only for the training image that is nearest according to the model of the first version.
    """
    files = {image.digest: data.path_of(image.file) for data in versions for image in list_training_images(data)}
    thumbnails = {digest: row.thumbnail for digest, row in read_store(store_folder(DATASET), files).items()}
    classified = [item for item in predictions if "digest" in item]
    files |= {item["digest"]: Path(item["image"]) for item in classified}
    for digest, path in files.items():
        if digest not in thumbnails:
            with suppress(OSError, ValueError):  # a URL, or a file that was removed or has changed
                thumbnails[digest] = read_thumbnail(read_verified(path, digest))
    by_file = versions[0].by_file
    nearest = [
        (item["digest"], by_file[item["nearest"]].digest)
        for item in classified
        if (item.get("similarity") or 0) > MIN_COSINE and item["nearest"] in by_file
    ]
    return group_copies(thumbnails, nearest)


@contextmanager
def print_error_as_json(is_json: bool) -> Iterator[None]:
    """With --json, print an object with the key `error` if the block fails; the error is still raised."""
    try:
        yield
    except (WorkflowError, MlflowException) as error:
        if is_json:
            print(json.dumps({"error": first_line(error)}))
        raise


def main() -> None:
    with command_line("predict.py"):
        arguments = parse_arguments()
        with print_error_as_json(arguments.json):
            connect_mlflow(settings.mlflow_url, settings.state)
            registered = load_model(arguments)
            arguments.images = list(map(unpack_archive, arguments.images))
            if arguments.export:
                from workflow.serving import litert

                print(*litert.export(registered, Path(arguments.export)), sep="\n")
                print(f"Written to {printable(arguments.export)}; model.json documents how to use the model")
            elif arguments.output:
                sys.exit(write_output(registered, arguments))
            else:
                sys.exit(predict_images(registered, load_against(registered, arguments), arguments))


if __name__ == "__main__":
    main()
