"""A model of the same shape in Hugging Face transformers, in a process of its own, timed turn by turn with ours.

The process sleeps while it is not asked, so it takes no time from us. It needs the extra [interop]; nothing of archlab
imports torch.
"""

import json
import subprocess
import sys
import time

from archlab.attention.attention import Attention
from archlab.experts.moe import MoE
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.model import LanguageModel
from archlab.recurrence.mamba import Mamba


def describe(config: LanguageModel) -> tuple[str, dict]:
    """The transformers class and config fields for a Llama, Mixtral or Mamba shaped model. ValueError for others."""
    if config.dtype not in (None, "float32"):
        raise ValueError(f"--peer runs in float32, and this model in {config.dtype}: the comparison would not be fair")
    if not isinstance(config.body, Repeat):
        raise ValueError("--peer knows models that are one Repeat of a block")
    kinds = {type(node): node for _, node in config.body.walk()}
    common = {"vocab_size": config.vocab, "hidden_size": config.width, "num_hidden_layers": config.body.n,
              "tie_word_embeddings": config.tied}
    if set(kinds) & {Mamba, Attention} == {Mamba} and not set(kinds) & {MLP, MoE}:
        mamba = kinds[Mamba]
        return "Mamba", common | {"state_size": mamba.state, "conv_kernel": mamba.conv, "expand": mamba.expand}
    if Attention in kinds and Mamba not in kinds and (MLP in kinds) != (MoE in kinds):
        attention, ffn = kinds[Attention], kinds.get(MoE) or kinds[MLP]
        common |= {"num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads or attention.heads,
                   "intermediate_size": ffn.hidden, "max_position_embeddings": 1 << 17}
        if MoE in kinds:
            return "Mixtral", common | {"num_local_experts": ffn.experts, "num_experts_per_tok": ffn.router.k,
                                        "output_router_logits": True}
        return "Llama", common
    raise ValueError(f"--peer knows Llama, Mixtral and Mamba shapes; this model is made of "
                     f"{', '.join(sorted(kind.__name__ for kind in kinds))}")


class Peer:
    """The process: asked for one thing at a time, it answers with seconds."""

    def __init__(self, config: LanguageModel):
        self.process = subprocess.Popen([sys.executable, "-m", "experiments.peer"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self._ask(describe(config))

    def train_step(self, batch: int, context: int) -> float:
        """Seconds of one step: forward, backward, AdamW."""
        return self._ask(["train", batch, context])

    def generate(self, context: int, new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token after a prompt, and for each further one; greedy, one text."""
        return tuple(self._ask(["generate", context, new_tokens]))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ValueError("the peer's process ended: is the extra installed? pip install 'archlab[interop]'")
        return json.loads(answer)


def serve() -> None:
    """The peer's side: reads a description, then questions, until its input ends."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    kind, fields = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    print("0", flush=True)

    def train(batch: int, context: int) -> float:
        ids = torch.randint(0, fields["vocab_size"], (batch, context))
        began = time.perf_counter()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    @torch.no_grad()
    def generate(context: int, new_tokens: int) -> list[float]:
        model.eval()
        ids = torch.randint(0, fields["vocab_size"], (1, context))

        def seconds(count: int) -> float:
            began = time.perf_counter()
            model.generate(ids, do_sample=False, min_new_tokens=count, max_new_tokens=count, use_cache=True,
                           pad_token_id=0, eos_token_id=None)
            return time.perf_counter() - began

        first = seconds(1)
        return [first, (seconds(1 + new_tokens) - first) / new_tokens]

    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps({"train": train, "generate": generate}[verb](*arguments)), flush=True)


if __name__ == "__main__":
    serve()
