"""Time to the first token of prompts of several lengths, and loading a checkpoint from disk.

Loading is compared with reading the same bytes into memory and nothing else, by turns. The file was
just written, so both come from the page cache where there is room for it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cuda_clock as clock
import numpy as np
from cuda_shapes import Model, begin, make, parser, prompt
from cuda_transformers import state

from moescope.engine.torch_decoder import TorchDecoder

LENGTHS = (1, 16, 128, 512, 2048)
LAYERS = 4  # of the checkpoint that is written


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, shape = begin(asked)
    lengths = LENGTHS[:3] if asked.tiny else LENGTHS
    model = make(shape, asked.device)
    decoder = model.decoder(capacity=lengths[-1] + 8)
    found = {str(length): first_token(model, decoder, length) for length in lengths}
    report.put("first_token", found)
    del decoder, model
    report.put("loading", loading(shape, asked.device))
    report.finish()


def first_token(model: Model, decoder: TorchDecoder, length: int) -> dict[str, float]:
    ids = np.array([prompt(model, length)])

    def work() -> None:
        decoder.truncate(0, 0)
        int(decoder.run([0], ids, record="weights").logits.argmax())

    seconds = clock.median_time(work, model.device, repeats=5)
    return {"seconds": seconds, "tokens_per_second": length / seconds}


def loading(shape: str, device: str) -> dict[str, Any]:
    """GB/s of `load_model` and of plain reads of the same file."""
    from moescope.engine.load import load_model
    from moescope.engine.protocol import LoadRequest

    model = make(shape, device, layers=0 if "tiny" in shape else LAYERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(model, folder)
        if shutil.disk_usage(folder).free < size:
            return {"says": "no room on the disk"}
        del model
        seconds: dict[str, list[float]] = {"read": [], "load": []}
        request = LoadRequest(str(folder), device=device, dtype="bfloat16", max_context=64)
        for _ in range(4):
            seconds["read"].append(clock.timed(lambda: read(folder), device))
            seconds["load"].append(clock.timed(lambda: load_model(request), device))
    rates = {what: size / statistics.median(found[1:]) / 1e9 for what, found in seconds.items()}
    return {"gigabytes": size / 1e9, "gigabytes_per_second": rates}


def write(model: Model, folder: Path) -> int:
    """A checkpoint as transformers 5 saves it, experts in one tensor; returns its bytes."""
    from safetensors.torch import save_file

    # Copies: views of one matrix must not share memory in a file.
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state(model).items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config | {"dtype": "bfloat16"}))
    return path.stat().st_size


def read(folder: Path, piece: int = 16 << 20) -> float:
    """Read every byte of the checkpoint into one buffer; returns the seconds it took."""
    buffer = bytearray(piece)
    began = time.perf_counter()
    with (folder / "model.safetensors").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
