"""The self-check's other half: a program of its own, run in a fresh interpreter, that opens an export as a stranger would.

Reads one JSON object from its first argument, writes one to standard output. Of qdm it imports the loader where the target needs it;
for a target that must not need it, `qdm_cli` is made unimportable.
"""

import hashlib
import json
import sys


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["loader"]:
        _import_loader(task["loader"], task["roots"])
    else:
        sys.modules["qdm_cli"] = None  # type: ignore[assignment]
    import torch

    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    first = _load(task)
    hashes = {name: tensor_hash(value) for name, value in first.state_dict().items()}
    outputs, problems = _run(first, task)
    del first
    (again,), more = _run(_load(task), {**task, "calls": task["calls"][-1:]})
    if not torch.equal(again, outputs[-1]):
        more.append("a second load gives other outputs")
    print(json.dumps({"hashes": hashes, "problems": problems + more, **_compare(outputs, task)}))


def _import_loader(name: str, roots: list) -> None:
    """Import the very package that wrote the folder: from where it is installed, else from its source roots."""
    from importlib import import_module, util

    spec = util.find_spec(name)
    if spec is None or not str(spec.origin).startswith(roots[0]):
        sys.path[:0] = roots
    import_module(name)


def _load(task: dict):
    """Plain diffusers calls only."""
    import diffusers
    import torch

    options = {} if task["dtype"] == "float32" else {"torch_dtype": getattr(torch, task["dtype"])}
    if task["class"]:
        return getattr(diffusers, task["class"]).from_pretrained(task["folder"], **options)
    return getattr(diffusers.DiffusionPipeline.from_pretrained(task["folder"], **options), task["component"])


def _run(denoiser, task: dict):
    """Outputs for all probes, and what went wrong; timesteps by keyword, and by position where the model takes them second."""
    import torch
    from safetensors import safe_open

    outputs, problems = [], []
    with safe_open(task["probe"], framework="pt") as tensors:
        for call in task["calls"]:
            arguments = {name: _decode(value, tensors) for name, value in call.items()}
            named = denoiser(**arguments, return_dict=False)[0]
            outputs.append(named)
            first, second = task["positional"]
            if second == "timestep" and call is task["calls"][0]:
                rest = {name: value for name, value in arguments.items() if name not in (first, second)}
                if not torch.equal(denoiser(arguments[first], arguments[second], **rest, return_dict=False)[0], named):
                    problems.append("timestep by position and by keyword give different outputs")
    return outputs, problems


def _decode(value, tensors):
    if "tensor" in value:
        return tensors.get_tensor(value["tensor"])
    if "items" in value:
        return {name: _decode(item, tensors) for name, item in value["items"].items()}
    return value["plain"]


def _compare(outputs: list, task: dict) -> dict:
    """Root mean square of the difference over that of the expected outputs; largest difference."""
    import torch
    from safetensors import safe_open

    with safe_open(task["probe"], framework="pt") as tensors:
        expected = [tensors.get_tensor(f"output.{index}").double() for index in range(len(outputs))]
    pairs = list(zip(outputs, expected, strict=True))
    differences = [got.double() - want for got, want in pairs]
    relative = [float(d.norm() / w.norm().clamp_min(1e-30)) for d, (_, w) in zip(differences, pairs, strict=True)]
    finite = all(bool(torch.isfinite(got).all()) for got in outputs)
    return {"finite": finite, "rel_rms": max(relative), "max_abs": max(float(d.abs().max()) for d in differences)}


def tensor_hash(value) -> str:
    import torch

    return hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
