"""Multi-head attention, with memory that is linear in the sequence where it is computed blockwise."""

import jax
import jax.numpy as jnp

QUERY_CHUNK = 1024
# What a config may choose. "auto" is "xla" up to QUERY_CHUNK queries, and "blockwise" beyond.
ATTENTION = ("auto", "xla", "blockwise", "cudnn")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto", *, query_chunk: int = QUERY_CHUNK
) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v for each head. Logits and softmax are float32.

    Args:
      q: [B, L, heads, C] float.
      k, v: [B, S, heads, C]; S is L in self-attention.
      implementation: "xla" holds all logits [B, heads, L, S] at once. "blockwise" takes `query_chunk` queries at a
        time, and computes their logits again in the backward pass. "cudnn" is the fused kernel of NVIDIA's cuDNN: on
        GPUs only, bfloat16 or float16, C at most 128. "auto" chooses between the first two by L.
      query_chunk: number of queries at a time.

    Returns:
      [B, L, heads, C] in the dtype of `v`.

    Raises:
      ValueError: the implementation is unknown, or cuDNN cannot be used.
    """
    if implementation not in ATTENTION:
        raise ValueError(f"unknown attention {implementation!r}; choose one of {', '.join(ATTENTION)}")
    B, L, _, _ = q.shape
    if implementation == "auto":
        implementation = "xla" if L <= query_chunk else "blockwise"
    if implementation != "blockwise":
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

    def attend_chunk(q):
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")

    query_chunk = -(-L // -(-L // query_chunk))  # equal chunks, so that little is padded
    chunks = jnp.pad(q, ((0, 0), (0, -L % query_chunk), (0, 0), (0, 0))).reshape(B, -1, query_chunk, *q.shape[2:])
    # Without the checkpoint the backward pass would keep the attention weights of all chunks.
    out = jax.lax.map(jax.checkpoint(attend_chunk), chunks.swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(B, -1, *v.shape[2:])[:, :L]
