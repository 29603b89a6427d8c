"""The peers' model: GPT-2's architecture in plain PyTorch, with the weights that a bench wrote."""

import json
import struct

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, case):
        super().__init__()
        width, self.heads = case["width"], case["heads"]
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, attend):
        """`attend` makes (b, heads, t, d) of queries, keys and values of that shape."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=-1)
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        x = x + self.output(attend(q, k, v).transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.tokens = nn.Embedding(case["vocabulary"], case["width"])
        self.positions = nn.Embedding(case["context"], case["width"])
        self.blocks = nn.ModuleList(Block(case) for _ in range(case["layers"]))
        self.norm = nn.LayerNorm(case["width"], eps=1e-5)
        self.load(read_safetensors(case["weights"]))

    @torch.no_grad()
    def load(self, weights):
        names = {"tokens": "embedding", "positions": "positions", "norm": "norm"}
        for name, parameter in self.named_parameters():
            *module, leaf = name.split(".")
            if module[0] != "blocks":
                parameter.copy_(weights[f"{names[module[0]]}.{leaf}"])
                continue
            layer, part = f"layers.{module[1]}", module[2]
            inside = {"qkv": ["attention.q", "attention.k", "attention.v"], "output": ["attention.output"],
                      "up": ["mlp.up"], "down": ["mlp.down"]}.get(part, [part])
            parameter.copy_(torch.cat([weights[f"{layer}.{name}.{leaf}"] for name in inside]))


def read_case(path):
    with open(path, encoding="utf-8") as file:
        case = json.load(file)
    torch.set_num_threads(case["threads"])
    return case


def read_safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    return {name: torch.frombuffer(data, dtype=torch.float32, offset=entry["data_offsets"][0],
                                   count=(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}
