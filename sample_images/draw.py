"""Draw synthetic fruits: the apples and oranges that ml_workflow.py falls back to, and other data sets.

    python sample_images/draw.py FOLDER [--count N] [--size PIXELS] [--seed N] [--hard]

`python sample_images/draw.py sample_images` reproduces the images next to this file. With --hard, the set has two more
kinds that look like apples and oranges, bad photos, and data issues, so that the report of a run has something to show.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COUNT = 24  # images per class
SIZE = 320  # pixels, longer side
SEED = 12
QUALITY = 85  # JPEG
WRONG_EVERY = 12  # one of this many photos in the hard set is mislabeled
LIGHT = np.array([-0.45, -0.6, 0.66])  # direction to the light: upper left, toward the viewer
HALFWAY = (LIGHT + np.array([0, 0, 1])) / np.linalg.norm(LIGHT + np.array([0, 0, 1]))  # for highlights (Blinn, 1977)
SKINS = {  # main color and the color it fades to, RGB 0 to 255
    "apples": [
        ((178, 24, 32), (214, 74, 44)),
        ((150, 14, 30), (186, 40, 40)),
        ((132, 176, 52), (176, 204, 84)),
        ((196, 44, 40), (222, 190, 84)),
        ((208, 178, 66), (204, 96, 60)),
    ],
    "oranges": [((244, 132, 16), (250, 160, 40)), ((236, 112, 10), (246, 142, 24)), ((250, 154, 36), (246, 176, 66))],
    "peaches": [((238, 150, 76), (206, 74, 58)), ((246, 178, 96), (226, 112, 66)), ((236, 136, 48), (232, 110, 60))],
    "tomatoes": [((190, 30, 26), (210, 62, 34)), ((204, 44, 28), (226, 98, 44)), ((176, 26, 30), (200, 52, 44))],
}
KINDS = ("apples", "oranges")
GLOSS = {"apples": (190, 60), "oranges": (70, 18), "peaches": (24, 6), "tomatoes": (170, 45)}  # strength, sharpness
STARS = {"oranges": (0.1, 0.035), "tomatoes": (0.2, 0.12)}  # radius of the navel or calyx, and of its points
GROUNDS = [(222, 216, 204), (120, 82, 52), (70, 92, 118), (96, 128, 72), (190, 190, 196), (60, 56, 58), (206, 170, 128)]


def noise(shape, cell, rng):
    """Return smooth noise in -1..1 of shape (height, width), with blobs about `cell` pixels wide."""
    height, width = (max(2, round(side / cell)) for side in shape)
    coarse = Image.fromarray(rng.uniform(-1, 1, (height, width)).astype("float32"))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))


def background(shape, rng):
    """Return an unevenly lit background, plain or with a pattern: floats of shape (height, width, 3), 0 to 255."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    pattern = [
        lambda: np.zeros(shape),
        lambda: 18 * np.sin(x * rng.uniform(30, 70) + 3 * noise(shape, max(shape) / 4, rng)),
        lambda: 22 * (((x * 8).astype(int) + (y * 8).astype(int)) % 2 * 2 - 1),
        lambda: 24 * noise(shape, max(shape) / 25, rng) + 12 * noise(shape, max(shape) / 90, rng),
    ][rng.integers(4)]()
    color = np.array(GROUNDS[rng.integers(len(GROUNDS))]) * rng.uniform(0.8, 1.15)
    light = 1 + rng.uniform(-0.3, 0.3) * (x - 0.5) + rng.uniform(-0.3, 0.3) * (y - 0.5)
    return (color + pattern[..., None] + rng.normal(0, 3, (*shape, 1))) * light[..., None]


