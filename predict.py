"""Classifies images with the registered champion, and tells how good it is on images whose class is known.

    python predict.py IMAGE|URL|FOLDER ... [--json] [--model models:/apples-oranges@champion]
    python predict.py FOLDER --score      # FOLDER has one folder of images per class
    python predict.py FOLDER --explain PICTURES   # shows what the model looked at, in a picture per image
    python predict.py --page              # a page in the browser to try it
    python predict.py --export FOLDER     # files for phones and small devices

Without --model the champion of the newest run answers.
Exit status 1 when an image could not be read; the others are answered all the same.
"""

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool  # its threads end with the program
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from workflow.cli import Parser, command_line
from workflow.data.download import fetch
from workflow.data.folder import list_visible, walk
from workflow.data.source import is_url
from workflow.errors import WorkflowError, explain_os_errors
from workflow.evaluation import metrics
from workflow.files import file_size, group, read_file, sha256, write_whole
from workflow.model import activation_maps, served_model
from workflow.model.novelty import FALSE_UNKNOWN_RATE
from workflow.model.served_model import Answer
from workflow.serving import registered_model
from workflow.settings import settings
from workflow.text import printable, to_text
from workflow.tracking.connection import command_for_predict, connect_mlflow

import requests
from mlflow.pyfunc import PyFuncModel

MOST_CONFUSED = 10  # pairs of classes that are printed
MIN_IMAGES_FOR_DRIFT = 10  # images, before anything is said of how many are unknown
MAX_STEM = 40  # characters of an image's name in the name of its picture: any file system has room for them


def list_sources(arguments: list[str]) -> Iterator[str]:
    """The files and URLs that the arguments name: folders with all files in them, patterns with all that match."""
    for argument in arguments:
        found = []
        if os.path.isdir(argument):
            found = list_folder(Path(argument))
        elif not is_url(argument) and not os.path.lexists(argument):
            found = sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path))
        yield from found or [argument]


def list_folder(folder: Path) -> list[str]:
    """The files in a folder and in all folders in it, and the folders that cannot be read.

    As in training, a class folder may be a link to one elsewhere. A link to a folder that this one lies in is left out.
    """
    unreadable: list[Path] = []
    found = walk(folder, unreadable)
    if folder not in unreadable:
        links = [path for path in list_visible(folder) if path.is_symlink() and os.path.isdir(path)]
        for link in links:
            if not folder.resolve().is_relative_to(link.resolve()):
                found += walk(link, unreadable)
    return [str(path) for path in [*found, *unreadable] if path in unreadable or not os.path.isdir(path)]


def read_source(source: str) -> bytes | str:
    """The content of a file or URL, or the reason why there is none."""
    try:
        if is_url(source):
            return fetch(source)
        if os.path.isdir(source):
            return "a folder without images, or not readable"
        if os.path.exists(source) and not os.path.isfile(source):
            return "not a file"
        return read_file(source)
    except requests.ConnectionError:
        return "the host cannot be reached"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def classify(model: PyFuncModel, sources: Iterator[str], folder: Path | None = None) -> Iterator[Answer]:
    """An answer for each source: image, label, probability and probabilities, or image and error.

    With a folder, also write a picture for each label, and add its path as `explanation`.
    """
    with ThreadPool() as pool:
        for batch in group(sources, file_size, metrics.MAX_BATCH_IMAGES, metrics.MAX_BATCH_BYTES):
            found = list(pool.imap(read_source, batch))
            answers = iter(served_model.predict(model, [content for content in found if isinstance(content, bytes)]))
            results: list[Answer] = []
            for source, content in zip(batch, found, strict=True):
                answer = next(answers) if isinstance(content, bytes) else content
                results.append({"image": source} | (answer if isinstance(answer, dict) else {"error": answer}))
            if folder:
                write_explanations(model, results, found, folder)
            yield from results


def write_explanations(model: PyFuncModel, answers: list[Answer], contents: list[bytes | str], folder: Path) -> None:
    """Write a picture of what the model looked at for each label, and add its path to the answer as `explanation`."""
    pairs = zip(answers, contents, strict=True)
    labelled = [(one, content) for one, content in pairs if "label" in one and isinstance(content, bytes)]
    pictures = activation_maps.explain_images(model.unwrap_python_model(), [content for _, content in labelled])
    for (answer, content), picture in zip(labelled, pictures, strict=True):
        if isinstance(picture, bytes):
            path = folder / name_picture(answer["image"], content)
            write_whole(path, picture, durable=False)
            answer["explanation"] = str(path)


