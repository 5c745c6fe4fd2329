"""MACHINE: published measurements against predictions. Start reading at `assessment.py`.

import moeplan as mp

found = mp.accuracy.assess()
print(found.summary["training_e2e"]["A"].median_error, found.num_constants)
mine = mp.accuracy.assess("my-rows.yaml")
"""

from moeplan.accuracy.assessment import Assessment, Excluded, assess
from moeplan.accuracy.intervals import Belief, belief_of
from moeplan.accuracy.overheads import Overheads

__all__ = ["Assessment", "Belief", "Excluded", "Overheads", "assess", "belief_of"]
