"""The one legend of dimension letters, used as suffixes of tensor names and in shape annotations.

Model code (``ckv_BTC``, ``w_up_EDI``, ``Float[Array, "B T D"]``):

====  ==========================================  ====  =================================
B     batch                                       F     dense FFN
T     query tokens                                I     expert FFN
S     cached tokens                               E     experts
D     model                                       G     expert groups
V     vocabulary                                  K     chosen experts per token
N     heads                                       M     routed rows (tokens x K)
H     query/key head dim                          L     layers
U     its part without RoPE                       A     micro-batches of a step
R     its RoPE part                               W     value head dim
Q     query latent                                C     key-value latent
J     key/value heads                             Y     tokens that one call writes
====  ==========================================  ====  =================================

GEMM rooms (``grouped_gemm`` and what follows it) use the field's own letters instead: ``M`` rows, ``N`` columns,
``K`` contraction, ``G`` groups. Where the cache lies in pages, ``P`` are all pages, ``S`` the tokens of one and ``X``
(any number in other places too) the pages of one sequence.

``axis`` always means a mesh axis, ``dim`` always a tensor dimension.
"""
