"""The peer of benches/train.rs: the same model and optimiser in plain PyTorch, eager or compiled.

    train.py CASE.json

The case names a file of initial weights and a file of batches, both written by the bench. The first line says that it is ready; a line with
a number on standard input asks for so many steps; the answer is a line with the seconds that they
took, by the clock and of processor time, and the last one's loss.
"""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from gpt import Gpt, read_case


class Trained(Gpt):
    def forward(self, tokens, positions, targets, mask):
        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, attend)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def read_batches(path):
    """Per batch: rows and length, then tokens, positions and targets (-100 is none), all int32."""
    with open(path, "rb") as file:
        numbers = torch.frombuffer(bytearray(file.read()), dtype=torch.int32).long()
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
    case = read_case(sys.argv[1])
    model = Trained(case)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=case["learning_rate"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if case["compiled"] else model
    batches = read_batches(case["batches"])
    print("ready", flush=True)
    for line in sys.stdin:
        begun, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            tokens, positions, targets = next(batches)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["bf16"]):
                loss = forward(tokens, positions, targets, document_mask(positions))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = loss.item()
        print(time.perf_counter() - begun, time.process_time() - processor, last, flush=True)


main()
