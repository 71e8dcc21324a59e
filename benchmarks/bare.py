"""The model of ml_workflow.py as a plain Keras script, without orchestration, tracking or checks.

    python benchmarks/bare.py FOLDER --epochs 20 --batch-size 8 --learning-rate 0.03 --dropout 0.1 --seed 42

The additional time that ml_workflow.py takes is the cost of Prefect, MLflow, cross-validation and the gate. The
networks and the decoding of photos are the same. whole_run.py passes the defaults of ml_workflow.py as options, because
importing them would import Prefect and MLflow.
"""

import argparse
import sys
import tempfile
import types
from pathlib import Path

import lib  # noqa: F401  (makes the project importable)

import keras
import numpy as np
from PIL import Image

# The networks import only this name from image_classifier.py, which would import MLflow; nothing calls it here.
without_mlflow = types.ModuleType("image_classifier")
vars(without_mlflow)["read_image"] = None
sys.modules["workflow.image_classifier"] = without_mlflow


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="one folder of photos per class")
    for name in ("epochs", "batch-size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("learning-rate", "dropout"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser.parse_args()


def read_pixels(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))


def main() -> None:
    from workflow.model import backbone
    from workflow.model.head import add_backbone, build_head, compile_model

    arguments = parse_arguments()
    keras.utils.set_random_seed(arguments.seed)
    classes = sorted(path for path in arguments.folder.iterdir() if path.is_dir())
    splits = {"train": ([], []), "validation": ([], []), "test": ([], [])}
    for label, folder in enumerate(classes):
        for number, path in enumerate(sorted(folder.iterdir())):
            pixels, labels = splits[{0: "validation", 1: "test"}.get(number % 10, "train")]
            pixels.append(read_pixels(path, backbone.IMAGE_SIZE))
            labels.append(label)
    data = {
        name: (backbone.compute_features(np.stack(pixels)), np.array(labels))
        for name, (pixels, labels) in splits.items()
    }
    model = build_head(len(classes), arguments.dropout, seed=arguments.seed)
    steps = arguments.epochs * -(-len(data["train"][1]) // arguments.batch_size)
    compile_model(model, arguments.learning_rate, steps)
    model.fit(*data["train"], arguments.batch_size, arguments.epochs, verbose=0, validation_data=data["validation"])
    with tempfile.TemporaryDirectory() as folder:
        add_backbone(model).save(f"{folder}/model.keras")
        model.save_weights(f"{folder}/model.weights.h5")
    assert not {"prefect", "mlflow"} & set(sys.modules)
    print(model.evaluate(*data["test"], return_dict=True, verbose=0))


main()
