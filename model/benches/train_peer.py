"""The peer of benches/train.rs: the same model and optimiser in plain PyTorch, eager.

    train_peer.py CASE.json

The case names a file of initial weights and a file of batches, both written by the bench. A line with
a number on standard input asks for so many steps; the answer is a line with the seconds that they
took, by the clock and of processor time, and the last one's loss.
"""

import json
import struct
import sys
import time

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

    def forward(self, x, mask):
        b, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=-1)
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.output(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.tokens = nn.Embedding(case["vocabulary"], case["width"])
        self.positions = nn.Embedding(case["context"], case["width"])
        self.blocks = nn.ModuleList(Block(case) for _ in range(case["layers"]))
        self.norm = nn.LayerNorm(case["width"], eps=1e-5)

    def forward(self, tokens, positions, targets, mask):
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, mask)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

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


def read_safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    return {name: torch.frombuffer(data, dtype=torch.float32, offset=entry["data_offsets"][0],
                                   count=(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


def read_batches(path):
    """Per batch: rows and length, then tokens, positions and targets (-100 is none), all int32."""
    numbers = torch.frombuffer(bytearray(open(path, "rb").read()), dtype=torch.int32).long()
    at = 0
    while at < len(numbers):
        rows, length = numbers[at:at + 2].tolist()
        size = rows * length
        yield tuple(numbers[at + 2 + size * i:at + 2 + size * (i + 1)].view(rows, length) for i in range(3))
        at += 2 + 3 * size


def document_mask(positions):
    """None where every row is one document, else who may attend to whom."""
    starts = positions == 0
    if starts.sum() == len(positions):
        return None
    documents = starts.cumsum(1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool).tril()


def main():
    case = json.load(open(sys.argv[1]))
    torch.set_num_threads(case["threads"])
    model = Gpt(case)
    model.load(read_safetensors(case["weights"]))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=case["learning_rate"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    batches = iter(list(read_batches(case["batches"])))
    for line in sys.stdin:
        begun, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            tokens, positions, targets = next(batches)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["bf16"]):
                loss = model(tokens, positions, targets, document_mask(positions))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = loss.item()
        print(time.perf_counter() - begun, time.process_time() - processor, last, flush=True)


main()
