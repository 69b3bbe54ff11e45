"""
Measures presence on photographs with complete labels. With `--held-out`, it first fits `presence_bias`, the only
parameter of presence, on other photographs.

    python benchmarks/presence.py --data-root DATA
    python benchmarks/presence.py --data-root DATA --held-out runs/held_out

`DATA/coco80` has 261 photographs of COCO in webdataset shards, whose `json` lists all COCO classes shown (`labels`).
`runs/held_out`, which `hold_out.py` writes, has rooms, streets and landscapes whose `json` also lists the names that
the labels are complete for (`complete`). The bias is fitted on both sets, which count equally.

The first two tables measure `coco100`, `ade20k` and `camvid`, on all images and on those at odd positions: the AUC,
the percentages of shown classes that are kept and of absent classes that pass, and the reliability. Two columns tell
how far the AUC depends on the image: the mean AUC of single classes, and the AUC if each class has its mean over all
images.

The tables of nouns measure all images of `coco100` and `ade20k`. For frequent classes they have the percentages kept
and passed. For the twenty most frequent classes they have the calibration: the share of images that show the class,
the mean presence with this share as the prior, which should equal the share, and the mean presence at the prior of
`explain` without texts.
"""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from measuring import command_line, shard_items
from measuring import table as markdown
from PIL import Image
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from iclip_hf import load
from iclip_hf.backends.embedded import vocabulary
from iclip_hf.data import load_segmentation
from iclip_hf.data.class_names import ADE20K, CAMVID, COCO_THINGS
from iclip_hf.model.engine import Engine
from iclip_hf.model.presence import MIN_PRESENCE, SURE_PRESENCE, at_prior


# Names of the background that the labels of `hold_out.py`'s shards are complete for, each in some of them.
BACKGROUND = """
    bridge building carpet ceiling curtain door fence field floor grass ground hill house mountain path pavement plant
    river road rock sand sea sky snow tree wall water window
""".split()
TEMPLATES = ["a photo of the {}"]
EDGES = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.001)
FREQUENT = ("person", "chair", "bottle")  # often called present where they are not shown
MOST_FREQUENT = 20


def labelled(folder: Path, names: Sequence[str]) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """
    Yields the images of shards and what is known of each name, (K,): 1 if it is shown, 0 if not, NaN if it is unknown.
    Labels that do not list what they are complete for are complete for all names.
    """
    for shard in sorted(folder.glob("*.tar")):
        for _, item in sorted(shard_items(shard)):
            image = Image.open(io.BytesIO(item["jpg"])).convert("RGB")
            record = json.loads(item["json"])
            complete = record["complete"] if isinstance(record.get("complete"), list) else names
            known = np.isin(names, record["labels"] + list(complete))
            yield image, np.where(known, np.isin(names, record["labels"]), np.nan)


