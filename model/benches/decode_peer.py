"""The peer of benches/decode.rs: the same model with a KV cache in plain PyTorch, eager, and the GPT-2 of
`transformers` where it is installed.

    decode_peer.py CASE.json

The case names a file of weights, written by the bench. A line `PEER SEQUENCES TOKENS SEED` on standard
input asks for greedy answers of so many tokens to so many prompts, decoded together; the answer is a line with the
seconds to all first tokens, the seconds in all, and the tokens of the first answer. Peers are `torch` and
`transformers`; the first line says which are there.
"""

import json
import struct
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

try:
    import transformers
except ImportError:
    transformers = None


class Block(nn.Module):
    def __init__(self, case):
        super().__init__()
        width, self.heads = case["width"], case["heads"]
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, cache, start):
        """`cache` is (2, b, heads, capacity, d); the new tokens stand at `start` on."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=-1)
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        cache[0, :, :, start:start + t], cache[1, :, :, start:start + t] = k, v
        keys, values = cache[0, :, :, :start + t], cache[1, :, :, :start + t]
        attended = F.scaled_dot_product_attention(q, keys, values, is_causal=t > 1)
        x = x + self.output(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.tokens = nn.Embedding(case["vocabulary"], case["width"])
        self.positions = nn.Embedding(case["context"], case["width"])
        self.blocks = nn.ModuleList(Block(case) for _ in range(case["layers"]))
        self.norm = nn.LayerNorm(case["width"], eps=1e-5)
        self.case = case

    def forward(self, tokens, cache, start):
        """Logits of the last position."""
        x = self.tokens(tokens) + self.positions.weight[start:start + tokens.shape[1]]
        for block, layer in zip(self.blocks, cache):
            x = block(x, layer, start)
        return F.linear(self.norm(x[:, -1]), self.tokens.weight)

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

    def generate(self, prompts, count):
        case, begun = self.case, time.perf_counter()
        length = prompts.shape[1]
        shape = (2, len(prompts), case["heads"], length + count, case["width"] // case["heads"])
        cache = [torch.empty(shape, dtype=self.norm.weight.dtype) for _ in self.blocks]
        token = self(prompts, cache, 0).argmax(-1, keepdim=True)
        answer, first = [token[0].item()], time.perf_counter() - begun
        for position in range(length, length + count - 1):
            token = self(token, cache, position).argmax(-1, keepdim=True)
            answer.append(token[0].item())
        return first, time.perf_counter() - begun, answer


class Transformers:
    def __init__(self, case, ours):
        config = transformers.GPT2Config(
            vocab_size=case["vocabulary"], n_positions=case["context"], n_embd=case["width"], n_layer=case["layers"],
            n_head=case["heads"], activation_function="gelu_new", layer_norm_epsilon=1e-5, bos_token_id=None, eos_token_id=None,
            attn_implementation="sdpa")
        self.model = transformers.GPT2LMHeadModel(config).eval().to(ours.norm.weight.dtype)
        body = self.model.transformer
        pairs = [(body.wte, ours.tokens), (body.wpe, ours.positions), (body.ln_f, ours.norm)]
        for theirs, block in zip(body.h, ours.blocks):
            pairs += [(theirs.ln_1, block.attention_norm), (theirs.ln_2, block.mlp_norm), (theirs.attn.c_attn, block.qkv),
                      (theirs.attn.c_proj, block.output), (theirs.mlp.c_fc, block.up), (theirs.mlp.c_proj, block.down)]
        for theirs, our in pairs:
            # Its matrices stand the other way round.
            turned = isinstance(our, nn.Linear)
            theirs.weight.copy_(our.weight.t() if turned else our.weight)
            if getattr(theirs, "bias", None) is not None:
                theirs.bias.copy_(our.bias)

    def generate(self, prompts, count):
        begun = time.perf_counter()
        out = self.model(prompts, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        answer, first = [token[0].item()], time.perf_counter() - begun
        for _ in range(count - 1):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            answer.append(token[0].item())
        return first, time.perf_counter() - begun, answer


def read_safetensors(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    return {name: torch.frombuffer(data, dtype=torch.float32, offset=entry["data_offsets"][0],
                                   count=(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


@torch.inference_mode()
def main():
    case = json.load(open(sys.argv[1]))
    torch.set_num_threads(case["threads"])
    ours = Gpt(case).eval()
    ours.load(read_safetensors(case["weights"]))
    ours.to(torch.bfloat16 if case["bf16"] else torch.float32)
    peers = {"torch": ours}
    if transformers:
        peers["transformers"] = Transformers(case, ours)
    print(*peers, flush=True)
    for line in sys.stdin:
        peer, sequences, count, seed = line.split()
        prompts = [[20 + (index * 13 + at * 7 + int(seed)) % 200 for at in range(case["prompt"])] for index in range(int(sequences))]
        first, whole, answer = peers[peer].generate(torch.tensor(prompts), int(count))
        print(first, whole, *answer, flush=True)


main()
