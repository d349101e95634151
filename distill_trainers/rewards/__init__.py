"""Reward functions: the built-in checkers, those of the user's, and how they are called."""

from .calling import reward_values
from .functions import REWARDS, RewardFunction, check_names, named, reward_functions
