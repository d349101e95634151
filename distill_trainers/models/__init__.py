"""The one place that touches fast-moving or private parts of transformers, PEFT, TRL, DeepSpeed and FSDP.

Everything above it sees three ideas only: a causal LM that can be run up to its last hidden states *through its
wrapper* (`install_token_forward`), its output `Head`, and the context in which it can generate.
"""

from .adapters import (
    add_adapter,
    answering_with,
    causal_lm_of,
    head_module_of,
    is_peft,
    keep_4bit_trainable,
    load_adapter,
    naming_base,
    unwrapped,
    with_frozen_adapters,
)
from .compiling import check_compiler, compile_for_launch, compiled_by_layer, uncompiled
from .experts import AUX_LOSS, balance_coefficient, without_router_logits
from .forward import (
    disable_dropout,
    gives_hidden_states,
    has_dropout,
    head_is_fusable,
    head_reproduces_logits,
    install_token_forward,
    logit_rows,
    read_head,
)
from .frozen import loading_placed, prepare_frozen
from .generation import check_can_generate, eos_ids, generating, generation_eos_ids
from .inputs import check_rows_stay_apart, evaluating, extra_inputs, forward_inputs, is_packed, output_of, refuse_extras
from .loading import (
    check_model_source,
    decoder_start,
    dtype_of,
    is_encoder_decoder,
    load_causal_lm,
    load_config,
    load_tokenizer,
    looks_like_path,
    model_class,
    num_parameters,
    padding_id,
    recomputes_activations,
    refuse_two_quantizations,
    settled_kwargs,
    source_of,
    tokenizer_of,
    which_files,
    with_overrides,
    with_pad_token,
)
from .merging import (
    check_alike,
    load_adapted,
    load_merged_adapter,
    merged_copy,
    refuse_unmergeable,
)
from .positions import beyond_positions, check_files, looks_positions_up, positions_of, without_weights
from .probing import check_answers, logits_of, probe
from .quantizing import (
    BITS,
    body_linears,
    fake_quantize,
    integer_copy,
    is_fake_quantized,
    quantized_sizes,
    rounding_once,
    unquantized,
    without_rounding,
)
from .sharding import (
    checkpoint_tensors,
    forget_dataloader,
    fsdp_version,
    keep_optimizer,
    let_fsdp_shard_on_cpu,
    must_stay_in_step,
    whole,
    whole_loading,
    whole_parameters,
    zero_stage,
)
from .shares import having, trained_shares
from .upload_hook import uploading
from .whole import first_words, load_whole
