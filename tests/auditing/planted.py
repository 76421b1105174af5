"""Small data sets with planted faults, in memory."""

import numpy as np
import PIL.Image

from mmrl_jax.auditing import reading
from mmrl_jax.auditing.samples import Episodes, ImageTexts
from mmrl_jax.data import images as images_lib

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "tan": (230, 210, 50),
}
NAMES = np.array(list(COLORS))
TEMPLATES = ("reach the {} block", "go to the {} block", "touch the {} thing")
QUESTIONS = ("What color is it?", "Which color has the object?")
GRASS = "What color is grass in summer?"


class Faults:
    """Disjoint random samples for each planted fault.

    Args:
      count: Number of samples.
      seed: Seed of the choice.
    """

    def __init__(self, count, seed):
        self._order = list(np.random.default_rng([seed, 1]).permutation(count))
        self.planted = {}

    def take(self, count):
        taken, self._order = self._order[:count], self._order[count:]
        return np.array(taken)

    def plant(self, name, count):
        self.planted[name] = self.take(count)
        return self.planted[name]

    def plant_copies(self, name, count):
        """Plants samples that repeat earlier ones, and returns both."""
        pairs = np.sort([self.take(count), self.take(count)], axis=0)
        self.planted[name] = pairs[1]
        return zip(*pairs, strict=True)


def squares(images):
    """Returns images of any aspect ratio as they are when they are read."""
    size = (min(images.shape[1:3]),) * 2
    if images.shape[1:3] == size:
        return images
    pictures = map(PIL.Image.fromarray, images)
    return np.stack([images_lib.fit(x, size, resize=reading.RESIZE) for x in pictures])


def shapes(rng, count, edge=48, aspect=1.0):
    """Returns images with an object of a color and a few gray ones, and the colors' numbers."""
    labels, width = rng.integers(0, len(COLORS), count), round(edge * aspect)
    images = np.empty((count, edge, width, 3))
    y, x = np.mgrid[:edge, :width]
    for image, label in zip(images, labels, strict=True):
        image[:] = rng.integers(10, 60, 3)
        for size, color in ((4, rng.integers(90, 130)), (6, COLORS[NAMES[label]])):
            i, j = rng.integers(8, edge - 8, 2)
            image[(abs(y - i) < size) & (abs(x - round(j * aspect)) < size)] = color
    return np.clip(images + rng.normal(0, 3, images.shape), 0, 255).astype(np.uint8), labels