def surface(kind, shape, center, radius, tilt, rng):
    """Return the mask of a fruit (0 to 1), its shaded skin (RGB), and coordinates across and down (radius 1)."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    x, y = (x - center[0]) / radius, (y - center[1]) / radius
    across, down = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    angle, edge = np.arctan2(across, -down), np.ones(shape)  # angle 0 is at the stem
    if kind == "apples":  # a dimple at the stem, a smaller one below, narrower towards the bottom
        edge -= 0.2 * np.exp(-((angle / 0.42) ** 2)) + 0.05 * np.exp(-(((np.abs(angle) - np.pi) / 0.35) ** 2))
        edge -= 0.07 * np.clip(down, 0, 1)
    distance = np.hypot(across, down) / edge
    mask = np.clip((1 - distance) * radius / 1.5, 0, 1)
    height = np.sqrt(np.clip(1 - distance**2, 0, 1))
    normal = np.stack([x, y, height], axis=-1)
    if kind == "oranges":  # pores in the peel
        bumps = noise(shape, max(1.5, radius / 28), rng)
        normal[..., 0] += 0.14 * np.gradient(bumps, axis=1) * radius / 28
        normal[..., 1] += 0.14 * np.gradient(bumps, axis=0) * radius / 28
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-6
    main, blush_color = (np.array(color) for color in SKINS[kind][rng.integers(len(SKINS[kind]))])
    sun = rng.uniform(0, 2 * np.pi)  # the side that ripened first
    blush = np.clip(
        0.5 + 0.6 * (across * np.cos(sun) + down * np.sin(sun)) + 0.25 * noise(shape, radius / 3, rng), 0, 1
    )
    if kind == "apples":  # streaks from stem to bottom
        blush = np.clip(blush + 0.22 * np.sin(angle * 23 + 4 * noise(shape, radius / 2, rng)) * distance, 0, 1)
    diffuse = np.clip(normal @ LIGHT, 0, 1)[..., None]
    shine = np.clip(normal @ HALFWAY, 0, 1)[..., None]
    skin = (main + (blush_color - main) * blush[..., None]) * (0.32 + 0.78 * diffuse) + GLOSS[kind][0] * shine ** GLOSS[
        kind
    ][1]
    return mask, skin, across, down


def add_fruit(kind, pixels, center, radius, rng):
    """Paint a fruit with its shadow and its stem or navel into `pixels`, in place."""
    shape, tilt = pixels.shape[:2], rng.uniform(-0.5, 0.5)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    shadow = np.exp(-(((x - center[0] - 0.25 * radius) / (1.05 * radius)) ** 4))
    shadow *= np.exp(-(((y - center[1] - 0.85 * radius) / (0.32 * radius)) ** 2))
    pixels *= 1 - 0.55 * shadow[..., None]
    mask, skin, across, down = surface(kind, shape, center, radius, tilt, rng)
    if kind == "apples":
        hollow = np.exp(-((across / 0.3) ** 2) - ((down + 0.78) / 0.16) ** 2)
        skin = skin * (1 - 0.6 * hollow[..., None])
    elif kind == "peaches":  # the seam
        skin = skin * (1 - 0.35 * np.exp(-(((across - 0.2 * down) / 0.05) ** 2)) * (down < 0.4))[..., None]
    else:
        away, spokes = np.hypot(across - 0.15, down + 0.55), np.arctan2(down + 0.55, across - 0.15)
        star = np.clip(1 - away / (STARS[kind][0] + STARS[kind][1] * np.cos(5 * spokes)), 0, 1) ** 0.5
        skin = skin * (1 - star[..., None]) + np.array([86, 104, 40]) * star[..., None]
    pixels += (skin - pixels) * mask[..., None]
    if kind == "apples":
        add_stem(pixels, center, radius, tilt, leaf=rng.random() < 0.6, lean=rng.uniform(-0.2, 0.25))


def add_stem(pixels, center, radius, tilt, leaf, lean):
    """Paint the stem of an apple, with or without a leaf, into `pixels`, in place."""

    def place(across, down):
        x, y = across * np.cos(tilt) - down * np.sin(tilt), down * np.cos(tilt) + across * np.sin(tilt)
        return center[0] + radius * x, center[1] + radius * y

    image = Image.fromarray(np.clip(pixels, 0, 255).astype("uint8"))
    pen = ImageDraw.Draw(image)
    curve = [place(lean * t**2, -0.74 - 0.46 * t) for t in np.linspace(0, 1, 12)]
    pen.line(curve, fill=(82, 54, 30), width=max(2, round(radius / 11)), joint="curve")
    if leaf:
        t = np.linspace(0, 1, 16)
        upper = [place(lean / 3 + 0.62 * s, -1.0 - 0.16 * s - 0.17 * np.sin(np.pi * s)) for s in t]
        lower = [place(lean / 3 + 0.62 * s, -1.0 - 0.16 * s + 0.1 * np.sin(np.pi * s)) for s in t[::-1]]
        pen.polygon(upper + lower, fill=(72, 128, 44))
        pen.line([upper[0], upper[-1]], fill=(128, 170, 84), width=max(1, round(radius / 40)))
    pixels[:] = np.asarray(image)


def draw(kind, size, rng):
    """Return an RGB image of one to three fruits.

    Args:
        kind: a key of SKINS
        size: pixels of the longer side
        rng: a NumPy random generator
    """
    shape = [(size, size), (size * 3 // 4, size), (size, size * 3 // 4)][rng.integers(3)]
    pixels = background(shape, rng)
    count = rng.choice([1, 1, 1, 2, 2, 3])
    radius = min(shape) * rng.uniform(0.26, 0.4) / [1, 1.35, 1.6][count - 1]
    slots = (np.arange(count) + 0.5) / count * shape[1]
    for slot in rng.permutation(slots):
        radius_here = radius * rng.uniform(0.88, 1.12)
        across = np.clip(slot + rng.uniform(-0.07, 0.07) * shape[1], radius_here, shape[1] - radius_here)
        down = rng.uniform(min(1.3 * radius_here, shape[0] / 2), shape[0] - 1.1 * radius_here)
        add_fruit(kind, pixels, (across, down), radius_here, rng)
    image = Image.fromarray(np.clip(pixels * rng.uniform(0.85, 1.12), 0, 255).astype("uint8"))
    return image.filter(ImageFilter.GaussianBlur(size / 800))


def write(folder, count=COUNT, size=SIZE, seed=SEED):
    """Write `count` images of each kind to FOLDER/apples and FOLDER/oranges; the seed determines them."""
    for kind in KINDS:
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            rng = np.random.default_rng([seed, len(kind), number])
            draw(kind, size, rng).save(Path(folder, kind, f"synthetic-{kind[:-1]}-{number:02}.jpeg"), quality=QUALITY)


def worsen(image, rng):
    """Return the image as a bad photo: dark or pale, without contrast, out of focus and noisy."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.004, 0.016))), float)
    pixels = (pixels - 128) * rng.uniform(0.35, 0.8) + rng.uniform(70, 170) + rng.normal(0, 12, (*pixels.shape[:2], 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype("uint8"))


def write_hard(folder, count=COUNT, size=SIZE, seed=SEED):
    """Write bad photos of each kind to its own folder, with these data issues:

    - mislabeled: every WRONG_EVERY-th photo, wrong-NN.jpeg, shows the kind that looks like its class
    - near-duplicates: copy-01.jpeg, a smaller and brighter copy of the first photo of each class
    - outliers: oranges/odd.jpeg shows no fruit, and peaches/blank.jpeg has one color
    """
    lookalikes = {"apples": "tomatoes", "tomatoes": "apples", "oranges": "peaches", "peaches": "oranges"}
    for index, (kind, lookalike) in enumerate(lookalikes.items()):
        class_folder = Path(folder, kind)
        class_folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            rng = np.random.default_rng([seed, 100 + index, number])
            is_wrong = number % WRONG_EVERY == 0
            image = worsen(draw(lookalike if is_wrong else kind, size, rng), rng)
            image.save(class_folder / f"{'wrong' if is_wrong else 'photo'}-{number:02}.jpeg", quality=QUALITY)
            if number == 1:
                copy = image.resize((image.width * 3 // 4, image.height * 3 // 4)).point(lambda value: value * 1.1)
                copy.save(class_folder / "copy-01.jpeg", quality=QUALITY)
    stripes = (np.mgrid[:size, :size].sum(axis=0) // 9 % 2 * 255).astype("uint8")
    Image.fromarray(stripes).convert("RGB").save(Path(folder, "oranges/odd.jpeg"), quality=QUALITY)
    Image.new("RGB", (size, size), GROUNDS[0]).save(Path(folder, "peaches/blank.jpeg"), quality=QUALITY)


def main():
    parser = argparse.ArgumentParser(description="Draw apples and oranges.")
    parser.add_argument("folder", type=Path, help="where the class folders are written")
    parser.add_argument("--count", type=int, default=COUNT, help="images per class (default: %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of the longer side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="random seed (default: %(default)s)")
    parser.add_argument("--hard", action="store_true", help="two pairs of lookalike kinds, bad photos and data issues")
    arguments = parser.parse_args()
    (write_hard if arguments.hard else write)(arguments.folder, arguments.count, arguments.size, arguments.seed)


if __name__ == "__main__":
    main()
