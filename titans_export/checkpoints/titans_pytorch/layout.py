"""Names and shapes of every tensor that titans-pytorch 0.5 saves for given options."""

from __future__ import annotations

from ...model.titans_pytorch.options import MemoryOptions, NetworkOptions, TransformerOptions

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

# Where a transformer's layer has its parts.
MEMORY_CONNECTION, ATTENTION_CONNECTION, FEED_FORWARD_CONNECTION, SELECTOR, MEMORY, ATTENTION, FEED_FORWARD = range(7)


def layer_prefix(layer: int, part: int) -> str:
    """Of the part's tensors in a layer that is counted from 1, as neural_memory_layers counts."""
    return f"layers.{layer - 1}.{part}."


def network_shapes(network: NetworkOptions, dim_head: int, norm_add_residual: bool) -> Shapes:
    """The memory network's parameters in the order of memory_model_parameters."""
    dim, hidden, shapes = dim_head, network.hidden, Shapes()
    if network.kind == "mlp":
        widths = [dim, *[hidden] * (network.depth - 1), dim]
        shapes = {f"weights.{i}": (widths[i], widths[i + 1]) for i in range(network.depth)}
    else:
        if network.kind == "gated-residual":
            shapes["final_proj"] = (dim, dim)
        blocks: dict[str, list[Shape]] = {
            "gated-residual": [(dim, hidden), (hidden, dim), (2 * dim, dim)],
            "factorized": [(dim, hidden), (hidden, dim)],
            "swiglu": [(dim, 2 * hidden), (hidden, dim)],
        }
        for i in range(network.depth):
            shapes |= {f"weights.{i}.{j}": shape for j, shape in enumerate(blocks[network.kind])}
        if network.kind == "swiglu":
            shapes["norm.gamma"] = (dim,)
    if norm_add_residual:
        return {"norm.gamma": (dim,)} | {f"model.{name}": shape for name, shape in shapes.items()}
    return shapes


def memory_shapes(options: MemoryOptions) -> Shapes:
    """Of a bare NeuralMemory; memory_model.* are dead copies of memory_model_parameters.*, the initial memory."""
    dim, heads, dim_head, views = options.dim, options.heads, options.dim_head, options.num_kv_per_token
    inner = heads * dim_head
    projection = "weight" if options.activation is None else "0.weight"
    network = network_shapes(options.network, dim_head, options.mem_model_norm_add_residual)
    leading = (heads,) if options.per_head_learned_parameters else ()
    shapes: Shapes = {f"memory_model.{name}": shape for name, shape in network.items()}
    shapes |= {f"memory_model_parameters.{i}": leading + shape for i, shape in enumerate(network.values())}
    shapes |= {
        f"to_queries.{projection}": (inner, dim),
        f"to_keys.{projection}": (inner * views, dim),
        f"to_values.{projection}": (inner * views, dim),
    }
    if options.pre_rmsnorm:
        shapes |= {"retrieve_norm.weight": (dim,), "store_norm.weight": (dim,)}
    if options.post_rmsnorm:
        shapes["multihead_rmsnorm.gamma"] = (heads, 1, dim_head)
    if options.qk_rmsnorm:
        shapes |= {"q_norm.gamma": (heads, 1, dim_head), "k_norm.gamma": (heads, 1, dim_head)}
    if heads > 1:
        shapes |= {"combine_heads.weight": (dim, inner), "retrieve_gate.0.weight": (heads, dim)}
    if options.attn_pool_chunks:
        shapes |= _linear("reduce_to_chunk_rep.to_attn_logits", dim, dim)
    if options.gated_transition:
        shapes["transition_gate"] = ()
    shapes |= _linear("to_adaptive_step.0", heads * views, dim) | _linear("to_decay_factor.0", heads, dim)
    if options.momentum:
        shapes |= _linear("to_momentum.0", heads * options.momentum_order, dim)
    if options.learned_momentum_combine:
        orders = options.momentum_order + options.learned_combine_include_zeroth
        shapes |= _linear("to_learned_momentum_combine.0", heads * orders, dim)
    if options.per_parameter_lr_modulation:
        shapes |= _linear("to_layer_modulation.0", heads * len(network), dim)
    if options.accept_weight_residual:
        shapes |= _linear("to_learned_weight_residual_mix.0", heads, dim)
    return shapes


def transformer_shapes(options: TransformerOptions, without_residual: MemoryOptions) -> Shapes:
    """Of a MemoryAsContextTransformer; without_residual: the options of its first memory layer."""
    dim, tokens, streams = options.dim, options.num_tokens, options.num_residual_streams
    shapes: Shapes = {
        "token_emb.weight": (tokens, dim),
        "longterm_mems": (options.num_longterm_mem_tokens, dim),
        "norm.weight": (dim,),
        "to_logits.weight": (tokens, dim),
    }
    for axis in range(2):
        mlp = f"axial_pos_emb.mlps.{axis}"
        shapes |= (
            _linear(f"{mlp}.0", 2 * dim, 1) | _linear(f"{mlp}.2", 2 * dim, 2 * dim) | _linear(f"{mlp}.4", dim, 2 * dim)
        )
    if streams > 1:
        shapes["expand_streams.stream_embed"] = (streams, dim)
    for layer in range(1, options.depth + 1):
        parts = {ATTENTION: _attention(options, layer), FEED_FORWARD: _feed_forward(options)}
        if streams > 1:
            parts |= {part: _connection(dim, streams, True) for part in (ATTENTION_CONNECTION, FEED_FORWARD_CONNECTION)}
        if layer in options.neural_memory_layers:
            first = layer == options.neural_memory_layers[0]
            parts[MEMORY] = memory_shapes(without_residual if first else options.memory)
            if streams > 1:
                parts[MEMORY_CONNECTION] = _connection(dim, streams, not options.neural_mem_gate_attn_output)
            if options.neural_memory_qkv_receives_diff_views and layer > 1:
                choices = 4 * (layer - 1) + 1
                parts[SELECTOR] = {"0.weight": (dim,)} | _linear("1", 3 * choices, dim)
        for part, inside in parts.items():
            shapes |= {layer_prefix(layer, part) + name: shape for name, shape in inside.items()}
    return shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _attention(options: TransformerOptions, layer: int) -> Shapes:
    dim, heads, dim_head = options.dim, options.heads, options.dim_head
    shapes: Shapes = {
        "norm.weight": (dim,),
        "to_qkv.weight": (3 * heads * dim_head, dim),
        "to_out.weight": (dim, heads * dim_head),
        "persistent_memory": (2, heads, options.num_persist_mem_tokens, dim_head),
        "rotary_emb.freqs": (dim_head // 2,),
    }
    return shapes | _linear("to_learned_v_mix.0", heads, dim) if layer > 1 else shapes


def _feed_forward(options: TransformerOptions) -> Shapes:
    dim, hidden = options.dim, options.ff_hidden
    return {"0.weight": (dim,)} | _linear("1", 2 * hidden, dim) | _linear("3", dim, hidden)


def _connection(dim: int, streams: int, adds_branch: bool) -> Shapes:
    shapes: Shapes = {
        "static_alpha": (streams, streams + 1),
        "dynamic_alpha_fn": (1, dim, streams + 1),
        "pre_branch_scale": (1,),
        "residual_scale": (1,),
        "norm.gamma": (dim,),
    }
    if adds_branch:
        shapes |= {"static_beta": (streams,), "dynamic_beta_fn": (dim,), "h_post_scale": ()}
    return shapes
