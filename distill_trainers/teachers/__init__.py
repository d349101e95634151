"""Teachers: interchangeable sources of a signal for each trained token."""

from .base import Teacher
from .cached import CachedTeacher
from .local import LocalTeacher
from .none import NoTeacher
from .vocabulary import shared_vocabulary

__all__ = ["CachedTeacher", "LocalTeacher", "NoTeacher", "Teacher", "shared_vocabulary"]
