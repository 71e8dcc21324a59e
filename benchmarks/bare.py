"""Our model as a plain Keras script, with nothing around it: no orchestration, no tracking, no checks.

    python benchmarks/bare.py FOLDER

What a run of ml_workflow.py takes longer is the price of Prefect, MLflow, the evidence and the gate. The networks are
those of the project; photos are read in the same way, but nobody checks them.
"""

import ast
import sys
import tempfile
import types
from pathlib import Path

import keras
import numpy as np
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
sys.modules["image_classifier"] = types.ModuleType("image_classifier")  # it would import MLflow, and is not called here
from workflow.model import backbone, network


def constants() -> dict:
    """The constants of ml_workflow.py that are plain values, without importing what it imports."""
    tree = ast.parse((PROJECT / "ml_workflow.py").read_text())
    plain = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {node.targets[0].id: node.value.value for node in plain}


def read(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        image.draft("RGB", (2 * size, 2 * size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0))


ours = constants()
epochs, batch_size = ours["EPOCHS"], ours["BATCH_SIZE"]
classes = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
keras.utils.set_random_seed(ours["SEED"])
splits = {"train": ([], []), "validation": ([], []), "test": ([], [])}
for label, folder in enumerate(classes):
    for number, path in enumerate(sorted(folder.iterdir())):
        pixels, labels = splits[{0: "validation", 1: "test"}.get(number % 10, "train")]
        pixels.append(read(path, backbone.IMAGE_SIZE))
        labels.append(label)
data = {
    name: (backbone.compute_features(np.stack(pixels)), np.array(labels)) for name, (pixels, labels) in splits.items()
}
model = network.build_head(len(classes), ours["DROPOUT"], seed=ours["SEED"])
network.compile_model(model, ours["LEARNING_RATE"], epochs * -(-len(data["train"][1]) // batch_size))
model.fit(*data["train"], batch_size, epochs, verbose=0, validation_data=data["validation"])
with tempfile.TemporaryDirectory() as folder:
    network.on_pixels(model, backbone.NAME).save(f"{folder}/model.keras")
    model.save_weights(f"{folder}/model.weights.h5")
assert not {"prefect", "mlflow"} & set(sys.modules)
print(model.evaluate(*data["test"], return_dict=True, verbose=0))
