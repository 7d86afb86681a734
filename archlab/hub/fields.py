"""The fields of a config.json, every one of which must be accounted for."""

from typing import Any

from archlab.layers.config import near

# Fields that say nothing about what the network computes: training, generation, bookkeeping, the files' own dtype.
HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path _num_labels architectures
    attn_implementation auto_map dtype is_llama_config model_type name_or_path tokenizer_class torch_dtype
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop classifier_dropout
    classifier_dropout_prob dropout dropout_rate embd_dropout embd_pdrop embedding_dropout emb_pdrop ffn_dropout
    hidden_dropout hidden_dropout_prob resid_dropout resid_pdrop residual_dropout
    init_device initializer_factor initializer_range embedding_initializer_range
    custom_pipelines gradient_checkpointing max_position_embeddings max_sequence_length model_max_length n_ctx
    original_max_position_embeddings seq_length use_cache cache_implementation
    bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id mask_token_id
    pad_token_id sep_token_id unk_token_id
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens task_specific_params temperature top_k top_p typical_p
    chunk_size_feed_forward finetuning_task id2label label2id num_labels output_attentions output_hidden_states
    output_past output_router_logits problem_type return_dict router_jitter_noise summary_activation
    summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj tie_last_hidden_states torchscript
    pretraining_tp reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32
    chunk_size rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_init_scheme time_step_max
    time_step_min time_step_scale use_associative_scan use_falcon_mambapy use_mambapy
""".split())

# Fields that say nothing as long as they have one of these values.
INERT = {"add_cross_attention": (False,), "cross_attention_hidden_size": (None,), "is_decoder": (False, True),
         "is_encoder_decoder": (False,), "per_layer_config": (None, {}), "pruned_heads": (None, {}),
         "quantization_config": (None,), "rope_interleaved": (False,), "tie_encoder_decoder": (False,),
         "use_mrope": (False,)}

# What there is to say of a field that was not read, beyond that it is not understood.
UNREAD = {"quantization_config": "is not supported: of quantised weights only gpt-oss's MXFP4 is read; cast others to "
                                 "bfloat16 first"}

_MISSING = object()


class Fields:
    """A dictionary from JSON whose reads are noted, and which collects what is wrong with it.

        f.take("hidden_size")                    its value; where it is not written, that of `defaults`
        f.only("position_embedding_type", "rope")   unsupported with any other value than those given
        f.choose("hidden_act", {"silu": "silu"})    the value's translation; unsupported where it has none
        f.inside("rope_parameters")              the fields of a dictionary inside this one
        f.finish()                               one ValueError with all that is wrong, and every field nobody read

    defaults: what the family's config class in transformers takes for a field that is not written; a field without a
    default must be written. spelling: the family's own names of fields, {"hidden_size": "n_embd"}; both are read.
    """

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any] | None = None,
                 spelling: dict[str, str] | None = None, where: str = ""):
        self.values, self.defaults, self.spelling, self.where = values, defaults or {}, spelling or {}, where
        self.used: set[str] = set()
        self.problems: list[str] = []
        self.inner: dict[str, Fields] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the field is written, and not as null."""
        self.used.add(name)
        return self.values.get(name) is not None

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field; where it is not written, that of `defaults`, or else `default`."""
        names = [name, self.spelling.get(name, name)]
        self.used.update(names)
        for spelled in names:
            if spelled in self.values:
                return self._checked(spelled, self.values[spelled])
        if name not in self.defaults and default is _MISSING:
            self.refuse(f"{self.where}{names[-1]} is missing")
        return self.defaults.get(name, None if default is _MISSING else default)

    def only(self, name: str, *supported: Any, default: Any = _MISSING) -> Any:
        """The value of a field of which only some values are supported."""
        value = self.take(name, default)
        if value not in supported:
            self.refuse(f"{self.where}{name} = {value!r} is not supported; {' or '.join(map(repr, supported))} is")
        return value

    def positive(self, name: str, default: Any = _MISSING) -> int | float:
        """The value of a field that must be a number above 0."""
        value = self.take(name, default)
        if not isinstance(value, int | float) or value <= 0:
            self.refuse(f"{self.where}{name} = {_short(value)}: must be a number above 0")
            return 1
        return value

    def whole(self, name: str, default: Any = None) -> int | None:
        """The value of a field that must be a whole number above 0, or null."""
        value = self.take(name, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            self.refuse(f"{self.where}{name} = {_short(value)}: must be a whole number above 0")
            return None
        return value

    def choose(self, name: str, table: dict, default: Any = _MISSING) -> Any:
        """The translation of a field's value by `table`."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in table:
            self.refuse(f"{self.where}{name} = {value!r} is not supported; {near(str(value), list(table))}")
            return next(iter(table.values()))
        return table[value]

    def inside(self, name: str, defaults: dict[str, Any] | None = None) -> "Fields":
        """The fields of a dictionary inside this one, empty where it is not written; `finish` looks into it too."""
        if name not in self.inner:
            value = self.take(name, {}) or {}
            if not isinstance(value, dict):
                self.refuse(f"{self.where}{name} = {value!r}: must be a dictionary")
                value = {}
            self.inner[name] = Fields(value, defaults, where=f"{self.where}{name}.")
        return self.inner[name]

    def refuse(self, problem: str) -> None:
        """Notes what is wrong; `finish` raises it."""
        if problem not in self.problems:
            self.problems.append(problem)

    def all_problems(self) -> list[str]:
        """What is wrong here and inside."""
        return self.problems + [line for f in self.inner.values() for line in f.all_problems()]

    def all_unread(self) -> list[str]:
        """Every field, here and inside, that was not read and is not known to be harmless."""
        unread = [f"{self.where}{name} = {_short(value)} {UNREAD.get(name, 'is not understood')}"
                  for name, value in self.values.items()
                  if name not in self.used and name not in HARMLESS and value not in INERT.get(name, ())]
        return unread + [line for f in self.inner.values() for line in f.all_unread()]

    def finish(self, stopped: str | None = None) -> None:
        """ValueError listing all that is wrong. stopped: what cut the reading short: the unread then says nothing."""
        lines = self.all_problems() + (self.all_unread() if stopped is None else [stopped])
        if lines:
            raise ValueError("config.json cannot be read:\n  " + "\n  ".join(lines))

    def _checked(self, name: str, value):
        """The value, or the default where the value is of another kind (null is of every kind)."""
        default = self.defaults.get(name)
        if value is None or default is None or type(value) is type(default):
            return value
        if {type(default), type(value)} == {int, float} and (type(default) is float or value == int(value)):
            return type(default)(value)  # a whole number may be written with a point
        if type(default) in (bool, int, float, str):
            self.refuse(f"{self.where}{name} = {_short(value)}: must be of the kind of {default!r}")
            return default
        return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