def name_picture(source: str, content: bytes) -> str:
    """Return the name of the picture for a file or URL; images with different contents get different names."""
    stem = Path(urlsplit(source).path if is_url(source) else source).stem
    stem = re.sub(r"[^\w-]", "_", stem)[:MAX_STEM] or "image"
    return f"{stem}-{sha256(content)[:12]}.explained.jpg"


def describe_nearest(answer: Answer) -> str:
    """Return whether an image is unknown or unsure, and the training photo that it is nearest to, in words."""
    if answer["similarity"] is None:
        return ""
    doubt = "unsure; " if answer.get("unsure") else ""  # an older model has no limit for it
    doubt = "unknown: probably none of the classes; " if answer["unknown"] else doubt
    return f"{doubt}nearest is {printable(answer['nearest'])} ({answer['similarity']:.2f})"


def describe_drift(answers: list[Answer]) -> str:
    """A sentence that says so when clearly more images are unknown than the limit lets through; else ""."""
    told = [answer["unknown"] for answer in answers if answer.get("unknown") is not None]
    if len(told) < MIN_IMAGES_FOR_DRIFT or metrics.confidence_interval(sum(told), len(told))[0] <= OWN_UNKNOWN:
        return ""
    return (
        f"{sum(told)} of {len(told)} images are unknown, where about {FALSE_UNKNOWN_RATE:.0%} would be expected: "
        "they are unlike the training photos. If they are of the model's classes, add such photos and train again."
    )


def print_table(answers: Iterator[Answer], widths: list[int]) -> list[Answer]:
    """Prints each answer as it comes, and gives them all."""
    told, (wide, narrow) = [], widths
    print(f"{'image':{wide}}  {'label':{narrow}}  probability  training photos")
    for answer in answers:
        told.append(answer)
        if "error" in answer:
            line = f"error: {printable(answer['error'])}"
        else:
            line = f"{printable(answer['label']):{narrow}}  {answer['probability']:.4f}"
            if "similarity" in answer:  # an older model does not say it
                line += f"       {describe_nearest(answer)}"
        print(f"{printable(answer['image']):{wide}}  {line}", flush=True)
    return told


def find_label(image: str, named: list[tuple[str, ...]], names: list[str]) -> str:
    """The class whose folder holds an image: the first on the way to it from a folder that was named; "" for none.

    `named` has the parts of the paths of the folders on the command line, which may be class folders themselves.
    """
    path = Path(os.path.abspath(image))
    folders = [to_text(folder) for folder in path.parts[:-1]]
    above = max((len(parts) for parts in named if path.parts[: len(parts)] == parts), default=len(folders))
    return next((name for name in [*folders[above:], folders[above - 1]] if name in names), "")


def score(answers: list[Answer], arguments: list[str], names: list[str]) -> dict[str, Any]:
    """How good the answers are, where a folder that holds an image is named after its class.

    Raises WorkflowError when no image lies in a folder that is named after a class of the model.
    """
    predictions, others = [], 0
    named = [Path(os.path.abspath(argument)).parts for argument in arguments if os.path.isdir(argument)]
    for answer in answers:
        if "error" in answer:
            continue
        if label := find_label(answer["image"], named, names):
            predictions.append(metrics.to_prediction(answer["image"], label, answer))
        else:
            others += 1
    if not predictions:
        folders = " or ".join(names)
        raise WorkflowError(f"--score: no image lies in a folder that is named {folders}; --model asks another model")
    correct = sum(one.correct for one in predictions)
    sure = None if predictions[0].unsure is None else [one for one in predictions if not one.unsure]
    return {
        "images": len(predictions),
        "correct": correct,
        "accuracy": correct / len(predictions),
        "interval": metrics.confidence_interval(correct, len(predictions)),
        "sure": None if sure is None else {"images": len(sure), "correct": sum(one.correct for one in sure)},
        "recall": metrics.recall(predictions),
        "confusions": [
            {"class": label, "answer": predicted, "images": count}
            for label, predicted, count in metrics.confusions(predictions)
        ],
        "unknown": sum(bool(one.unknown) for one in predictions),
        "in_other_folders": others,
        "not_readable": len(answers) - len(predictions) - others,
    }


