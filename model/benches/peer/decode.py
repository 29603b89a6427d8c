"""The peer of benches/decode.rs: the same model with a cache of keys and values in plain PyTorch, eager, and
the GPT-2 of `transformers` where it is installed.

    decode.py CASE.json

The case names a file of weights, written by the bench. A line `PEER SEQUENCES TOKENS SEED` on standard
input asks for greedy answers of so many tokens to so many prompts, decoded together; the answer is a line with the
seconds to all first tokens, the seconds in all, and the tokens of the first answer. Peers are `torch` and
`transformers`; the first line says which are there.
"""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from gpt import Gpt, read_case

try:
    import transformers
except ImportError:
    transformers = None


class Decoded(Gpt):
    def __init__(self, case):
        super().__init__(case)
        self.case = case

    def forward(self, tokens, cache, start):
        """Logits of the last position. `cache` has a (2, b, heads, capacity, d) for each layer; the new tokens
        stand at `start` on."""
        t = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[start:start + t]
        for block, layer in zip(self.blocks, cache):
            def attend(q, k, v):
                layer[0, :, :, start:start + t], layer[1, :, :, start:start + t] = k, v
                keys, values = layer[0, :, :, :start + t], layer[1, :, :, :start + t]
                return F.scaled_dot_product_attention(q, keys, values, is_causal=t > 1)

            x = block(x, attend)
        return F.linear(self.norm(x[:, -1]), self.tokens.weight)

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


@torch.inference_mode()
def main():
    case = read_case(sys.argv[1])
    ours = Decoded(case).eval()
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
