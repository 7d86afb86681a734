"""Writes the tiny random checkpoints that the tests of archlab.hub load; needs the extra [interop].

    python -m tests.hub.make_fixtures [NAME ...]        (all of them without names; the same bytes each time)

Each folder under fixtures/ is a Hugging Face checkpoint saved by transformers (config.json, model.safetensors), with
- config.older.json where the hub's older files say the same in other words, and
- expected.safetensors: ids [2, T], logits [2, T, V] and the greedy continuation [2, 12] of each row's first 8 ids,
  ids_long and logits_long where the frequencies change with the length; encoder-decoders have source [2, S] and
  source_mask [2, S], ids are the decoder's, and greedy continues the decoder's start token. Where experts are chosen
  (mixtures.py), also which, and why.
Every parameter is random, and epsilons, bases and multipliers are unusual, so that no default hides a missing term.
Greedy ids are recomputed from the whole text at every step, because transformers' cache keeps keys that were turned by
the frequencies of a shorter text; they ignore end-of-text, and their margins are wide, so rounding cannot flip one.
"""

import copy
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hub.mixtures import (ABSENT, IDS, MIXTURES, MIXTURES_OLDER, MIXTURES_PUBLISHED, fan_in, publish, rope,
                                routing, through_fp4, watch)
from tests.hub.recurrents import RECURRENTS, RECURRENTS_OLDER

FIXTURES = Path(__file__).parent / "fixtures"


def scaled(kind, **more):
    """Two heads of 16: eight frequencies for the scaling to treat differently."""
    return RMS | rope(rope_type=kind, **more) | dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)


def factors(n, step):
    """LongRoPE's list of n factors, one for each frequency."""
    return [round(1 + step * i, 2) for i in range(n)]


MHA = IDS | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GQA = MHA | dict(num_key_value_heads=2, intermediate_size=36)
RMS = GQA | dict(rms_norm_eps=3e-3)
LLAMA = RMS | rope()
NORM = dict(layer_norm_eps=3e-3)
NEOX = MHA | NORM | dict(intermediate_size=36)
GPT = IDS | dict(n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=40, layer_norm_epsilon=3e-3)
FALCON = MHA | dict(layer_norm_epsilon=3e-3, ffn_hidden_size=40)
FALCON_NEW = FALCON | rope() | dict(new_decoder_architecture=True, num_kv_heads=2)
MPT = IDS | dict(d_model=24, n_heads=4, n_layers=2, max_seq_len=64, layer_norm_epsilon=3e-3)
BLOOM = IDS | dict(hidden_size=24, n_head=3, n_layer=2, layer_norm_epsilon=3e-3)
T5 = IDS | dict(d_model=24, d_kv=8, d_ff=32, num_heads=2, num_layers=2, layer_norm_epsilon=3e-3,
                relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0)
TWO_HEADS = dict(num_attention_heads=2, num_key_value_heads=1)
TWO_SLIDE = dict(num_hidden_layers=3, sliding_window=5, layer_types=["sliding_attention"] * 2 + ["full_attention"])
SOME_SLIDE = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
YARN = dict(factor=4.0, original_max_position_embeddings=64)
LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=24)

