"""Memory and communication of one device in training, from shapes and formulas, before anything is launched.

Bytes in the memory of one device when a backward starts. Temporaries of kernels and buffers of libraries are left out:

| figure | none, DDP | FSDP2 | ZeRO-1 | ZeRO-2 | ZeRO-3 |
|---|---|---|---|---|---|
| `dense_weights`, with the embedding | M b | M b / W | M b | M b | M b / W |
| `dense_gradients` | M b | M b / W, + M b if A > 1 | M b | M b / W + bucket b | M b / W + bucket b |
| `dense_states`, AdamW | 2 M b | 2 M b / W | 12 M / W | 12 M / W | 12 M / W |
| `gathered_weights` | 0 | (M_rest + 2 M_block + max(M_rest, M_block)) b | 0 | 0 | min(M, 10**9) b |

12 bytes are an fp32 copy and two fp32 states. `bucket` = min(M, 2 * 10**8) is the engine's, and 10**9 its
`max_live_parameters`.

| figure | any strategy, per micro-batch |
|---|---|
| `activations` | what autograd keeps of a forward, weights excluded |
| | with activation checkpointing the inputs of the blocks, T D b each, and what the largest block keeps |
| `logits` | 12 T Z: log-probabilities, their gradient, that of the logits; fp32, every token a target (CPUs: 8 T Z) |

`activations` are counted rather than derived, so that every plugin is included: a forward runs on the meta device, with
the attention kernel and the casts of mixed precision that a device uses. Per token, a block with a SwiGLU FFN keeps
(6 D + 2 J + H + S + 4 F + 2) b bytes: input and output of both norms (4 D), queries and the output of attention (2 D),
keys and values (2 J), a sum per head (H), the mask of documents (S), gate, its activation, the other factor and the
product (4 F), and the scales of the norms, which keep fp32 in every precision. Norms without a kernel of their own keep
2 D more, compiled blocks less.

| figure | table.learning=rows | table.learning=dense |
|---|---|---|
| `table_part` | N V v / P | N V v / P |
| `table_gradients` | 0 | N V v / P |
| `table_states` | those of `table.optimizer` for the part | 2 N V v / P |
| `staged_reads` | L (4 + 4 + c) + X C v of all calls of a step, in buffers that double as they grow | 0 |
| `merged_replicas` | what all replicas sent, this one included: `replicas` R / (R - 1), half of that if dense | 0 |
| `usage_counters` | 52 bytes per slot (or expert) and layer that reads it, with `callbacks.slot_usage` | the same |

Bytes that one device receives in an optimizer step. An all-reduce of n bytes counts as a ring, 2 (W - 1) / W n:

| figure | | |
|---|---|---|
| `dense` | DDP | 2 w M b |
| | FSDP2 | w (A (2 M - M_rest) + M) b: blocks are gathered in forward and in backward, the rest once |
| | ZeRO-1 | w (2 M + M) b, + w 8 M if A > 1 |
| | ZeRO-2 | w (2 A M + M) b, + w 8 M if A > 1 |
| | ZeRO-3 | w (A (M_large + M) + M - M_large + max(0, M_large - 5 * 10**8) A) b, + w 4 M if A > 1 |
| `table_forward` | sum | p (4 I + v I [+ 4 I groups]) Q + O |
| | dot | p (4 I + v I) Q + O |
| `table_backward` | sum | p v I Q + O; dot: the same |
| `replicas` | rows | the least of the three ways in `memory.replicas`: reads, rows, dense |
| | dense | 2 (R - 1) / R N V v / P |
| `row_statistics` | a rule that needs whole rows, `dim`; whole columns, `row` | 2 (P - 1) / P U c; 2 (P - 1) / P V c |

with w = (W - 1) / W, p = P - 1, Q = A T times the reads per token, and O = p / P Q G V v for `dim`, p Q G V v for
`row`. For `dim`, O does not depend on I. With activation checkpointing the forward runs twice. ZeRO-1 and -2 all-reduce
the gradients, where a reduce-scatter would do; the correction for accumulated micro-batches costs them another
all-reduce and ZeRO-3 a gather, in fp32. ZeRO-3 keeps small weights (up to 10**5 values) gathered, and holds others from
forward to backward within 10**9 values. Losses, norms, counts, and statistics of batch norms and routers are left out.

Touched rows are estimated from uniform reads, U = N' (1 - exp(-L' / N')) for the N' rows on the device and their L'
reads; on an accelerator they are padded to min(L, N'). Real reads are skewed and touch fewer rows.

Letters: W ranks, P members of a table's group, R replicas of the group, A micro-batches per step, T tokens per rank
and micro-batch; M dense parameters, M_block those of the largest block, M_rest those outside blocks, M_large those in
weights above 10**5 values; D model dimension, J that of all keys or values of attention, H heads, S tokens per
sequence, F hidden dimension of the FFN, Z vocabulary; N rows of a table (each slice of a row counts), V values per
row, C of them on the device; I rows per read, G sums per read, L staged reads, X their source rows; b, v and c bytes
of a dense value, a table's value and a sum.
"""

from pkm_lightning.capacity.allocation import check_allocatable
from pkm_lightning.capacity.checks import check_memory, check_setting
from pkm_lightning.capacity.figures import Memory, Plan, Traffic, make_plan
from pkm_lightning.capacity.remarks import batch_remarks
from pkm_lightning.capacity.setting import Setting

__all__ = [
    "Memory",
    "Plan",
    "Setting",
    "Traffic",
    "batch_remarks",
    "check_allocatable",
    "check_memory",
    "check_setting",
    "make_plan",
]