def masked(dataset) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Yields the images of a segmentation data set and whether they show each class, (K,) boolean."""
    for sample in dataset:
        yield sample.image, np.isin(dataset.class_ids, sample.class_ids)


def measure(model, images: Iterator[tuple[Image.Image, np.ndarray]], names: tuple[str, ...]):
    """Returns the presence of each class, and whether the class is shown, both (images, K)."""
    engine, truth = Engine(model, model.processor, templates=TEMPLATES), []

    def prepared():
        for image, shown in images:
            truth.append(shown)
            yield engine.prepare(image, text_indices=[])

    scores = [explanation.all_scores for explanation in engine.run(prepared(), names, batch_size=16)]
    presences = [model.presence(image_scores).detach().numpy() for image_scores in scores]
    return np.stack(presences).astype(float), np.array(truth)


def mean_class_auc(presence: np.ndarray, shown: np.ndarray) -> float:
    """
    Returns the AUC of a class over the images, averaged over the classes. Classes that all images or none show are
    left out.
    """
    classes = np.flatnonzero(shown.any(0) & ~shown.all(0))
    return float(np.mean([roc_auc_score(shown[:, index], presence[:, index]) for index in classes]))


def fit(presences: Sequence[np.ndarray], shares: Sequence[float]) -> float:
    """
    Returns the number to add to the logits of all presences so that they are calibrated: with the share of shown pairs
    of a part as its prior, the mean presence of the part divided by this share is 1, on average over the parts.
    """
    logits = [logit(presence.clip(1e-12, 1 - 1e-12)) for presence in presences]

    def excess(bias: float) -> float:
        return sum(expit(part + bias + logit(share)).mean() / share - 1 for part, share in zip(logits, shares))

    return brentq(excess, -20, 20)


def kept_and_passed(presence: np.ndarray, shown: np.ndarray, names: Sequence[str]) -> list[str]:
    """
    Returns, for each of `FREQUENT` and for all classes together, the percentages of shown pairs and of absent pairs
    with a presence of at least 0.5; "-" if there are none.
    """

    def percent(passing: np.ndarray) -> str:
        return f"{100 * passing.mean():.1f}" if passing.size else "-"

    cells = []
    for chosen in (*(np.equal(names, name) for name in FREQUENT), np.full(len(names), True)):
        passing, truth = presence[:, chosen] >= MIN_PRESENCE, shown[:, chosen]
        cells.append(f"{percent(passing[truth])}, {percent(passing[~truth])}")
    return cells


def calibration(presence: np.ndarray, shown: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """Returns a row of the table of calibration for each of the most frequent classes."""
    shares, vocabulary_priors, rows = shown.mean(0), vocabulary(), []
    for index in np.argsort(-shares, kind="stable")[:MOST_FREQUENT]:
        priors = shares[index], vocabulary_priors.get(names[index])
        means = ["-" if prior is None else f"{at_prior(presence[:, index], prior).mean():.2f}" for prior in priors]
        rows.append([names[index], f"{shares[index]:.2f}", *means])
    return rows


def fit_bias(model, root: Path, held_out: Path) -> None:
    """Fits the `presence_bias` of a model on both sets, sets it, and prints it."""
    presences, shares = [], []
    for folder, names in ((root / "coco80", COCO_THINGS), (held_out, BACKGROUND)):
        presence, shown = measure(model, labelled(folder, names), names)
        known = ~np.isnan(shown)
        presences.append(presence[known])
        shares.append(shown[known].mean())
        alone = fit([presences[-1]], [shares[-1]])
        print(f"{folder.name}: {known.sum()} pairs, {shares[-1]:.3f} shown, alone {alone:+.3f}")
    model.network.config.presence_bias += fit(presences, shares)
    print(f"presence_bias = {model.network.config.presence_bias:.3f}\n")


def main():
    parser = command_line(__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of coco80, coco100, ade20k and camvid")
    parser.add_argument(
        "--held-out", type=Path, help="folder of shards that `hold_out.py` wrote, to fit presence_bias"
    )
    parser.add_argument("--model", default="embedded", help="as for load")
    args = parser.parse_args()
    model, root = load(args.model), args.data_root
    if not hasattr(model.network.config, "presence_bias") or model.network.config.logit_bias_init_value is None:
        parser.error(f"{args.model} was not trained with a sigmoid, so it has no presence.")

    if args.held_out:
        fit_bias(model, root, args.held_out)
    coco = load_segmentation("coco2017", root / "coco100", "train2017")
    ade20k = load_segmentation("ade20k", root / "ade20k")
    camvid = load_segmentation("camvid", root / "camvid")
    rows, bins, frequent, calibrations = [], [], [], []
    for title, dataset, names in (
        ("coco100", coco, COCO_THINGS),
        ("ade20k", ade20k, ADE20K),
        ("camvid", camvid, CAMVID),
    ):
        found, shown = measure(model, masked(dataset), names)
        if dataset is not camvid:  # all its images show nearly the same classes
            frequent.append([title, *kept_and_passed(found, shown, names)])
            calibrations.append((title, calibration(found, shown, names)))
        without_image = np.broadcast_to(logit(found.clip(1e-12, 1 - 1e-12)).mean(0), found.shape)
        for images, part in (("all", slice(None)), ("odd", slice(1, None, 2))):
            presence, truth = found[part], shown[part]
            shares = [
                100 * (presence[pairs] >= limit).mean()
                for limit in (MIN_PRESENCE, SURE_PRESENCE)
                for pairs in (truth, ~truth)
            ]
            auc, constant = (roc_auc_score(truth.ravel(), values[part].ravel()) for values in (found, without_image))
            aucs = [f"{value:.3f}" for value in (auc, mean_class_auc(presence, truth), constant)]
            rows.append([title, images, *aucs, *(f"{share:.1f}" for share in shares)])
            calibrated = at_prior(presence, truth.mean())
            masks = [(low <= calibrated) & (calibrated < high) for low, high in pairwise(EDGES)]
            cells = [
                f"{calibrated[mask].mean():.2f} / {truth[mask].mean():.2f} ({mask.sum()})" if mask.any() else "-"
                for mask in masks
            ]
            bins.append([title, images, f"{truth.mean():.3f}", *cells])
    headings = ["AUC", "of each class", "without the image", "kept", "passed", "kept, present", "passed"]
    print(markdown(["data", "images", *headings], rows))
    print()
    print(markdown(["data", "images", "prior", *(f"from {low}" for low in EDGES[:-1])], bins))
    print()
    print(markdown(["kept, passed at 0.5, %", *FREQUENT, "all classes"], frequent))
    for title, class_rows in calibrations:
        print()
        print(markdown([title, "shown", "mean presence at this prior", "at the prior without texts"], class_rows))


if __name__ == "__main__":
    main()
