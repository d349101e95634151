"""Teachers: interchangeable sources of a signal for each trained token."""

from .base import Teacher
from .cached import CachedTeacher
from .deferred import DeferredTeacher
from .local import LocalTeacher
from .none import NoTeacher
from .remote import RemoteTeacher
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
