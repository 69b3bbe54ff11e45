"""Trains miniatures of CLIP, one for each seed, and writes the table and a picture of their maps by several methods.

    python benchmarks/clip_like.py --data-root DATA

As in CLIP, a contrastive loss trains the output of the class token, and nothing trains the outputs of the patches. The
last block of DINOv2, the norm after it and the projections are trained from new weights. All else is locked, so the
tokens that enter this block are computed once.
"""

from importlib.resources import files
from pathlib import Path

import torch
from measuring import command_line, has_bfloat16, mean_and_spread, table
from torch import nn
from tqdm import tqdm

from iclip_hf import load
from iclip_hf.backends.towers import embedded_towers
from iclip_hf.cli import main as iclip
from iclip_hf.data.pairs import PairDataset, load_pairs
from iclip_hf.data.segmentation import load_segmentation
from iclip_hf.evaluation.evaluate import evaluate_model
from iclip_hf.model.losses import contrastive_loss
from iclip_hf.model.modeling_iclip import ICLIPModel
from iclip_hf.model.processing_iclip import ICLIPProcessor


METHODS = ["itsm", "reversed_itsm", "naclip", "maskclip", "gem", "clip_surgery", "sclip", "clearclip", "attention"]
METRICS = {"mAP": ".1f", "mMIoU": ".1f", "mFMB": ".3f", "text_contrast": ".1f"}
BATCH, EPOCHS = 500, 10


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/clip_like"), help="folder of models, table, picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    towers = [str(folder) for folder in embedded_towers()]
    processor = ICLIPProcessor.from_vision_text_pretrained(*towers)
    pairs = load_pairs(f"{args.data_root}/flickr8k/train-{{00000..00002}}.tar")
    dataset = load_segmentation("coco2017", args.data_root / "coco100", "train2017")
    inputs, scores = None, []
    for seed in args.seeds:
        torch.manual_seed(seed)
        as_clip = {"pooling": "class_token", "dual_projection": False, "map_attention": "none"}
        model = ICLIPModel.from_vision_text_pretrained(*towers, **as_clip)
        inputs = inputs or features(model, processor, pairs)
        train(model, *inputs)
        model.save_pretrained(args.output / f"seed{seed}")
        processor.save_pretrained(args.output / f"seed{seed}")
        scores.append(evaluate_model((model, processor), dataset, METHODS, [*METRICS]).results)
    rows = []
    for method in METHODS:
        values = {name: [results[method][name][name.lower()] for results in scores] for name in METRICS}
        rows.append([f"`{method}`", *(mean_and_spread(values[name], digits) for name, digits in METRICS.items())])
    report = table(["method", "mAP %", "mMIoU %", "mFMB", "text contrast %"], rows)
    (args.output / "clip_like.md").write_text(report + "\n")
    print(report)
    model = ["--model", f"{args.output}/seed{args.seeds[0]}", "--methods", *METHODS[:3]]
    photograph = str(files("sklearn") / "datasets" / "images" / "flower.jpg")
    iclip(["compare", photograph, "--text", "flower", *model, "--output", f"{args.output}/clip_like.jpg"])


@torch.no_grad()
def features(model: ICLIPModel, processor: ICLIPProcessor, pairs: PairDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns for each image the tokens that enter the last block, (N, L, D) float16, and the text tower's features of
    the five captions, (N, 5, D).
    """
    explained, inputs, texts = load((model, processor)), [], []
    for start in tqdm(range(0, len(pairs), 50), "Features"):
        rows = range(start, min(start + 50, len(pairs)))
        pixel_values = processor(images=[pairs.image(row) for row in rows])["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            _, (record,) = explained.trace(pixel_values)
        inputs.append(record.stream.half())
        captions = [caption for row in rows for caption in pairs.captions(row)]
        texts.append(model.encode_text(**processor(text=captions))[0].unflatten(0, (len(rows), -1)))
    return torch.cat(inputs), torch.cat(texts)


def train(model: ICLIPModel, inputs: torch.Tensor, texts: torch.Tensor) -> None:
    """Trains the last block, the final norm and the projections in place."""
    block, norm, branch = model.vision_model.encoder.layer[-1], model.vision_model.layernorm, model.recognition
    for module in (*block.modules(), norm):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if hasattr(module, "lambda1"):  # of a layer scale, which CLIP does not have
            nn.init.ones_(module.lambda1)
    weights = [*block.parameters(), *norm.parameters(), *branch.parameters()]
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights], weight_decay=0.05)
    steps = len(inputs) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=EPOCHS * steps)
    for _ in tqdm(range(EPOCHS), "Epochs"):
        for rows in torch.randperm(len(inputs)).split(BATCH)[:steps]:
            images = branch.embed_image(norm(class_token(block, inputs[rows].float())))
            captions = texts[rows, torch.randint(texts.shape[1], (len(rows),))]
            logits = branch(images @ branch.embed_text(captions).mT)
            loss = contrastive_loss(logits, logits.mT, offset=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def class_token(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """
    Returns the first token after a block of DINOv2, (B, D), from all tokens before it, (B, L, D). Instead of keys and
    values of all tokens, it computes the query times the weights of the keys, and the values of the mean tokens.
    """
    attention, normed = block.attention, block.norm1(tokens)
    heads = (-1, attention.head_dim)
    query = attention.q_proj(normed[:, 0]).unflatten(-1, heads)  # (B, H, d)
    query = torch.einsum("bhd,hdc->bhc", query, attention.k_proj.weight.unflatten(0, heads))  # a bias cancels out
    mean = (attention.scaling * query @ normed.mT).softmax(-1) @ normed  # (B, H, D)
    value = torch.einsum("bhc,hdc->bhd", mean, attention.v_proj.weight.unflatten(0, heads)).flatten(1)
    first = tokens[:, 0] + block.layer_scale1(attention.o_proj(value + attention.v_proj.bias))
    return first + block.layer_scale2(block.mlp(block.norm2(first)))


if __name__ == "__main__":
    main()
