"""Teachers: interchangeable sources of a signal for each trained token."""

from .base import NoTeacher, Teacher
from .cache.teacher import CachedTeacher
from .local import DeferredTeacher, LocalTeacher
from .remote.teacher import RemoteTeacher
from .vocabulary import shared_vocabulary

__all__ = [
    "CachedTeacher",
    "DeferredTeacher",
    "LocalTeacher",
    "NoTeacher",
    "RemoteTeacher",
    "Teacher",
    "shared_vocabulary",
]
