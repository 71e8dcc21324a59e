"""Classifies images with the registered champion.

    python predict.py IMAGE|URL|FOLDER ... [--json] [--model models:/apples-oranges@champion]

Exit status 1 when an image could not be read; the others are answered all the same.
"""

import argparse
import glob
import itertools
import json
import os
import sys
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool  # its threads end with the program
from pathlib import Path

import tracking
from tracking import WorkflowError
from image_classifier import BATCH, fetch, is_url, read_image

import mlflow
import numpy as np
import requests
from mlflow.exceptions import MlflowException

PROJECT = Path(__file__).resolve().parent
TRACKING_URI = "http://127.0.0.1:5000"  # as in ml_workflow.py, whose import would cost another second
MODEL = "models:/apples-oranges@champion"


def list_sources(arguments: list[str]) -> Iterator[str]:
    """The files and URLs that the arguments name: folders with all files in them, patterns with all that match."""
    for argument in arguments:
        found = []
        if os.path.isdir(argument):
            for folder, inner, names in os.walk(argument):
                inner[:] = sorted(name for name in inner if not name.startswith("."))
                found += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
        elif not is_url(argument) and not os.path.lexists(argument):
            found = sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path))
        yield from found or [argument]


def read(source: str, size: int) -> np.ndarray | str:
    """The pixels of a file or URL, or the reason why there are none."""
    try:
        if is_url(source):
            return read_image(fetch(source), size)
        if os.path.isdir(source):
            return "a folder without images, or not readable"
        if os.path.exists(source) and not os.path.isfile(source):
            return "not a file"
        return read_image(Path(source), size)
    except requests.ConnectionError:
        return "the host cannot be reached"
    except ValueError as error:
        return str(error)


def classify(classifier, sources: Iterator[str]) -> Iterator[dict]:
    """An answer for each source: image, label, probability and probabilities, or image and error."""
    with ThreadPool() as pool:
        while batch := list(itertools.islice(sources, BATCH)):
            found = list(pool.imap(lambda source: read(source, classifier.image_size), batch))
            answers = iter(classifier.classify([pixels for pixels in found if not isinstance(pixels, str)]))
            for source, pixels in zip(batch, found, strict=True):
                answer = {"error": pixels} if isinstance(pixels, str) else next(answers).model_dump()
                yield {"image": source} | answer


def load(uri: str) -> tuple:
    """The classifier behind a model URI, and which version, run and data it is of.

    Raises WorkflowError when there is none.
    """
    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if uri.startswith("models:/") and alias:  # another version may become the champion meanwhile
            uri = f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        reason = tracking.first_line(error)
        raise WorkflowError(f"{uri} is not there, `python ml_workflow.py` makes a champion: {reason}") from error
    try:
        model = tracking.load_model(uri)
        classifier, digest = model.unwrap_python_model(), (model.metadata.metadata or {}).get("data_digest", "")
    except (*tracking.STORE_ERRORS, OSError, ValueError, ImportError) as error:
        raise WorkflowError(f"{uri} cannot be loaded: {tracking.first_line(error)}") from error
    if not hasattr(classifier, "classify"):
        raise WorkflowError(f"{uri} is not a model of this project")
    origin = f"{uri}{f' ({alias})' if alias else ''}, run {model.metadata.run_id}, data digest {digest[:12]}"
    return classifier, origin


def print_table(answers: Iterator[dict], widths: tuple[int, int]) -> bool:
    """Prints each answer as it comes; whether all images could be read."""
    good, (wide, narrow) = True, widths
    print(f"{'image':{wide}}  {'label':{narrow}}  probability")
    for answer in answers:
        good = good and "error" not in answer
        if "error" in answer:
            told = f"error: {answer['error']}"
        else:
            told = f"{answer['label']:{narrow}}  {answer['probability']:.4f}"
        print(f"{answer['image']:{wide}}  {told}", flush=True)
    return good


def parse_arguments() -> argparse.Namespace:
    parser = tracking.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|URL|FOLDER", help="a pattern such as 'photos/*.jpeg', too")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--model", default=MODEL, help="any MLflow model URI")
    return parser.parse_args()


def main() -> None:
    with tracking.command_line("predict.py"):
        arguments = parse_arguments()
        tracking.connect_mlflow(TRACKING_URI, PROJECT)
        classifier, origin = load(arguments.model)
        print(origin, file=sys.stderr if arguments.json else sys.stdout)
        sources = list(list_sources(arguments.images))
        answers = classify(classifier, iter(sources))
        if arguments.json:
            answers = list(answers)
            print(json.dumps(answers, indent=2))
            sys.exit(any("error" in answer for answer in answers))
        sys.exit(not print_table(answers, (max(map(len, sources)), max(map(len, classifier.class_names)))))


if __name__ == "__main__":
    main()
