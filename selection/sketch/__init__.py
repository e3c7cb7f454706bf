"""The game over a pool that fits no machine: a mergeable sketch of its gains, and its refinement.

Read in this order: gain_sketch, bins, levels, threshold, refinement.
Imports: selection's checks and compiled loops.
"""

from distilbeam.selection.sketch.gain_sketch import GainSketch as GainSketch
