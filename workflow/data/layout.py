"""Recognize datasets without class folders: splits, folds, and images with separate labels.

Folder names are compared by their words: "Train_Images", "trainset" and "train2017" all mean the training split. A
class may still be named train (the vehicle) or test tubes: folders are splits only if their names differ in nothing but
the split, as cats_train and cats_test do. See explain_test_folder() for a single folder named test.
"""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from workflow.data.other_files import explain_clutter, is_hidden

MEANING_OF = {  # by word, in lowercase and without accents
    word: meaning
    for meaning, words in {
        "train": "train training trainings trainval entrainement entrenamiento treino обучение 训练 训练集",
        "validation": "val valid validation dev eval validatie validierung validacion validacao валидация 验证 验证集",
        "test": "test tests testing tst holdout unlabeled predict prediction prueba pruebas teste тест 测试 测试集",
        "fold": "fold folds kfold cv split splits shard chunk subset",
        "part": "part parts batch",  # only if the folders contain the same class folders
        "label": "label labels annotation annotations anns mask masks gt groundtruth segmentation segmentations bbox "
        "segmim",
        "": "image images img imgs rgb jpeg jpg photo photos picture pictures pic pics bilder foto fotos set sets data "
        "dataset datasets daten folder full final the new class classes object",  # ignored
    }.items()
    for word in words.split()
}
SPLITS = {"train", "validation", "test"}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")  # TestImages2 consists of Test and Images
SUFFIX = re.compile(r"(?:data|daten|sets?|images?|imgs?|bilder)+$")  # of compounds such as trainset
LABEL_FILES = {".txt", ".xml", ".json", ".csv", ".mat", ".npy"}


class Meaning(NamedTuple):
    """What the words of a folder's name mean."""

    kinds: set[str]  # values of MEANING_OF
    split: str | None  # train, validation or test; None if no word is a split, or several are
    rest: frozenset[str]  # other words, and those of splits if there are several


