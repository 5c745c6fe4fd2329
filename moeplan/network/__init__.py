"""Traffic on links that it shares: exchanges as flows, fair rates, finish times, bounds.

expand     an exchange of a plan as transfers over paths, wave by wave
exchange   one exchange alone on a cluster: seconds, bounds, what holds it up
bounds     cuts that no algorithm can beat
fluid      any flows: when each ends, exactly or batched
levels, events      how, compiled: fair sharing from event to event
matrix, ports       how, where every GPU sends to every other
classes, uniform    what is alike is worked out once
systems, colours    what shares no link; the tools of refinement

import moeplan as mp

cluster = mp.load("mixtral-8x7b-64xh100").cluster
found = mp.network.all_to_all(cluster, size_bytes=64 * 2**20, algorithm="two_stage")
print(found.time_s, found.bound_s, found.cut_bound_s, found.bottleneck)
"""

from moeplan.network.exchange import ExchangeTime, PhaseTime, all_to_all, time_of
from moeplan.network.fluid import Finishes, FlowSet, finish_times

__all__ = ["ExchangeTime", "Finishes", "FlowSet", "PhaseTime", "all_to_all", "finish_times", "time_of"]
