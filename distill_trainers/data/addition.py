"""The addition task by its first name; it lives in `distill_trainers.toy`."""

from ..toy import *  # noqa: F403