def read_name(name: str) -> Meaning:
    """Return the meaning of a folder's name, ignoring digits and single letters."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    words = {word.casefold() for word in WORD.findall(plain)}
    meanings = {word: MEANING_OF.get(word, MEANING_OF.get(SUFFIX.sub("", word))) for word in words if len(word) > 1}
    kinds = {kind for kind in meanings.values() if kind}
    splits = kinds & SPLITS
    split = "train" if splits == {"train", "validation"} else splits.pop() if len(splits) == 1 else None
    rest = {word for word, kind in meanings.items() if kind is None or (not split and kind in SPLITS)}
    return Meaning(kinds, split, frozenset(rest))


def list_folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder that may contain images, sorted by name."""
    with os.scandir(folder) as entries:  # much faster than Path.is_dir() for many files
        folders = [
            Path(entry.path)
            for entry in entries
            if (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
        ]
    return sorted(path for path in folders if not is_hidden(path) and not explain_clutter(path.name, is_folder=True))


def explain_layout(folder: Path) -> str:
    """Return the problem with a folder's layout, and the remedy; "" if its subfolders may be classes."""
    subfolders = list_folders(folder)
    reason = explain_split(folder, subfolders) or explain_labels(folder, subfolders)
    if reason := reason or explain_test_folder(folder, subfolders):
        return reason
    for subfolder in subfolders:
        inner = list_folders(subfolder)
        is_wrapper = len(subfolders) == 1 or any(len(list_folders(path)) > 1 for path in inner)
        if is_wrapper and (reason := explain_split(subfolder, inner)):
            return reason
        if reason := explain_labels(subfolder, inner):  # the model would learn labels that are images
            return reason
    return ""


def explain_split(folder: Path, subfolders: list[Path]) -> str:
    """Return the problem and the remedy if the subfolders of a folder are splits, folds or parts; "" if not."""
    parts = find_splits(subfolders) or find_parts(subfolders)
    parts = parts or find_splits_beside_classes(subfolders) or find_versions(subfolders)
    if not parts:
        return ""
    names = ", ".join(path.name for path in parts)
    problem = f"{folder} is already split ({names}), but this program splits the images itself"
    classes = [path for part in parts for path in list_folders(part)]
    if any("label" in read_name(path.name).kinds for path in classes):
        return f"{problem}, and classifies whole images; put the images of each class into a folder named after it"
    if classes:
        return f"{problem}; merge the images of each class into one folder, or use one of these folders as --source"
    return f"{problem}, and expects one folder per class; move the images of each class into a folder named after it"


def find_splits(subfolders: list[Path]) -> list[Path]:
    """Return the folders whose names differ only in the split, such as train and test, or cats_train and cats_test."""
    by_rest = defaultdict[frozenset[str], dict[Path, str]](dict)
    for path in subfolders:
        meaning = read_name(path.name)
        if meaning.split:
            by_rest[meaning.rest][path] = meaning.split
    return [path for splits in by_rest.values() if len(set(splits.values())) > 1 for path in splits]


def name_subfolders(folder: Path) -> set[str]:
    """Return the names of the subfolders of a folder, without links, which may lead to one of its parents."""
    return {path.name for path in list_folders(folder) if not path.is_symlink()} if not folder.is_symlink() else set()


def find_splits_beside_classes(subfolders: list[Path]) -> list[Path]:
    """Return the folders that repeat folders beside them: test/cats beside cats, or augmented/{cats,dogs}."""
    names = {path.name for path in subfolders}
    return [
        path for path in subfolders if len(names & name_subfolders(path)) > (0 if read_name(path.name).split else 1)
    ]


def find_versions(subfolders: list[Path]) -> list[Path]:
    """Return all subfolders if they share more than twice as many folder names as there are subfolders; else [].

    For example, color and gray may contain the same 38 classes. Apples and oranges may contain front and back.
    """
    names = list(map(name_subfolders, subfolders))
    return subfolders if len(names) > 1 and len(set.intersection(*names)) > 2 * len(names) else []


def explain_test_folder(folder: Path, subfolders: list[Path]) -> str:
    """Return the problem and the remedy if just one of three or more subfolders is a test folder without subfolders."""
    meanings = {path: read_name(path.name) for path in subfolders}
    tests = [path for path, meaning in meanings.items() if meaning.split == "test" and not meaning.rest]
    if len(tests) != 1 or len(subfolders) < 3 or list_folders(tests[0]):
        return ""
    return (
        f"{folder} holds class folders and {tests[0].name}, which seems to be a test set; move it elsewhere, or "
        "rename it if it is a class"
    )


def find_parts(subfolders: list[Path]) -> list[Path]:
    """Return all subfolders if they are named like folds, or like parts that have the same class folders; else []."""
    meanings = [read_name(path.name) for path in subfolders]
    if len(subfolders) < 2 or not all(
        meaning.kinds and meaning.kinds <= {"fold", "part"} and not meaning.rest for meaning in meanings
    ):
        return []
    classes = {frozenset(path.name for path in list_folders(subfolder)) for subfolder in subfolders}
    has_same_classes = len(classes) == 1 and len(classes.pop()) > 1
    return subfolders if has_same_classes or all("fold" in meaning.kinds for meaning in meanings) else []


def explain_labels(folder: Path, subfolders: list[Path]) -> str:
    """Return the problem and the remedy if the subfolders of a folder are images and their labels; "" if not."""
    meanings = {path: read_name(path.name) for path in subfolders}
    plain = [path for path, meaning in meanings.items() if not meaning.rest]
    labels = [path for path in plain if "label" in meanings[path].kinds]
    if not labels or len(plain) == len(labels):
        return ""
    if len(plain) < len(subfolders) and not all(map(has_label_files, labels)):
        return ""
    return (
        f"{folder} holds images and their labels or masks ({', '.join(path.name for path in plain)}), but this program "
        "classifies whole images; put the images of each class into a folder named after it"
    )


def has_label_files(folder: Path) -> bool:
    """Return whether a folder contains files, all of them with the suffix of a label file."""
    suffixes = {path.suffix.lower() for path in folder.iterdir() if path.is_file()}
    return bool(suffixes) and suffixes <= LABEL_FILES
