"""Classify photos of apples and oranges: the lab's pipeline as a student might write it."""

import os
from pathlib import Path

import keras
import mlflow
import requests
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
EXPERIMENT = "fruit"
IMAGES = os.environ.get(
    "IMAGES",
    "https://raw.githubusercontent.com/HOGENT-MLOps/mlops-labs/main/resources/02-ml-workflow/img-lab2",
)
DATASET = Path("dataset")
MODEL_FILE = "fruit.keras"
CLASSES = ("apple", "orange")
SIZE = 64
BATCH_SIZE = 8
EPOCHS = 3


@task(cache_policy=NO_CACHE)
def download_data() -> None:
    """Download images 1 to 8 for training, 9 for validation and 10 for testing."""
    for name in CLASSES:
        for number in range(1, 11):
            split = {9: "validation", 10: "test"}.get(number, "train")
            path = DATASET / split / name / f"{name}-{number}.jpeg"
            if not path.exists():
                response = requests.get(f"{IMAGES}/{name}s/{path.name}", timeout=30)
                response.raise_for_status()
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(response.content)


@task(cache_policy=NO_CACHE)
def preprocess_data():
    def read(split):
        images = keras.utils.image_dataset_from_directory(
            DATASET / split, image_size=(SIZE, SIZE), batch_size=None, seed=1, verbose=False
        )
        return images.batch(BATCH_SIZE)  # as the last step, where autologging finds the batch size

    return read("train"), read("validation"), read("test")


def build_network():
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(len(CLASSES), activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@task(cache_policy=NO_CACHE)
def train_model(train, validation):
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    mlflow.log_params({"epochs": EPOCHS, "batch_size": BATCH_SIZE})
    keras.utils.set_random_seed(1)
    model = build_network()
    model.fit(train, validation_data=validation, epochs=EPOCHS, verbose=0)
    model.save(MODEL_FILE)
    model.save_weights("fruit.weights.h5")
    mlflow.log_artifact("fruit.weights.h5", "weights")
    return MODEL_FILE


@task(cache_policy=NO_CACHE)
def evaluate_model(model_file, test):
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    model = keras.models.load_model(model_file)
    loss, accuracy = model.evaluate(test, verbose=0)
    mlflow.log_metrics({"test_loss": loss, "test_accuracy": accuracy})


def register_model(model_file):
    model = keras.models.load_model(model_file)
    logged = mlflow.keras.log_model(model, name="model", pip_requirements=["keras", "tensorflow"])
    mlflow.register_model(logged.model_uri, EXPERIMENT)


@flow(name="ml_workflow")
def ml_workflow():
    with mlflow.start_run():
        downloaded = download_data(return_state=True)
        train, validation, test = preprocess_data(wait_for=[downloaded])
        model_file = train_model(train, validation)
        evaluate_model(model_file, test)
        register_model(model_file)


def predict(image):
    model = mlflow.keras.load_model(f"models:/{EXPERIMENT}/latest")
    pixels = keras.utils.img_to_array(keras.utils.load_img(image, target_size=(SIZE, SIZE)))
    return CLASSES[model.predict(pixels[None]).argmax()]


if __name__ == "__main__":
    mlflow.set_tracking_uri(TRACKING_URI)
    mlflow.set_experiment(EXPERIMENT)
    mlflow.enable_system_metrics_logging()
    mlflow.set_system_metrics_sampling_interval(1)
    ml_workflow()
