"""Trains the feature network of the offline Frechet distance; run as `python -m qdm_cli.engine.zoo.train_features --out DIR`.

Resumable: a state file is replaced every `--save-every` updates, and the batch of update k depends on (seed, k) alone.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch

from qdm_cli.engine.checkpoint import flatten_optimizer, read_tensors, restore_optimizer, write_tensors
from qdm_cli.engine.evaluation.distribution import floor_of
from qdm_cli.engine.evaluation.fashion import REFERENCE_FILE, WEIGHTS_FILE, FashionFeatures
from qdm_cli.engine.evaluation.frechet import gaussian_of
from qdm_cli.engine.zoo.fashion import load_split


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear to the peak over the first fifth, then linear to 0."""
    rise = max(1, total // 5)
    return peak * min((step + 1) / rise, (total - step) / (total - rise))


def draw_batch(images: torch.Tensor, labels: torch.Tensor, *, step: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch of update `step`: [B, 1, 32, 32] f32 in [0, 1], half of the images mirrored, and [B] labels.

    Each epoch visits every image once, but for the remainder of a batch.
    """
    per_epoch = len(images) // batch
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    picks = order[position * batch : (position + 1) * batch]
    mirrored = torch.rand(batch, generator=torch.Generator().manual_seed(seed * 1_000_003 + 7919 * step + 1)) < 0.5
    x = images[picks].float() / 255
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x), labels[picks]


def features_and_accuracy(network: FashionFeatures, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Penultimate features [N, 64] and the share of right labels."""
    network.eval()
    with torch.no_grad():
        features = torch.cat([network(part) for part in images.split(500)])
        hits = (network.head(features).argmax(1) == labels).float().mean().item()
    return features, hits


def write_reference(folder: Path, features: torch.Tensor, meta: dict) -> dict:
    """Write the statistics of the test features with their floors (even against odd images) and return what was recorded."""
    frechet, kid = floor_of(features)
    meta = {
        **meta,
        "n": len(features),
        "floor": {"frechet": frechet, "kid": kid, "n": len(features) // 2},
        "weights_sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }
    moments = gaussian_of(features)
    tensors = {"mean": moments.mean, "covariance": moments.covariance, "features": features.half()}
    write_tensors(folder / REFERENCE_FILE, tensors, meta)
    return meta


def train(network: FashionFeatures, args: argparse.Namespace) -> float:
    """Run, or finish, all updates; returns the seconds spent over all sittings."""
    images, labels = load_split("train")
    total = args.epochs * (len(images) // args.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-2, fused=True)
    state_file = args.out / "features-state.safetensors"
    done, spent = 0, 0.0
    if state_file.exists():
        tensors, meta = read_tensors(state_file)
        network.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        restore_optimizer(optimizer, tensors)
        done, spent = meta["step"], meta["seconds"]
    started = time.monotonic() - spent
    network.train()
    for step in range(done, total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args.lr)
        x, y = draw_batch(images, labels, step=step, batch=args.batch, seed=args.seed)
        loss = torch.nn.functional.cross_entropy(network.logits(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            meta = {"step": step + 1, "seconds": time.monotonic() - started}
            tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
            write_tensors(state_file, tensors | flatten_optimizer(optimizer), meta)
            print(f"update {step + 1}/{total} loss {loss.item():.3f} {meta['seconds']:.0f} s", flush=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the state file; the result goes to OUT/fashion-features")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    folder = args.out / "fashion-features"
    folder.mkdir(parents=True, exist_ok=True)
    network = FashionFeatures()
    seconds = train(network, args)
    features, accuracy = features_and_accuracy(network, *load_split("t10k"))
    write_tensors(folder / WEIGHTS_FILE, network.state_dict(), {"seed": args.seed, "epochs": args.epochs, "accuracy": accuracy})
    meta = write_reference(folder, features, {"seed": args.seed, "epochs": args.epochs, "accuracy": accuracy, "seconds": round(seconds)})
    print(meta)


if __name__ == "__main__":
    main()