VARIANTS = {  # name: class of the config, and its arguments
    "gpt2": ("GPT2", GPT),
    "gpt2-scaled": ("GPT2", GPT | dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
                                       activation_function="relu", n_inner=None, n_embd=24)),
    "gpt2-unscaled": ("GPT2", GPT | dict(scale_attn_weights=False, activation_function="gelu",
                                         tie_word_embeddings=False)),
    "gpt2-early": ("GPT2", GPT),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_bigcode-mha": ("GPTBigCode", GPT | dict(multi_query=False, scale_attn_weights=False,
                                                 activation_function="gelu")),
    "gptj": ("GPTJ", GPT | dict(rotary_dim=4)),
    "gpt_neox": ("GPTNeoX", NEOX | rope(partial_rotary_factor=0.25) | dict(num_attention_heads=2)),
    "gpt_neox-sequential": ("GPTNeoX", NEOX | rope(partial_rotary_factor=0.5) | dict(
        use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast", tie_word_embeddings=True)),
    "llama": ("Llama", LLAMA),
    "llama-mqa": ("Llama", LLAMA | dict(num_key_value_heads=1, head_dim=12)),
    "llama-bias": ("Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama-tied": ("Llama", LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=None)),
    "llama-linear": ("Llama", scaled("linear", factor=3.0)),
    "llama-dynamic": ("Llama", scaled("dynamic", factor=2.5) | dict(max_position_embeddings=24)),
    "llama-yarn": ("Llama", scaled("yarn", **YARN) | dict(max_position_embeddings=256)),
    "llama-yarn-mscale": ("Llama", scaled("yarn", **YARN, mscale=0.7, mscale_all_dim=2.0, beta_fast=5, beta_slow=2,
                                          truncate=False)),
    "llama-yarn-attention_factor": ("Llama", scaled("yarn", **YARN, attention_factor=1.3)),
    "llama-longrope": ("Llama", scaled("longrope", short_factor=factors(8, 0.2), long_factor=factors(8, 1.5),
                                       factor=3.0, original_max_position_embeddings=24)),
    "llama-llama3": ("Llama", scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=32)),
    "llama-sharded": ("Llama", LLAMA),
    "llama-bf16": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | dict(sliding_window=5, head_dim=12)),
    "qwen2": ("Qwen2", LLAMA | SOME_SLIDE | dict(num_hidden_layers=3)),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=12, attention_bias=True)),
    "qwen3-sliding": ("Qwen3", LLAMA | SOME_SLIDE | dict(head_dim=12, hidden_act="gelu", tie_word_embeddings=True)),
    "olmo": ("Olmo", GQA | rope() | dict(clip_qkv=1.0, attention_bias=True)),
    "olmo2": ("Olmo2", LLAMA | dict(attention_bias=True)),
    "olmo3": ("Olmo3", RMS | TWO_SLIDE | dict(max_position_embeddings=256, rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=500.0),
        full_attention=dict(rope_type="yarn", rope_theta=300.0, **YARN, attention_factor=1.2)))),
    "gemma": ("Gemma", LLAMA | dict(head_dim=12, num_key_value_heads=1)),
    "gemma2": ("Gemma2", LLAMA | dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=20, attention_bias=True,
                                      attn_logit_softcapping=1.5, final_logit_softcapping=4.0)),
    "gemma3": ("Gemma3Text", RMS | TWO_SLIDE | dict(
        head_dim=8, query_pre_attn_scalar=5, final_logit_softcapping=6.0, rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
            full_attention=dict(rope_type="linear", rope_theta=3000.0, factor=8.0)))),
    "phi": ("Phi", GQA | NORM | rope(partial_rotary_factor=0.5)),
    "phi-qknorm": ("Phi", GQA | NORM | TWO_HEADS | rope(partial_rotary_factor=0.25) | dict(
        qk_layernorm=True, hidden_act="relu")),
    "phi3": ("Phi3", LLAMA | dict(tie_word_embeddings=True)),
    "phi3-longrope": ("Phi3", RMS | TWO_HEADS | rope(
        **LONGROPE, partial_rotary_factor=0.75, short_factor=factors(6, 0.2), long_factor=factors(6, 1.5)) | dict(
        sliding_window=6, max_position_embeddings=96, original_max_position_embeddings=24)),
    "falcon-7b": ("Falcon", FALCON | rope()),
    "falcon-new": ("Falcon", FALCON_NEW | dict(tie_word_embeddings=False)),
    "falcon-new-one-norm": ("Falcon", FALCON_NEW | dict(num_ln_in_parallel_attn=1, activation="relu")),
    "falcon-alibi": ("Falcon", FALCON | dict(alibi=True, bias=True, parallel_attn=False, multi_query=False)),
    "mpt": ("Mpt", MPT),
    "mpt-clip": ("Mpt", MPT | dict(n_heads=3, attn_config=dict(clip_qkv=1.0, softmax_scale=0.6))),
    "bloom": ("Bloom", BLOOM),
    "bloom-post": ("Bloom", BLOOM | dict(n_head=4, apply_residual_connection_post_layernorm=True)),
    "stablelm": ("StableLm", GQA | NORM | rope(partial_rotary_factor=0.5)),
    "stablelm-parallel": ("StableLm", GQA | NORM | TWO_HEADS | rope(partial_rotary_factor=0.25) | dict(
        use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, hidden_act="gelu",
        tie_word_embeddings=True)),
    "cohere": ("Cohere", GQA | NORM | rope() | dict(logit_scale=0.3)),
    "cohere-qknorm": ("Cohere", GQA | NORM | rope() | dict(logit_scale=0.3, use_qk_norm=True, attention_bias=True)),
    "cohere2": ("Cohere2", GQA | NORM | rope() | TWO_SLIDE | dict(logit_scale=0.3)),
    "starcoder2": ("Starcoder2", GQA | rope() | dict(norm_epsilon=3e-3, sliding_window=5)),
    "starcoder2-unbiased": ("Starcoder2", GQA | rope() | dict(norm_epsilon=3e-3, use_bias=False,
                                                              tie_word_embeddings=False)),
    "granite": ("Granite", LLAMA | dict(embedding_multiplier=3.0, logits_scaling=0.7, residual_multiplier=0.4,
                                        attention_multiplier=0.5, tie_word_embeddings=True)),
    "granite-bias": ("Granite", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "smollm3": ("SmolLM3", LLAMA | dict(num_hidden_layers=3, no_rope_layer_interval=2)),
    "smollm3-sliding": ("SmolLM3", LLAMA | dict(
        no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=5, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=False)),
    "t5": ("T5", T5 | dict(num_decoder_layers=3)),
    "t5-gated": ("T5", T5 | dict(num_decoder_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-silu": ("T5", T5 | dict(feed_forward_proj="gated-silu")),
    "mt5": ("MT5", T5 | dict(num_layers=1, num_decoder_layers=2)),
    "bart": ("Bart", IDS | dict(
        d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=40, max_position_embeddings=40, activation_function="relu",
        scale_embedding=True, pad_token_id=1, bos_token_id=0, decoder_start_token_id=2)),
    **MIXTURES, **RECURRENTS,
}
LONG = ("llama-dynamic", "llama-longrope", "phi3-longrope")  # with a second text, beyond the original length
EARLY = ("gpt2-early", "gpt_neox-sequential", "bloom-post", "t5-silu")  # with the tensors of early checkpoints
UNTIED = ("t5-gated", "mt5")  # transformers 5 calls these tied, and yet keeps two tables where the file has two
SHARDS = {"llama-sharded": "20KB"}
DTYPES = {"llama-bf16": torch.bfloat16, "gpt_oss-mxfp4": torch.bfloat16}
ATTENTION = {"falcon-alibi": "sdpa"}  # its eager form adds the bias twice
OLDER = {  # written in the older words too, with these fields beyond the renamings
    "gpt_neox": {}, "llama-linear": {}, "llama-dynamic": {}, "llama-yarn": {}, "llama-longrope": {},
    "llama-llama3": {}, "mistral": {}, "qwen2": {}, "qwen3-sliding": {}, "olmo2": {}, "gemma2": {}, "phi": {},
    "phi3": {}, "phi3-longrope": {}, "falcon-7b": {}, "stablelm": {}, "cohere": {}, "starcoder2": {}, "granite": {},
    "qwen3": dict(use_sliding_window=False, sliding_window=5, max_window_layers=1),  # a window that is not used
    "gemma": dict(hidden_act="gelu"),  # which means its approximation by tanh
    "gemma3": dict(sliding_window_pattern=3), "cohere2": dict(sliding_window_pattern=3),
    "t5-gated": dict(tie_word_embeddings=False), "mt5": dict(tie_word_embeddings=False), **MIXTURES_OLDER,
    **RECURRENTS_OLDER,
}


def create(name):
    kind, fields = VARIANTS[name]
    config = getattr(transformers, kind + "Config")(**copy.deepcopy(fields))
    model = auto(config).from_config(config, attn_implementation=ATTENTION.get(name, "eager"),
                                     experts_implementation="eager").eval()
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def auto(config):
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def randomise(model, source):
    """Every parameter: norm gains about 1 or -1, biases about 0, matrices that keep the size of what they map."""
    seen = set()
    for module in model.modules():
        kind = type(module).__name__
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            noise = torch.randn(weight.shape, generator=source)
            if name == "gate_up_proj_bias":
                weight.data = 0.5 * module.limit * noise  # so that some are clipped
            elif name.endswith("bias"):
                weight.data = 0.2 * noise
            elif "Norm" in kind:
                sign = torch.randint(0, 2, weight.shape, generator=source) * 2 - 1  # else a tied head repeats its input
                weight.data = (1 + 0.3 * noise) * sign - (1 if "Gemma" in kind else 0)  # Gemma adds 1 to it
            elif weight.ndim == 1:  # sinks, decay rates, skips
                weight.data = noise
            elif isinstance(module, torch.nn.Embedding):
                weight.data = 0.5 * noise
            else:
                weight.data = 1.5 * noise * fan_in(module, name, weight) ** -0.5
        for name, size in (("final_logits_bias", 0.5), ("e_score_correction_bias", 0.3)):
            if hasattr(module, name):
                getattr(module, name).copy_(size * torch.randn(getattr(module, name).shape, generator=source))
    for module in model.modules():
        if type(module).__name__.startswith("Switch") and hasattr(module, "shared"):
            for stack in (module.encoder, module.decoder):  # three tables if the head is not tied, alike in files
                stack.embed_tokens.weight.copy_(module.shared.weight)
        if hasattr(module, "has_relative_attention_bias"):
            module.q.weight.data *= 0.3  # T5 leaves its scores as large as they are, and float32 loses digits in them


def inputs(config, source):
    ids = torch.randint(3, 64, (2, 24), generator=source)
    if not config.is_encoder_decoder:
        return dict(ids=ids)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 13:] = 0  # the second row is shorter
    ids[:, 0] = config.decoder_start_token_id
    text = torch.randint(3, 64, (2, 20), generator=source)
    return dict(source=torch.where(mask > 0, text, config.pad_token_id), source_mask=mask, ids=ids)


def logits_of(model, ids, given):
    if model.config.is_encoder_decoder:
        return model(input_ids=given["source"], attention_mask=given["source_mask"], decoder_input_ids=ids,
                     use_cache=False).logits
    return model(ids, use_cache=False).logits


def continue_greedily(model, given):
    """Greedy ids [2, 12], or None where a choice is close or the text soon repeats one id."""
    text = given["ids"][:, :1 if model.config.is_encoder_decoder else 8]
    prompt = text.shape[1]
    for _ in range(12):
        last = logits_of(model, text, given)[:, -1]
        best = last.topk(2).values
        if (best[:, 0] - best[:, 1]).min() < 1e-2:
            return None
        text = torch.cat([text, last.argmax(-1, keepdim=True)], 1)
    greedy = text[:, prompt:]
    return greedy if min(len(row.unique()) for row in greedy) > 3 else None


def choose_clearly(model, given, source):
    """Whether rounding cannot send a token elsewhere, here or in the greedy text; notes in `given` who goes where."""
    found, clear = watch(model, lambda: logits_of(model, given["ids"], given), source)
    start = given["ids"][:, :1 if model.config.is_encoder_decoder else 8]
    text = torch.cat([start, given["greedy"]], 1)
    clear = clear and watch(model, lambda: logits_of(model, text, given), source)[1]
    tensors = routing(found)
    given |= tensors or {}
    return clear and tensors is not None


def older(config, changes):
    """The same config in the words of the hub's older files."""
    config = dict(config)
    neox = config["model_type"] == "gpt_neox"
    config["torch_dtype"] = config.pop("dtype")
    for newer in ("layer_types", "_sliding_window_pattern", "scale_decoder_outputs", "dense_act_fn", "is_gated_act",
                  "transformers_version"):
        config.pop(newer, None)
    rope = config.pop("rope_parameters", {})
    if "sliding_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    if rope:
        config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        if "partial_rotary_factor" in rope:
            config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if "original_max_position_embeddings" in config:  # Phi 3 has it outside
            rope.pop("original_max_position_embeddings", None)
        if kind != "default":
            word = "rope_type" if kind == "llama3" or config["model_type"] == "gemma3_text" else "type"
            config["rope_scaling"] = {word: kind, **rope}
    if config["model_type"] == "dbrx":
        del config["rope_theta"]  # which attn_config has
        del config["ffn_config"]["hidden_size"]
        config["ffn_config"] |= dict(moe_jitter_eps=0, moe_normalize_expert_weights=1, uniform_expert_assignment=False,
                                     tie_word_embeddings=True, max_length=20, temperature=1.0)
    return {name: value for name, value in (config | changes).items() if value is not ABSENT}


def early(weights, family):
    """The tensors as early checkpoints have them: no name of the model in front, buffers and tied copies among them."""
    mask = torch.ones(1, 1, 40, 40, dtype=torch.uint8).tril()
    if family in ("gpt2", "bloom"):
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for i in range(2):
        if family == "gpt2":
            weights[f"h.{i}.attn.bias"] = mask.clone()
        if family == "gpt_neox":
            weights[f"gpt_neox.layers.{i}.attention.bias"] = mask.clone()
            weights[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            weights[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.tensor([1.0, 500.0**-0.5])
    if family == "t5":
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            weights[name + ".weight"] = weights["shared.weight"].clone()
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        weights[unused] = weights[unused.replace("1.EncDec", "0.Self")] + 1
    return weights


def make(name):
    folder, dtype = FIXTURES / name, DTYPES.get(name, torch.float32)
    for attempt in range(200):
        source = torch.Generator().manual_seed(zlib.crc32(name.encode()) + attempt)
        model = create(name)
        randomise(model, source)
        given = inputs(model.config, source)
        for _ in range(4):  # logits of standard deviation 2
            model.get_output_embeddings().weight.data *= 2 / logits_of(model, given["ids"], given).std()
        for path, weight in model.named_parameters():
            fp4 = name == "gpt_oss-mxfp4" and path.endswith(("experts.gate_up_proj", "experts.down_proj"))
            weight.data = through_fp4(weight) if fp4 else weight.to(dtype).float()
        given["logits"] = logits_of(model, given["ids"], given)
        given["greedy"] = continue_greedily(model, given)
        if given["greedy"] is not None and choose_clearly(model, given, source):
            break
    else:
        raise RuntimeError(f"{name}: no seed gives a clear greedy text and clear choices of experts")
    if name in LONG:
        given["ids_long"] = torch.randint(3, 64, (2, 40), generator=source)
        given["logits_long"] = logits_of(model, given["ids_long"], given)
    if hasattr(model, "rwkv"):
        model.train().rwkv._rescale_layers()  # takes back what its first pass at inference did to the weights
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARDS.get(name, "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name in EARLY:
        file = folder / "model.safetensors"
        save_file(early(load_file(file), model.config.model_type), file, metadata={"format": "pt"})
    if name in MIXTURES_PUBLISHED:
        file = folder / "model.safetensors"
        weights, config = publish(load_file(file), json.loads((folder / "config.json").read_text()))
        save_file(weights, file, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if name in OLDER:
        config = older(json.loads((folder / "config.json").read_text()), OLDER[name])
        (folder / "config.older.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({key: (x.float() if x.is_floating_point() else x.int()).contiguous() for key, x in given.items()},
              folder / "expected.safetensors")
    check(folder, given)
    print(f"{name}: seed {attempt}, {sum(file.stat().st_size for file in folder.iterdir()) / 1e3:.1f} kB")


def reword(fields):
    """Says what transformers 5.23 no longer understands, or cannot do without other packages, so that it can."""
    if fields["model_type"] == "dbrx":
        fields["rope_parameters"] = {"rope_theta": fields["attn_config"]["rope_theta"]}
        if fields["ffn_config"]["moe_normalize_expert_weights"] == 1:
            fields["ffn_config"]["moe_normalize_expert_weights"] = 1.0
    if "attn_temperature_tuning" in fields:
        fields["attn_temperature_tuning"] = bool(fields["attn_temperature_tuning"])
    if "time_step_limit" in fields:
        fields["time_step_limit"] = [float("inf") if step == {"__float__": "Infinity"} else step
                                     for step in fields["time_step_limit"]]
    if "quantization_config" in fields:
        fields["quantization_config"]["dequantize"] = True


def check(folder, given):
    """What was saved, read back by transformers under either config, gives the logits that were written."""
    for file in folder.glob("config*.json"):
        fields = json.loads(file.read_text())
        reword(fields)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = auto(config).from_pretrained(folder, config=config, dtype=torch.float32,
                                             attn_implementation=ATTENTION.get(folder.name, "eager"),
                                             experts_implementation="eager")
        for ids, logits in (("ids", "logits"), ("ids_long", "logits_long")):
            if ids in given:
                error = (logits_of(model, given[ids], given) - given[logits]).abs().max()
                assert error < 1e-5, f"{file}: {logits} differ by {error}"


def main(names):
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names or VARIANTS:
        make(name)


if __name__ == "__main__":
    main(sys.argv[1:])
