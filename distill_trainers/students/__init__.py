"""Students made out of their teacher: fewer layers, narrower ones, or both. `prune` is the way in."""

from .cutting import cut_widths
from .families import FAMILIES
from .importance import Importance, Kept, width_importance
from .layer_importance import choose_layers, layer_importance, summed_forward_kl
from .layers import even_layers, find_decoder_layers, kept_layers, prune_layers
from .planning import Candidate, candidates, masked, measure_candidates
from .pruning import CHOICE_NAME, SIZES, Choice, choose, prune, take
from .shapes import Shape, asked_shape, shape_of
from .student_init import StudentInit, made_of, make_student

__all__ = [
    "CHOICE_NAME",
    "FAMILIES",
    "SIZES",
    "Candidate",
    "Choice",
    "Importance",
    "Kept",
    "Shape",
    "StudentInit",
    "asked_shape",
    "candidates",
    "choose",
    "choose_layers",
    "cut_widths",
    "even_layers",
    "find_decoder_layers",
    "kept_layers",
    "layer_importance",
    "made_of",
    "make_student",
    "masked",
    "measure_candidates",
    "prune",
    "prune_layers",
    "shape_of",
    "summed_forward_kl",
    "take",
    "width_importance",
]