def image_texts(seed, count=400, *, faults=True, aspect=1.0):
    """Returns records about colors, and the planted faults by the names of their checks."""
    rng, planted = np.random.default_rng(seed), Faults(count, seed)
    images, labels = shapes(rng, count, aspect=aspect)
    prompts, answers = rng.choice(QUESTIONS, count).astype(object), NAMES[labels].astype(object)
    if faults:
        gray = planted.plant("constant_image", count // 20)
        images[gray] = rng.integers(0, 256, (len(gray), 1, 1, 3))
        noise = planted.plant("noise_image", count // 20)
        images[noise] = rng.integers(0, 256, images[noise].shape)
        for i in planted.plant("label_noise", count // 5):
            answers[i] = rng.choice(NAMES[answers[i] != NAMES])
        easy = planted.plant("text_only", count // 10)
        prompts[easy], answers[easy] = GRASS, "green"
        for i, j in planted.plant_copies("near_duplicate", count // 20):
            brighter = images[i] + rng.normal(8, 3, images[i].shape)
            images[j] = np.clip(brighter, 0, 255).astype(np.uint8)
            prompts[j], answers[j] = prompts[i], answers[i]
    return records(squares(images), prompts, answers), planted.planted


def records(images, prompts, answers, split=None):
    """Returns records in memory."""
    ids = tuple(map(str, range(len(images))))
    split = np.zeros(len(images), int) if split is None else np.asarray(split)
    return ImageTexts(
        splits=("train", "test")[: split.max() + 1], split=split, ids=ids, digests=ids,
        unreadable=(), images=images, image_digests=ids, prompts=tuple(prompts),
        answers=tuple(answers),
    )  # fmt: skip


def episode(rng, *, random=False, edge=32, aspect=1.0):
    """Returns an episode in which a white square goes to one of three blocks in a plane."""
    blocks = rng.permutation(len(COLORS))[:3]
    # One block in each third of the width, so that none hides another.
    places = np.stack([rng.uniform(-0.8, 0.8, 3), rng.permutation([-0.65, 0.0, 0.65])], axis=1)
    goal, place = rng.integers(3), rng.uniform(-0.9, 0.9, 2)
    steps = int(rng.integers(16, 25)) + 1
    readings, actions = [], []
    pixels = np.full((steps, edge, round(edge * aspect), 3), 25, np.uint8)
    for image in pixels:
        for block, at in zip(blocks, places, strict=True):
            _draw(image, at, 2, COLORS[NAMES[block]])
        _draw(image, place, 1, 245)
        action = 3 * (places[goal] - place) + rng.normal(0, 0.15, 2)
        action = np.clip(rng.uniform(-1, 1, 2) if random else action, -1, 1)
        readings.append(place)
        actions.append(action)
        place = np.clip(place + 0.15 * action, -1, 1)
    return {
        "pixels": pixels,
        "proprio": np.array(readings, np.float32),
        "action": np.array(actions, np.float32),
        "name": NAMES[blocks[goal]],
        "others": [NAMES[block] for i, block in enumerate(blocks) if i != goal],
        "template": rng.choice(TEMPLATES),
    }


def _draw(image, at, half, color):
    i, j = np.round((at + 1) / 2 * (np.array(image.shape[:2]) - 1)).astype(int)
    image[max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1] = color


def episodes(seed, count=200, *, faults=True, aspect=1.0):
    """Returns demonstrations, and the planted faults by the names of their checks."""
    rng, planted, tenth = np.random.default_rng(seed), Faults(count, seed), count // 10
    random = set(planted.plant("random_actions", tenth)) if faults else set()
    several = [episode(rng, random=i in random, aspect=aspect) for i in range(count)]
    if faults:
        for i in planted.plant("mismatched_instruction", tenth):
            several[i]["name"] = rng.choice(several[i]["others"])
        for k, i in enumerate(planted.plant("broken_images", tenth)):
            part = several[i]["pixels"][len(several[i]["pixels"]) // 2 :]
            part[:] = rng.integers(0, 256, part.shape) if k % 2 else 0
        for i in planted.plant("frozen_images", tenth // 2):
            # A camera that is stuck shows only where something moves.
            while np.ptp(several[i]["proprio"], axis=0).max() < 0.8:
                several[i] = episode(rng, aspect=aspect)
            several[i]["pixels"][:] = several[i]["pixels"][:1]
        for i, j in planted.plant_copies("near_duplicate", tenth):
            several[j] = dict(several[i])
            for name, noise in (("proprio", 0.005), ("action", 0.01)):
                x = several[i][name]
                several[j][name] = (x + rng.normal(0, noise, x.shape)).astype(np.float32)
    return joined(several), planted.planted


def joined(several, split=None):
    """Returns episodes in memory."""
    starts = np.cumsum([0, *(len(x["action"]) for x in several)])
    arrays = {x: np.concatenate([y[x] for y in several]) for x in ("pixels", "proprio", "action")}
    has_action = np.ones(starts[-1], bool)
    has_action[starts[1:] - 1] = False
    split = np.zeros(len(several), int) if split is None else np.asarray(split)
    return Episodes(
        splits=("train", "test")[: split.max() + 1],
        split=split,
        ids=tuple(map(str, range(len(several)))),
        digests=("",) * len(several),
        unreadable=(),
        starts=starts,
        proprio=arrays["proprio"],
        action=arrays["action"],
        has_action=has_action,
        instructions=tuple(x["template"].format(x["name"]) for x in several),
        frames=reading.frames_of(squares(arrays["pixels"]), starts),
    )
