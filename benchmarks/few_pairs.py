"""Fine-tunes the embedded model on few pairs that it never saw, and writes the table of what this changes.

    python benchmarks/few_pairs.py --data-root DATA

For each seed, the pairs come from one half of the images of Flickr8k's dev split, with one caption each. Retrieval is
measured on the other half, with five captions each, maps and presence on coco100. Arguments are those that `iclip
train pairs.csv` chooses, except for the learning rate and `keep_presence`. The features of the locked towers are the
same in all runs. They are computed once and kept in the folder `--output`.
"""

import argparse
import copy
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import command_line, mean_and_spread, remembered
from measuring import table as markdown
from transformers import ProgressCallback

from iclip_hf.backends.loading import load_iclip
from iclip_hf.data.pairs import load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.model.modeling_iclip import ICLIPModel
from iclip_hf.training import CachedPairs, FeatureCache, ICLIPTrainer, ICLIPTrainingArguments, PairCollator
from iclip_hf.training.arguments import FEW_PAIRS_KEEP_PRESENCE, FEW_PAIRS_RATE, FEW_PAIRS_STEPS


RECALLS = [f"{direction} R@{k}" for direction in ("image to text", "text to image") for k in (1, 5)]
MAPS = {"mMIoU": ".1f", "mFMB": ".3f", "text_contrast": ".1f"}
PRESENCE = {"auc": ".3f", "kept": ".1f", "passed": ".1f"}
COLUMNS = dict.fromkeys([*RECALLS, "mAP"], ".1f") | PRESENCE | MAPS


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/few_pairs"))
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4], help="peaks, for the batch")
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[0, FEW_PAIRS_KEEP_PRESENCE], help="values of keep_presence"
    )
    parser.add_argument("--steps", type=int, default=FEW_PAIRS_STEPS)
    args = parser.parse_args()

    study = Study(args)
    rows = {"the embedded model": [study.run(seed) for seed in args.seeds]}
    print(table(rows), flush=True)
    for count, rate, keep in itertools.product(args.pairs, args.rates, args.keep):
        runs = [study.run(seed, count, rate, keep) for seed in args.seeds]
        rows[f"{count} pairs, rate {rate:.0e}, keep_presence {keep:g}"] = runs
        print(table(rows).splitlines()[-1], flush=True)
    print(f"\n{args.output}: the features")


class Study:
    """The embedded model, the data, and the features that all runs share."""

    def __init__(self, args: argparse.Namespace):
        self.steps = args.steps
        self.start, self.processor = load_iclip("embedded")
        self.start.text_model.requires_grad_(False)
        pairs = load_pairs(args.data_root / "flickr8k" / "dev-00000.tar")
        self.cache = FeatureCache(self.start, self.processor, args.output)
        self.collator = PairCollator(self.processor, text_features=self.cache)
        self.pairs = CachedPairs(pairs, self.cache, self.collator)
        self.maps = load_segmentation("coco2017", args.data_root / "coco100", "train2017")
        self.start.encode_image = remembered(self.start.encode_image, {})
        self.start.encode_text = remembered(self.start.encode_text, {})

    def run(self, seed: int, count: int = 0, rate: float = FEW_PAIRS_RATE, keep: float = 0) -> dict[str, float]:
        """Returns the scores after fine-tuning on `count` pairs, or with 0 pairs those of the embedded model."""
        model = copy.deepcopy(self.start)
        seen, unseen = np.split(np.random.default_rng(seed).permutation(len(self.pairs)), 2)
        if count:
            self.fine_tune(model, seen[:count], seed, rate, keep)
        metrics = ["mAP", "presence", *MAPS]
        model_and_processor = (model.eval(), self.processor)
        result = evaluate_model(model_and_processor, self.maps, metrics=metrics, progress=False).results["itsm"]
        maps = {name: result[name][name.lower()] for name in ("mAP", *MAPS)}
        return {**self.retrieval(model, unseen), **maps, **{name: result["presence"][name] for name in PRESENCE}}

    def fine_tune(self, model: ICLIPModel, rows: np.ndarray, seed: int, rate: float, keep: float) -> None:
        training = [{**pair, "captions": pair["captions"][:1]} for pair in self.pairs.__getitems__(rows)]
        with tempfile.TemporaryDirectory() as folder:
            args = ICLIPTrainingArguments(
                folder,
                per_device_train_batch_size=min(len(rows), 256),
                max_steps=self.steps,
                learning_rate=rate,
                warmup_learning_rate=0.0,
                min_learning_rate=0.0,
                warmup_steps=0.1,
                keep_presence=keep,
                seed=seed,
                save_strategy="no",
                use_cpu=True,
                report_to="none",
            )
            trainer = ICLIPTrainer(model, args, self.collator, train_dataset=training, processing_class=self.processor)
            trainer.remove_callback(ProgressCallback)  # it prints between the rows of the table
            trainer.train()

    @torch.inference_mode()
    def retrieval(self, model: ICLIPModel, rows: np.ndarray) -> dict[str, float]:
        """Returns the recall at 1 and at 5 among these images and all their captions, in percent."""
        branch, pairs = model.recognition, self.pairs.__getitems__(rows)
        captions = [pair["captions"] for pair in pairs]
        texts = list(itertools.chain.from_iterable(captions))
        counts = torch.tensor([len(image_captions) for image_captions in captions])
        image_of_text = torch.arange(len(rows)).repeat_interleave(counts)
        matches = torch.arange(len(rows))[:, None] == image_of_text  # (images, texts)
        features = self.collator(pairs)["image_features"]
        features = {name: values.float() for name, values in features.items()}
        images = branch.embed_image(model.loss_inputs(features).pooled)
        cosines = images @ branch.embed_text(self.cache(texts)).mT
        return {
            f"{name} R@{k}": 100 * hits.gather(1, values.topk(k, 1).indices).any(1).float().mean().item()
            for name, values, hits in (("image to text", cosines, matches), ("text to image", cosines.T, matches.T))
            for k in (1, 5)
        }


def table(rows: dict[str, list[dict]]) -> str:
    """Returns mean and standard deviation over the seeds as Markdown."""

    def cells(seeds: list[dict]) -> list[str]:
        return [mean_and_spread([scores[column] for scores in seeds], digits) for column, digits in COLUMNS.items()]

    return markdown(["run", *COLUMNS], [[name, *cells(seeds)] for name, seeds in rows.items()])


if __name__ == "__main__":
    main()
