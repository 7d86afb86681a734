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
from archlab.hub.family import describe as describe_dense
from archlab.layers.mlp import MLP
from archlab.layers.repeat import Repeat
from archlab.model import LanguageModel

LONGEST = 1 << 17


def describe(config: LanguageModel) -> tuple[str, dict]:
    """The model type of transformers and the fields of its config. ValueError for what it does not have."""
    if config.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--peer runs in float32 or bfloat16, and this model in {config.dtype}")
    kinds = {type(node): node for _, node in config.body.walk()}
    common = {"vocab_size": config.vocab, "hidden_size": config.width, "tie_word_embeddings": config.tied,
              "num_hidden_layers": config.body.n if isinstance(config.body, Repeat) else None}
    if set(kinds) & {Attention, MLP, MoE} == {Attention, MoE}:
        attention, experts = kinds[Attention], kinds[MoE]
        return "mixtral", common | {
            "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads or attention.heads,
            "intermediate_size": experts.hidden, "num_local_experts": experts.experts, "output_router_logits": True,
            "num_experts_per_tok": experts.router.k, "max_position_embeddings": LONGEST}
    family, fields = describe_dense(config.set("dtype", None))
    return family.model_types[0], {"max_position_embeddings": LONGEST, **fields}


class Peer:
    """The process: asked for one thing at a time, it answers with seconds."""

    def __init__(self, config: LanguageModel, compiled: bool = False):
        """compiled: through `torch.compile`, as far as its users do so: the step of training and the forward pass."""
        self.process = subprocess.Popen([sys.executable, "-m", "experiments.peer"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self._ask([*describe(config), config.dtype or "float32", compiled])

    def train_step(self, batch: int, context: int) -> float:
        """Seconds of one step: forward, backward, AdamW."""
        return self._ask(["train", batch, context])

    def prefill(self, batch: int, context: int) -> float:
        """Seconds of one forward pass over a prompt, into a cache, with the last token's logits."""
        return self._ask(["prefill", batch, context])

    def generate(self, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token after a prompt, and for each further one of every row; greedy."""
        return tuple(self._ask(["generate", batch, context, new_tokens]))

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
    kind, fields, dtype, compiled = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # weights stay in float32, as ours
    print("0", flush=True)
    ids_of = lambda batch, context: torch.randint(0, fields["vocab_size"], (batch, context))

    def train(batch: int, context: int) -> float:
        ids = ids_of(batch, context)
        began = time.perf_counter()
        model.train()
        with precision:
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    @torch.no_grad()
    def prefill(batch: int, context: int) -> float:
        model.eval()
        ids = ids_of(batch, context)
        began = time.perf_counter()
        with precision:
            run(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    @torch.no_grad()
    def generate(batch: int, context: int, new_tokens: int) -> list[float]:
        model.eval()
        ids = ids_of(batch, context)

        def seconds(count: int) -> float:
            began = time.perf_counter()
            with precision:
                model.generate(ids, do_sample=False, min_new_tokens=count, max_new_tokens=count, use_cache=True,
                               pad_token_id=0, eos_token_id=None)
            return time.perf_counter() - began

        first = seconds(1)
        return [first, (seconds(1 + new_tokens) - first) / new_tokens]

    verbs = {"train": train, "prefill": prefill, "generate": generate}
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(verbs[verb](*arguments)), flush=True)


if __name__ == "__main__":
    serve()
