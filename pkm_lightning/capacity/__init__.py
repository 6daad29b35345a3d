"""Memory and communication of a device in training, from shapes and formulas, before anything is launched.

Bytes in memory of one device (activations, kernels' temporaries and libraries' buffers are left out: a lower bound):

| figure | none, DDP | FSDP2 | ZeRO-1 | ZeRO-2 | ZeRO-3 |
|---|---|---|---|---|---|
| `dense_weights`, embedding included | M b | M b / W | M b | M b | M b / W |
| `dense_gradients` | M b | M b / W, + M b if A > 1 | M b | M b / W + S b | M b / W + S b |
| `dense_states`, AdamW | 2 M b | 2 M b / W | 12 M / W | 12 M / W | 12 M / W |
| `gathered_weights` | 0 | (E + 2 B + max(E, B)) b | 0 | 0 | min(M, 10**9) b |

12 is an fp32 copy and two fp32 states; S = min(M, 2 * 10**8) is the engine's bucket, 10**9 its `max_live_parameters`.

| figure | table.learning=rows | table.learning=dense |
|---|---|---|
| `table_part` | N D v / P | N D v / P |
| `table_gradients` | 0 | N D v / P |
| `table_states` | what `table.optimizer` keeps for the part | 2 N D v / P |
| `staged_reads` | L (4 + 4 + c) + X C v of all calls of a step, in buffers that double as they grow | 0 |
| `merged_replicas` | what all replicas have sent, this one's too: `replicas` R / (R - 1), half that if dense | 0 |
| `usage_counters` | 52 bytes a slot or expert and layer that reads it, where `callbacks.slot_usage` counts | the same |

Bytes that a device receives in an optimizer step; an all-reduce of n bytes is a ring, 2 (W - 1) / W n:

| figure | | |
|---|---|---|
| `dense` | DDP | 2 w M b |
| | FSDP2 | w (A (2 M - E) + M) b: a block is gathered in forward and in backward, the rest once |
| | ZeRO-1 | w (2 M + M) b, + w 8 M if A > 1 |
| | ZeRO-2 | w (2 A M + M) b, + w 8 M if A > 1 |
| | ZeRO-3 | w (A (F + M) + M - F + max(0, F - 5 * 10**8) A) b, + w 4 M if A > 1 |
| `table_forward` | sum | p (4 K + v K [+ 4 K groups]) Q + O |
| | dot | p (4 K + v K) Q + O |
| `table_backward` | sum | p v K Q + O; dot: the same |
| `replicas` | rows | the least of `memory.replicas`: reads, rows, dense |
| | dense | 2 (R - 1) / R N D v / P |
| `row_statistics` | a rule that needs whole rows, `dim` | 2 (P - 1) / P U c |

with w = (W - 1) / W, p = P - 1, Q = T reads a token (times A), O = p / P Q G D v for `dim` and p Q G D v for `row`.
`dim`: O does not depend on K. With activation checkpointing the forward is run twice. ZeRO-1 and -2 all-reduce the
gradients, where a reduce-scatter would do; correcting them for accumulated micro-batches costs them another all-reduce,
ZeRO-3 a gather, in fp32. ZeRO-3 keeps small weights (up to 10**5 values) gathered and holds others from forward to
backward within 10**9 values. Losses, norms, counts, statistics of batch norms and of routers are left out.

Touched rows are estimated from uniform reads, U = N' (1 - exp(-L' / N')) of the N' lines here and the L' reads of them;
on an accelerator they are padded to min(L, N'). Real reads are skewed: fewer rows are touched.

Letters: W ranks, P members of a table's group, R replicas of it, A micro-batches a step, T tokens a rank and
micro-batch; M dense parameters, B of the largest block, E of all but blocks, F of those above 10**5 values; N lines of
a table, D values a line, C of them here; K lines a read, G sums a read, L staged reads, X their source rows; b, v, c
bytes of a dense value, a table's value, a sum.
"""

from pkm_lightning.capacity.figures import Memory, Plan, Traffic, make_plan
from pkm_lightning.capacity.refusals import check_memory, check_setting
from pkm_lightning.capacity.setting import Setting

__all__ = ["Memory", "Plan", "Setting", "Traffic", "check_memory", "check_setting", "make_plan"]
