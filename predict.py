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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tracking
from image_classifier import fetch, read_image
from image_folder import visible
from ml_workflow import CHAMPION, EXPERIMENT, PROJECT, TRACKING_URI, is_url
from tracking import WorkflowError

import mlflow
import numpy as np
import requests
from mlflow.exceptions import MlflowException

MODEL = f"models:/apples-oranges@{CHAMPION}"
BATCH = 64  # images in memory at once


def list_sources(arguments: list[str]) -> Iterator[str]:
    """The files and URLs that the arguments name: folders with all that is in them, patterns with all that match."""
    for argument in arguments:
        path = Path(argument)
        if is_url(argument) or path.is_file():
            yield argument
        elif path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            yield from list_sources([str(inside) for inside in visible(path)])
        else:
            yield from sorted(glob.glob(argument, recursive=True)) or [argument]


def read(source: str, size: int) -> np.ndarray | str:
    """The pixels of a file or URL, or the reason why there are none."""
    try:
        return read_image(fetch(source) if is_url(source) else Path(source), size)
    except requests.ConnectionError:
        return "the host cannot be reached"
    except ValueError as error:
        return str(error)


def classify(model, info, sources: Iterator[str]) -> Iterator[dict]:
    """An answer for each source: image, label, probability and probabilities, or image and error."""
    names, size = info.metadata["class_names"], info.metadata["image_size"]
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(sources, BATCH)):
            found = list(pool.map(lambda source: read(source, size), batch))
            usable = [pixels for pixels in found if not isinstance(pixels, str)]
            rows = iter(model.predict(np.stack(usable), batch_size=BATCH, verbose=0) if usable else [])
            for source, pixels in zip(batch, found, strict=True):
                if isinstance(pixels, str):
                    yield {"image": source, "error": pixels}
                else:
                    chances = {name: float(chance) for name, chance in zip(names, next(rows), strict=True)}
                    label = max(chances, key=chances.get)
                    yield {"image": source, "label": label, "probability": chances[label], "probabilities": chances}


def load(uri: str):
    """The Keras model behind a model URI, and what MLflow knows of it; raises WorkflowError when there is none."""
    try:
        info = mlflow.models.get_model_info(uri)
        if {"class_names", "image_size"} <= (info.metadata or {}).keys():
            return mlflow.keras.load_model(uri), info
    except (MlflowException, OSError, ValueError) as error:
        reason = tracking.first_line(error)
        raise WorkflowError(f"{uri} cannot be loaded, `python ml_workflow.py` makes a champion: {reason}") from error
    raise WorkflowError(f"{uri} is not a model of this project: it does not say its classes and its image size")


def describe(uri: str, info) -> str:
    """Which version of which model from which run and data answers."""
    name, _, alias = uri.removeprefix("models:/").partition("@")
    if alias:
        uri = f"{name} version {mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}, the {alias}"
    return f"{uri}, of run {info.run_id}, data digest {info.metadata['data_digest'][:12]}"


def print_lines(answers: Iterator[dict]) -> bool:
    """Prints each answer as it comes; whether all images could be read."""
    good = True
    for answer in answers:
        good = good and "error" not in answer
        if "error" in answer:
            print(f"{answer['image']}: error: {answer['error']}", flush=True)
        else:
            print(f"{answer['image']}: {answer['label']} {answer['probability']:.3f}", flush=True)
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
        tracking.connect_mlflow(TRACKING_URI, PROJECT, EXPERIMENT)
        model, info = load(arguments.model)
        answers = classify(model, info, list_sources(arguments.images))
        if arguments.json:
            answers = list(answers)
            print(json.dumps(answers, indent=2))
            sys.exit(any("error" in answer for answer in answers))
        print(describe(arguments.model, info))
        sys.exit(not print_lines(answers))


if __name__ == "__main__":
    main()
