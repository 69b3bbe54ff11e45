"""Measures what `explain` finds without texts, on photographs whose classes are all annotated.

    python benchmarks/first_answer.py coco2017:COCO:train2017 ade20k:ADEChallengeData2016:validation

The table has for each data set the number of names that count as present, the share of photographs where two of them
have one mask (an IoU above 0.7, of refined maps), the share of photographs whose first name is an annotated class or
names people who are shown, and, of the names that are classes of the data set, the share that is shown. Other names,
about half, are not judged.
"""

import numpy as np
from measuring import command_line, table
from tqdm import tqdm

from iclip_hf import explain, load
from iclip_hf.data.class_names import SAME_CLASS
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.model.naming import PEOPLE


ONE_MASK = 0.7  # IoU
SYNONYMS = {name: names[0] for names in SAME_CLASS for name in names} | dict.fromkeys(PEOPLE, "person")


def measure(model, dataset) -> list[object]:
    classes = {class_id: SYNONYMS.get(name, name) for class_id, name in zip(dataset.class_ids, dataset.class_names)}
    counts, repeated, first_right, right = [], [], [], []
    for sample in tqdm(dataset):
        shown = {classes[class_id] for class_id in sample.class_ids}
        explanation = explain(model, sample.image)
        names = [SYNONYMS.get(name, name) for name, present in zip(explanation.labels, explanation.present) if present]
        masks = [explanation.mask(index).numpy() for index in range(len(names))]
        counts.append(len(names))
        repeated.append(any((a & b).sum() > ONE_MASK * (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]))
        if names and names[0] in classes.values():
            first_right.append(names[0] in shown)
        right += [name in shown for name in names if name in classes.values()]
    shares = [f"{100 * np.mean(values):.1f}" for values in (repeated, first_right, right)]
    return [len(dataset), f"{np.mean(counts):.1f}", *shares, sum(right)]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("datasets", nargs="+", metavar="NAME:FOLDER[:SPLIT]", help="data sets of load_segmentation")
    parser.add_argument("--model", default="embedded", help="as for load")
    args = parser.parse_args()
    model = load(args.model)
    rows = []
    for dataset in args.datasets:
        rows.append([dataset.partition(":")[0], *measure(model, load_segmentation(*dataset.split(":")))])
    shares = ["two with one mask %", "first name shown %", "names shown %"]
    print(table(["", "photographs", "names", *shares, "classes found"], rows))


if __name__ == "__main__":
    main()