def print_score(result: dict[str, Any]) -> None:
    """Prints what score() gives."""
    low, high = result["interval"]
    correct, total, accuracy = result["correct"], result["images"], result["accuracy"]
    interval = f"95% confidence interval: {low:.3f} to {high:.3f}"
    print(f"\n{correct} of {total} images were classified correctly: accuracy {accuracy:.3f} ({interval}).")
    if result["sure"] and result["sure"]["images"]:
        sure, correct = result["sure"]["images"], result["sure"]["correct"]
        print(f"Unsure: {total - sure}; {correct} of the other {sure} are correct: accuracy {correct / sure:.3f}.")
    wide = max(map(len, result["recall"]))
    print(f"{'class':{wide}}  recall")
    for name, share in result["recall"].items():
        print(f"{printable(name):{wide}}  {share:.3f}")
    for pair in result["confusions"][:MOST_CONFUSED]:
        print(f"{printable(pair['class'])} taken for {printable(pair['answer'])}: {pair['images']}")
    for count, reason in (
        (result["unknown"], "are unknown: probably none of the classes"),
        (result["in_other_folders"], "lie in folders that are no class of this model, and do not count"),
        (result["not_readable"], "could not be read, and do not count"),
    ):
        if count:
            print(f"{count} image(s) {reason}.")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE|URL|FOLDER", help="a pattern such as 'photos/*.jpeg', too")
    parser.add_argument("--json", action="store_true", help="print one JSON array; with --score an object")
    parser.add_argument("--score", action="store_true", help="folders are named after classes: say how good it is")
    parser.add_argument("--model", metavar="URI", help="any MLflow model URI; without it, the newest run's champion")
    parser.add_argument("--explain", metavar="FOLDER", help="write a picture per image: what the model looked at")
    parser.add_argument("--page", action="store_true", help="serve a page on this machine to try the model")
    parser.add_argument("--export", metavar="FOLDER", help="write the model into it for phones and small devices")
    arguments = parser.parse_args()
    if bool(arguments.images) + arguments.page + bool(arguments.export) != 1:
        parser.error("name images to classify, or use --page, or --export FOLDER")
    if arguments.explain and not arguments.images:
        parser.error("--explain needs images to classify")
    return arguments


def load_model(arguments: argparse.Namespace) -> registered_model.RegisteredModel:
    """The model that is asked for; says which one it is, and which others there are when none was named."""
    uris = [arguments.model] if arguments.model else registered_model.find_champions()
    found = registered_model.load(uris[0])
    out = sys.stderr if arguments.json else sys.stdout
    print(printable(found.origin), file=out)
    words = ["--page"] if arguments.page else arguments.images[:1] or ["--export", arguments.export]
    for uri in uris[1 : 1 + registered_model.LISTED]:
        print(f"another model: {printable(command_for_predict(*words, '--model', uri))}", file=out)
    return found


def prepare_folder(explain: str | None, images: list[str], found: registered_model.RegisteredModel) -> Path | None:
    """Create the folder for --explain; None without this option.

    Raises WorkflowError when the model cannot explain its predictions, or the folder cannot be used.
    """
    if not explain:
        return None
    if not activation_maps.is_explainable(found.model.unwrap_python_model()):
        raise WorkflowError(f"--explain: {found.uri} has no backbone and cannot be explained; choose another --model")
    folder = Path(explain)
    for image in images:
        if os.path.isdir(image) and folder.resolve().is_relative_to(Path(image).resolve()):
            raise WorkflowError(f"--explain: {explain} lies in {image}, which would mix its pictures with your images")
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    with command_line("predict.py"):
        arguments = parse_arguments()
        connect_mlflow(settings.mlflow_url, settings.state)
        found = load_model(arguments)
        if arguments.page:
            from workflow.serving import page

            return page.serve(found)
        if arguments.export:
            from workflow.serving import litert

            print(*litert.export(found, Path(arguments.export)), sep="\n")
            return print(f"written to {printable(arguments.export)}: model.json says how to use it")
        model, names = found.model, found.class_names
        folder = prepare_folder(arguments.explain, arguments.images, found)
        sources = list(list_sources(arguments.images))
        coming = classify(model, iter(sources), folder)
        if arguments.json:
            answers = list(coming)
            told = (
                {"answers": answers, "score": score(answers, arguments.images, names)} if arguments.score else answers
            )
            print(json.dumps(told, indent=2))
        else:
            answers = print_table(coming, [max(len(printable(text)) for text in texts) for texts in (sources, names)])
            if arguments.score:
                print_score(score(answers, arguments.images, names))
            if drift := describe_drift(answers):
                print(drift)
        if folder:
            pictures = {answer["explanation"] for answer in answers if "explanation" in answer}
            out = sys.stderr if arguments.json else sys.stdout
            print(f"{len(pictures)} picture(s) written to {printable(str(folder))}", file=out)
        sys.exit(any("error" in answer for answer in answers))


if __name__ == "__main__":
    main()
