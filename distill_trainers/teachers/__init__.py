"""Teachers: interchangeable sources of a signal for each trained token."""

from .base import NoTeacher, Teacher
from .cache.teacher import CachedTeacher
from .composed import ComposedTeacher
from .local import DeferredTeacher, LocalTeacher
from .remote.teacher import RemoteTeacher
from .routed import RoutedTeacher
from .vocabulary import shared_vocabulary

__all__ = [
    "CachedTeacher",
    "ComposedTeacher",
    "DeferredTeacher",
    "LocalTeacher",
    "NoTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "Teacher",
    "shared_vocabulary",
]
